# SPDX-License-Identifier: Apache-2.0
"""Recorded stage-2 faults: how they are recorded and read, the working sets in them, and plans.

``capture``, ``captured`` and ``plan`` need only the standard library, because they also run inside the lab
and in VMMs; the others need numpy and pyarrow.
"""
