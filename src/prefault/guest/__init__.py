# SPDX-License-Identifier: Apache-2.0
"""Guest programs: described once as data, run as machine code on KVM and as steps on the spec."""
