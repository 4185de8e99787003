# SPDX-License-Identifier: Apache-2.0
"""Tables as text: what is printed is what is there, and can be read back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings

from prefault.errors import CapabilityMissing
from prefault.kvm import stage2
from prefault.machine import Leaf, VmConfig
from prefault.spec import HostConfig, open_spec, ptdump
from prefault.spec.memory import PhysicalMemory
from prefault.spec.state import S2Mmu
from prefault.spec.vm import leaves
from tests.spec.mmus import GRANULES, mmus


@settings(max_examples=100, deadline=None)
@given(mmus())
def test_the_text_read_back_is_the_leaves_and_covers_all(mmu: S2Mmu) -> None:
    text = ptdump.show(mmu)
    assert stage2.parse(text) == leaves(mmu.pgt)
    (dump,) = stage2.read(text.splitlines())
    assert dump.end == 1 << mmu.pgt.ia_bits
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


def test_a_protected_vm_shows_no_tables() -> None:
    with (
        open_spec(HostConfig(protected=True)) as kvm,
        kvm.create_vm(VmConfig(protected=True)) as vm,
        pytest.raises(CapabilityMissing),
    ):
        vm.ptdump()
