# SPDX-License-Identifier: Apache-2.0
"""Conformance: the same scenarios on the specification and on a real kernel, and what differs."""
