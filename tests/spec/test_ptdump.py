# SPDX-License-Identifier: Apache-2.0
"""Tables as text: what is printed is what is there, and can be read back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefault.errors import CapabilityMissing
from prefault.kvm import stage2
from prefault.machine import Leaf, VmConfig
from prefault.spec import HostConfig, open_spec, ptdump
from prefault.spec.descriptors import Granule, Prot
from prefault.spec.memory import PhysicalMemory
from prefault.spec.state import S2Mmu
from prefault.spec.vm import leaves

GRANULES = (Granule(12), Granule(12, lpa2=True), Granule(14), Granule(16))
PROTS = (
    Prot.R,
    Prot.R | Prot.W,
    Prot.R | Prot.X,
    Prot.R | Prot.W | Prot.X,
    Prot.R | Prot.PX,
    Prot.R | Prot.UX,
)
mappings = st.lists(
    st.tuples(
        st.integers(0, 1 << 20),
        st.sampled_from([2, 3, 3]),
        st.sampled_from(PROTS),
        st.booleans(),
        st.booleans(),
    ),
    max_size=20,
)


def mapped(granule: Granule, bits: int, todo: list[tuple[int, int, int, bool, bool]]) -> S2Mmu:
    """An MMU with leaves, some of them old, some of them gone again, so that empty tables stay."""
    mmu = S2Mmu(PhysicalMemory(granule.page_shift), granule, bits, shadow=False)
    for number, (place, level, prot, old, gone) in enumerate(todo):
        size = granule.size(level)
        ipa = place * size & (1 << bits) - 1
        mmu.pgt.map(ipa, size, (number + 1) << 40, prot, mmu.pgt.memory.allocate_table)
        if gone:
            mmu.pgt.unmap(ipa, granule.page_size)
        elif old:
            mmu.pgt.test_clear_young(ipa, size, mkold=True)
    return mmu


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GRANULES), st.sampled_from([32, 36, 40, 48]), mappings)
def test_the_text_read_back_is_the_leaves_and_covers_all(
    granule: Granule, bits: int, todo: list[tuple[int, int, int, bool, bool]]
) -> None:
    mmu = mapped(granule, bits, todo)
    text = ptdump.show(mmu)
    assert stage2.parse(text) == leaves(mmu.pgt)
    (dump,) = stage2.read(text.splitlines())
    assert dump.end == 1 << bits
    assert dump.shadow is None
    # The kernel joins all neighbours that look the same.
    for one, other in itertools.pairwise(dump.runs):
        assert one.ipa + one.size == other.ipa
        assert (one.level, type(one)) != (other.level, type(other)) or isinstance(one, Leaf)


def test_a_shadow_says_whose_it_is() -> None:
    mmu = S2Mmu(PhysicalMemory(12), GRANULES[0], 48, shadow=True)
    mmu.tlb_vttbr, mmu.tlb_vtcr, mmu.nested_stage2_enabled = 0xA_0000_4000_2000, 0x8002_3559, True
    text = ptdump.show(mmu)
    assert text.startswith(
        "VTCR: 0x0000000080023559 VTTBR: 0x000a000040002000 s2: enabled\n---[ Guest IPA ]---\n"
    )
    (dump,) = stage2.read(text.splitlines())
    assert dump.shadow == stage2.Shadow(0x8002_3559, 0xA_0000_4000_2000, True)


def test_an_empty_table_is_one_row() -> None:
    with open_spec() as kvm, kvm.create_vm(VmConfig(ipa_bits=36)) as vm:
        assert vm.ptdump() == ["---[ Guest IPA ]---\n0x0000000000000000-0x0000001000000000          64G 1\n"]


def test_a_protected_host_shows_no_tables() -> None:
    with (
        open_spec(HostConfig(protected=True)) as kvm,
        kvm.create_vm() as vm,
        pytest.raises(CapabilityMissing),
    ):
        vm.ptdump()
