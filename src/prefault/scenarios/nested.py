# SPDX-License-Identifier: Apache-2.0
"""Pre-faulting by a vCPU that stands in a nested context: L1's memory is filled, all else is left alone."""

from __future__ import annotations

import errno
import itertools
from dataclasses import replace

from prefault.guest.program import DeviceRead, EnterL2, L2Mapping, Marker, Read, Report, Step, Walk
from prefault.machine import Advice, Backing, Vcpu, VcpuConfig, Vm
from prefault.scenarios.ordinary import delivered
from prefault.scenarios.scenario import DATA, DEVICE, Stage, scenario, scenarios

PAGES = 64
L2 = 0x20_0000_0000
"""L2 IPA at which L2 sees the memory that L1 has at DATA."""
E2H0 = ((False,), (True,))


def _nested(stage: Stage, e2h0: bool, *steps: Step, l1: tuple[Step, ...] = ()) -> tuple[Vm, Vcpu]:
    """An L1 whose L2 does ``steps``, with half a slot mapped at L2, and which then goes on with ``l1``."""
    vm = stage.vm(stage.data(PAGES))
    mappings = (
        L2Mapping(L2, DATA, PAGES // 2 * stage.page),
        L2Mapping(DEVICE // stage.page * stage.page, DEVICE // stage.page * stage.page, stage.page),
    )
    config = VcpuConfig(el2=True, e2h0=e2h0)
    return vm, stage.vcpu(vm, EnterL2(steps, mappings), *l1, config=config)


@scenarios("M4", "M14", cases=E2H0)
def nested_prefault_leaves_shadow_untouched(stage: Stage, e2h0: bool) -> None:
    vm, vcpu = _nested(
        stage, e2h0, Read(L2), Report(), Marker(1), Walk(L2, PAGES // 2 * stage.page, stage.page), Report()
    )
    stage.proceed(vcpu)
    stage.proceed(vcpu)
    before = vm.nested_stage2()
    stage.see("shadows", before)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(vm.nested_stage2() == before, "a shadow table changed")
    leaves = stage.leaves(vm)
    stage.holds(sum(leaf.size for leaf in leaves) == PAGES * stage.page, "the canonical table was not filled")
    stage.finish(vcpu)
    stage.see("shadows at the end", vm.nested_stage2())


@scenarios("M4", cases=itertools.product((Backing.PRIVATE, Backing.GUEST_MEMFD), ("writable", "executable")))
def an_l2_may_do_what_l1_lets_it_also_with_prefaulted_memory(
    stage: Stage, backing: Backing, denied: str
) -> None:
    vm = stage.vm(stage.data(PAGES, backing))
    mapping = replace(L2Mapping(L2, DATA, PAGES * stage.page), **{denied: False})
    walk = Walk(L2, PAGES * stage.page, stage.page)
    vcpu = stage.vcpu(vm, Marker(0), EnterL2((walk, Marker(1)), (mapping,)), config=VcpuConfig(el2=True))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.proceed(vcpu)
    tables = vm.nested_stage2()
    stage.see("shadows", tables)
    leaves = [leaf for table in tables for leaf in table if L2 <= leaf.ipa < L2 + PAGES * stage.page]
    stage.holds(sum(leaf.size for leaf in leaves) == PAGES * stage.page, f"L2 walked, and has {leaves}")
    rights = [leaf.writable if denied == "writable" else leaf.px or leaf.ux for leaf in leaves]
    stage.holds(not any(rights), f"L2 has memory that is {denied} against L1's will")


@scenarios("M4", "M14", cases=E2H0)
def nested_prefault_spares_l1_its_faults(stage: Stage, e2h0: bool) -> None:
    walk = Walk(DATA, PAGES * stage.page, stage.page)
    vm, vcpu = _nested(stage, e2h0, Marker(0), l1=(Marker(1), walk, Report()))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.proceed(vcpu)
    counts = stage.faults(vm, vcpu)
    stage.holds(counts.total == 0, f"L1 took {counts.total} faults on {PAGES} pre-faulted pages")


READS = [(2, True, 64), (1, True, 32), (4, True, 64), (8, False, 64), (4, False, 32)]


@scenarios("M3", "M4", cases=[(e2h0, *read) for (e2h0,), read in itertools.product(E2H0, READS)])
def nested_pending_device_read_survives(
    stage: Stage, e2h0: bool, width: int, signed: bool, bits: int
) -> None:
    vm, vcpu = _nested(stage, e2h0, Read(L2), Report(), DeviceRead(DEVICE, width, signed, bits), Report())
    stage.proceed(vcpu)
    stage.proceed(vcpu)
    before = vm.nested_stage2()
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(vm.nested_stage2() == before, "a shadow table changed")
    value = 0xF1E2_D3C4_B5A6_9788
    vcpu.complete_mmio(value)
    expected = delivered(value, width, signed, bits)
    stage.holds(stage.finish(vcpu) == [expected], f"the read did not deliver {expected:#x}")


@scenarios("M4", cases=E2H0)
def nested_gpa_is_an_l1_ipa(stage: Stage, e2h0: bool) -> None:
    vm, vcpu = _nested(stage, e2h0, Read(L2), Marker(0))
    stage.proceed(vcpu)
    progress = stage.pre_fault_once(vcpu, L2, stage.page)
    stage.holds(progress.errno == errno.ENOENT, f"an L2 IPA without an L1 memslot gave {progress}")
    stage.leaves(vm)


@scenarios("M4", cases=E2H0)
def nested_registers_do_not_change(stage: Stage, e2h0: bool) -> None:
    _, vcpu = _nested(stage, e2h0, Read(L2), DeviceRead(DEVICE, 2, True), Report())
    stage.proceed(vcpu)
    before = vcpu.registers()
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.unchanged(before, vcpu.registers())


@scenarios("M4", cases=E2H0)
def a_hypervisor_that_never_ran_keeps_its_registers(stage: Stage, e2h0: bool) -> None:
    vm = stage.vm(stage.data(PAGES))
    vcpu = vm.create_vcpu(VcpuConfig(el2=True, e2h0=e2h0))
    before = vcpu.registers()
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.unchanged(before, vcpu.registers())


@scenario("M4", "M9")
def nested_prefault_uses_blocks_of_the_host(stage: Stage) -> None:
    pages = 2 * stage.block // stage.page
    vm = stage.vm(stage.data(pages, Backing.THP))
    mapping = L2Mapping(L2, DATA, 4 * stage.page)
    vcpu = stage.vcpu(vm, EnterL2((Read(L2), Marker(0)), (mapping,)), config=VcpuConfig(el2=True))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    stage.holds(all(leaf.block for leaf in stage.leaves(vm)), "the canonical table has pages, not blocks")
    stage.see("shadows", vm.nested_stage2())


@scenario("M4", "M12")
def memory_that_the_host_takes_back_leaves_the_shadows_too(stage: Stage) -> None:
    vm, vcpu = _nested(stage, False, Read(L2), Report(), Marker(1), Read(L2), Report())
    vm.write_memory(DATA, (0x77).to_bytes(8, "little"))
    stage.proceed(vcpu)
    stage.proceed(vcpu)
    stage.see("shadows", vm.nested_stage2())
    vm.advise(DATA, stage.page, Advice.DONTNEED)
    stage.see("shadows without the page", vm.nested_stage2())
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(stage.finish(vcpu) == [0], "L2 saw a page that the host has dropped")
    stage.see("shadows at the end", vm.nested_stage2())
