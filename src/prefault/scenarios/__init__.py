# SPDX-License-Identifier: Apache-2.0
"""What must hold, and what is measured, as short programs over ``prefault.machine``."""
