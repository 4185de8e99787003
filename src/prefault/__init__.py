# SPDX-License-Identifier: Apache-2.0
"""prefault: warm guest memory on arm64 KVM before the guest touches it."""

__version__ = "0.1.0"
