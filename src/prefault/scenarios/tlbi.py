# SPDX-License-Identifier: Apache-2.0
"""What L1's TLB invalidations leave of a shadow table: pre-faulting neither adds to it nor takes from it."""

from __future__ import annotations

from prefault.guest.program import EnterL2, L2Mapping, Marker, Step, TlbiIpa, TlbiRange, Walk
from prefault.machine import Backing, Leaf, Vcpu, VcpuConfig, Vm
from prefault.scenarios.scenario import DATA, Stage, scenarios

L2 = 0x20_0000_0000
"""L2 IPA at which L2 sees the memory that L1 has at DATA. An L1 table for it has a branch of its own."""
PAGES = 64


def _shadow(vm: Vm, size: int) -> list[Leaf]:
    """The leaves at L2's data, of the one shadow table that has any."""
    tables = [[leaf for leaf in table if L2 <= leaf.ipa < L2 + size] for table in vm.nested_stage2()]
    return [leaf for table in tables for leaf in table]


def _play(stage: Stage, size: int, backing: Backing, level: int, *tlbis: Step) -> list[Leaf]:
    """An L2 walks its memory, L1 invalidates, its vCPU pre-faults; what the shadow has then."""
    vm = stage.vm(stage.data(size // stage.page, backing))
    walk = EnterL2((Walk(L2, size, stage.page),), (L2Mapping(L2, DATA, size, level),))
    config = VcpuConfig(el2=True)
    vcpu: Vcpu = stage.vcpu(vm, walk, Marker(1), *tlbis, Marker(2), config=config)
    stage.proceed(vcpu)
    before = _shadow(vm, size)
    stage.holds(sum(leaf.size for leaf in before) == size, "the shadow table does not have what L2 walked")
    stage.pre_fault(vcpu, DATA, size)
    stage.holds(_shadow(vm, size) == before, "pre-faulting changed the shadow table")
    stage.proceed(vcpu)
    left = _shadow(vm, size)
    stage.see("left in the shadow", left)
    stage.pre_fault(vcpu, DATA, size)
    stage.holds(_shadow(vm, size) == left, "pre-faulting put back what L1 had dropped")
    return left


@scenarios("M4", cases=[(0,), (3,)])
def l1_drops_one_page_of_its_l2(stage: Stage, level: int) -> None:
    """With and without a hint at the level."""
    size = PAGES * stage.page
    left = _play(stage, size, Backing.PRIVATE, 3, TlbiIpa(L2 + 5 * stage.page, level))
    stage.holds(sum(leaf.size for leaf in left) == size - stage.page, f"not one page was dropped: {left}")


@scenarios("M4", cases=[(0,), (2,)])
def l1_drops_one_block_of_its_l2(stage: Stage, level: int) -> None:
    """Wherever in the block the IPA is."""
    left = _play(stage, 2 * stage.block, Backing.THP, 2, TlbiIpa(L2 + stage.block + 7 * stage.page, level))
    stage.holds(left == [leaf for leaf in left if leaf.ipa < L2 + stage.block], f"the block is there: {left}")


@scenarios("M4", cases=[(2,), (6,), (64,)])
def l1_drops_a_range_of_its_l2(stage: Stage, pages: int) -> None:
    """Of as many pages as the instruction can name."""
    size = 2 * PAGES * stage.page
    left = _play(stage, size, Backing.PRIVATE, 3, TlbiRange(L2 + 2 * stage.page, pages * stage.page))
    dropped = size - sum(leaf.size for leaf in left)
    stage.holds(dropped == pages * stage.page, f"{dropped:#x} bytes were dropped, not {pages} pages")


@scenarios("M4", cases=[(Backing.PRIVATE,), (Backing.THP,)])
def l1_drops_pages_of_a_block_of_its_own(stage: Stage, backing: Backing) -> None:
    """L1 maps a block, the host pages or a block; L1 names one page of it."""
    left = _play(stage, 2 * stage.block, backing, 2, TlbiIpa(L2 + 3 * stage.page))
    stage.holds(all(leaf.ipa >= L2 + stage.block for leaf in left), f"some of the block is left: {left}")
