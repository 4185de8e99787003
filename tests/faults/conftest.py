# SPDX-License-Identifier: Apache-2.0
"""How the property tests here run."""

from __future__ import annotations

from hypothesis import settings

# A machine that builds kernels meanwhile lets any example take a second.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
