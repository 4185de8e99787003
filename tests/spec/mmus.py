# SPDX-License-Identifier: Apache-2.0
"""Stage-2 MMUs with all kinds of leaves, made by Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from prefault.spec.descriptors import Granule, Prot
from prefault.spec.memory import PhysicalMemory
from prefault.spec.state import S2Mmu

GRANULES = (Granule(12), Granule(12, lpa2=True), Granule(14), Granule(16))
PROTS = (
    *(Prot.R, Prot.R | Prot.W, Prot.R | Prot.X, Prot.R | Prot.W | Prot.X),
    *(Prot.R | Prot.PX, Prot.R | Prot.UX),
)


@st.composite
def mmus(draw: st.DrawFn, granules: tuple[Granule, ...] = GRANULES) -> S2Mmu:
    """An MMU with leaves, some of them old, some of them gone again, so that empty tables stay."""
    granule = draw(st.sampled_from(granules))
    bits = draw(st.sampled_from([32, 36, 40, 48]))
    mmu = S2Mmu(PhysicalMemory(granule.page_shift), granule, bits, shadow=False)
    for number in range(draw(st.integers(0, 20))):
        size = granule.size(draw(st.sampled_from([2, 3, 3])))
        # Near each other, so that leaves meet and tables are shared, or anywhere.
        place = draw(st.integers(0, 40) | st.integers(0, 1 << 20))
        ipa = place * size & (1 << bits) - 1
        prot = draw(st.sampled_from(PROTS))
        mmu.pgt.map(ipa, size, (number + 1) << 40, prot, mmu.pgt.memory.allocate_table)
        fate = draw(st.sampled_from(["stays", "stays", "grows old", "goes"]))
        if fate == "goes":
            mmu.pgt.unmap(ipa, granule.page_size)
        elif fate == "grows old":
            mmu.pgt.test_clear_young(ipa, size, mkold=True)
    return mmu
