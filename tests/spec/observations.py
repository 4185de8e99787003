# SPDX-License-Identifier: Apache-2.0
"""Random programs over ``prefault.machine``, and all that can be observed of them, as JSON.

``python3 observations.py SEED...`` prints one line per seed on the real KVM; the same seeds on the
spec must give the same lines. Standard library only: this also runs inside the lab.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
from collections.abc import Iterator

from prefault.errors import KvmError, PrefaultError
from prefault.guest import port
from prefault.guest.program import (
    RET,
    Argument,
    DeviceRead,
    EnterL2,
    Execute,
    L2Mapping,
    Marker,
    Program,
    Read,
    Report,
    Step,
    Walk,
    Write,
)
from prefault.machine import (
    Access,
    Advice,
    Backing,
    Kvm,
    Leaf,
    MemoryRegion,
    MmioExit,
    Resident,
    SlotFlags,
    VcpuConfig,
    VmConfig,
)

CODE, DATA, DEVICE = 0x4000_0000, 0x1_0000_0000, 0x0A00_0000
BLOCK = 2 << 20
SPAN = 4 * BLOCK
A0, A1 = Argument(0), Argument(1)
BACKINGS = [*Backing, Backing.THP, Backing.HUGETLB, Backing.PRIVATE]

_PLAIN: dict[str, tuple[Step, ...]] = {
    "read": (Read(A0), Report()),
    "write": (Write(A0, A1), Report()),
    "execute": (Execute(A0), Marker(1)),
    "walk": (Walk(A0, A1, 0x1000, 400), Report()),
    "device": (DeviceRead(A0, 2, sign_extend=True), Report()),
}


def _programs(nested: bool) -> dict[str, Program]:
    """Every kind of guest access, at L1 and at L2, each in code of its own."""
    steps = dict(_PLAIN)
    if nested:
        data = L2Mapping(DATA, DATA, SPAN, 2)
        device = L2Mapping(DEVICE, DEVICE, 0x1000, 3)
        pages = L2Mapping(DATA, DATA + BLOCK, BLOCK, 3)
        read_only = L2Mapping(DATA, DATA, SPAN, 2, writable=False)
        for name, plain in _PLAIN.items():
            steps[f"l2-{name}"] = (EnterL2(plain, (data, device)),)
        steps["l2-pages"] = (EnterL2((Walk(A0, A1, 0x2000, 300), Report()), (pages,)),)
        steps["l2-read-only"] = (EnterL2((Read(A0), Report()), (read_only,)), Read(A0), Report())
        steps["l2-twice"] = (
            EnterL2((Read(A0), Marker(2)), (data,)),
            EnterL2((Write(A0, A1), Marker(3)), (data,)),
        )
    return {name: Program(one, CODE + 0x2_0000 * index) for index, (name, one) in enumerate(steps.items())}


class Observer:
    """One VM that random things are done to."""

    def __init__(self, kvm: Kvm, seed: int) -> None:
        self._random = random.Random(seed)
        self._kvm = kvm
        self.nested = self._random.random() < 0.4
        self._programs = _programs(self.nested)
        self._vm = kvm.create_vm(VmConfig())
        self._vm.set_user_memory_region(MemoryRegion(0, CODE, BLOCK, resident=Resident.WRITE))
        for program in self._programs.values():
            self._vm.install(program)
        self._vcpu = self._vm.create_vcpu(VcpuConfig(el2=self.nested))
        self._regions: dict[int, MemoryRegion] = {}
        self._safe = True

    def close(self) -> None:
        """Close the VM."""
        self._vm.close()

    def observe(self, steps: int) -> Iterator[object]:
        """Do random things; what each one shows."""
        yield self._add()
        plain = [self._access, self._pre_fault, self._add, self._delete, self._toggle_log, self._log]
        for _ in range(steps):
            what = self._random.choices(
                [*plain, self._host, self._advise, self._protect, self._unmap],
                [20, 16, 6, 2, 4, 6, 4, 10, 2, 1],
            )[0]
            with self._vm.count_faults() as faults:
                result = what()
            counts = dataclasses.asdict(faults)
            yield [what.__name__, result, counts, _rows(self._vm.stage2())]
            if self.nested:
                yield [_rows(table) for table in self._vm.nested_stage2()]

    def _page(self) -> int:
        at = self._random.choice(
            [0, 1, 2, 511, 512, 513, 1023, 1024, 1535, 2047, self._random.randrange(2048)]
        )
        return DATA + at * 0x1000

    def _access(self) -> object:
        name = self._random.choice(list(self._programs))
        gpa = self._page()
        if "device" in name:
            gpa = DEVICE + 8 * self._random.randrange(600)
        if "execute" in name and not self._put_return(gpa):
            return "nowhere to execute"
        argument = 0x1000 * self._random.randrange(1, 40) if "walk" in name or "pages" in name else gpa
        if "pages" in name:
            gpa = DATA + (gpa - DATA) % (BLOCK // 2)
        self._vcpu.load(self._programs[name], (gpa, argument))
        return [name, gpa, *self._events()]

    def _put_return(self, gpa: int) -> bool:
        if not self._safe:
            return False
        try:
            self._vm.write_memory(gpa, RET)
        except PrefaultError:
            return False
        return True

    def _events(self) -> list[str]:
        found: list[str] = []
        while len(found) < 60:
            try:
                event = port.proceed(self._vcpu)
            except PrefaultError as error:
                # QEMU reports the IPA space in HPFAR_EL2.NS, which is RES0 in a guest without Secure state.
                message = re.sub(r"HPFAR_EL2 0x80+(?=[1-9a-f])", "HPFAR_EL2 0x", str(error))
                return [*found, message]
            found.append(repr(event))
            if isinstance(event, MmioExit):
                if not event.is_write:
                    self._vcpu.complete_mmio(0x8081 + len(found))
                if self._random.random() < 0.5:
                    found.append(str(self._pre_fault()))
            elif not isinstance(event, port.AtMarker | port.Reported):
                break
        return found

    def _pre_fault(self) -> object:
        gpa = self._page() - self._random.choice([0, 0, 0, 0x1000, 0x100])
        size = 0x1000 * self._random.choice([0, 1, 2, 3, 17, 512, 600])
        progress = self._vcpu.pre_fault_memory_once(gpa, size, self._random.choice([0] * 20 + [1]))
        return [gpa, size, *dataclasses.astuple(progress)]

    def _add(self) -> object:
        number = self._random.randrange(1, 4)
        if number in self._regions and self._random.random() < 0.5:
            self._delete(number)
        region = MemoryRegion(
            number,
            DATA + self._random.choice([0, 0, BLOCK, 2 * BLOCK, 0x3000, BLOCK - 0x2000]),
            self._random.choice([BLOCK, 2 * BLOCK, 0x9000, BLOCK + 0x5000]),
            self._random.choice(BACKINGS),
            self._random.choice(list(Resident)),
            SlotFlags(self._random.choice([0, 0, 0, 1, 1, 2, 3])),
            page_size=self._random.choice([0, 0, 64 << 10]),
            hva_offset=self._random.choice([0, 0, 0, 0x1000]),
        )
        if region.page_size and region.backing is not Backing.HUGETLB:
            region = dataclasses.replace(region, page_size=0)
        return [repr(region), self._set(region)]

    def _set(self, region: MemoryRegion) -> int:
        try:
            self._vm.set_user_memory_region(region)
        except KvmError as error:
            return error.errno
        self._regions[region.slot] = region
        return 0

    def _delete(self, number: int = 0) -> object:
        if not self._regions:
            return None
        number = number or self._random.choice(list(self._regions))
        self._vm.set_user_memory_region(dataclasses.replace(self._regions.pop(number), size=0))
        return number

    def _toggle_log(self) -> object:
        if not self._regions:
            return None
        region = self._regions[self._random.choice(list(self._regions))]
        flags = region.flags ^ SlotFlags.LOG_DIRTY_PAGES
        return [region.slot, int(flags), self._set(dataclasses.replace(region, flags=SlotFlags(flags)))]

    def _log(self) -> object:
        logged = [one for one in self._regions.values() if one.flags & SlotFlags.LOG_DIRTY_PAGES]
        return [[one.slot, self._vm.get_dirty_log(one.slot)] for one in logged]

    def _advise(self) -> object:
        gpa, size = self._page(), 0x1000 * self._random.choice([1, 1, 2, 512])
        choices = [Advice.DONTNEED, Advice.DONTNEED, Advice.POPULATE_READ, Advice.POPULATE_WRITE]
        advice = self._random.choice([*choices, Advice.COLLAPSE, Advice.HUGEPAGE, Advice.NOHUGEPAGE])
        if advice is Advice.COLLAPSE:
            gpa, size = gpa & -BLOCK, BLOCK
        try:
            self._vm.advise(gpa, size, advice)
        except PrefaultError as error:
            return [gpa, size, advice.value, type(error).__name__]
        return [gpa, size, advice.value]

    def _unmap(self) -> object:
        gpa, size = self._page(), 0x1000 * self._random.choice([1, 1, 2, 512])
        self._safe = False
        try:
            self._vm.unmap(gpa, size)
        except PrefaultError as error:
            return [gpa, size, type(error).__name__]
        return [gpa, size]

    def _protect(self) -> object:
        gpa, size = self._page(), 0x1000 * self._random.choice([1, 1, 2, 512])
        access = self._random.choice([Access.READ, Access.WRITE, Access.NONE, Access.WRITE])
        # From now on the VMM itself might fault.
        self._safe = False
        try:
            self._vm.protect(gpa, size, access)
        except PrefaultError as error:
            return [gpa, size, access.value, type(error).__name__]
        return [gpa, size, access.value]

    def _host(self) -> object:
        gpa = self._page()
        if not self._safe:
            return [gpa, "not safe"]
        try:
            self._vm.write_memory(gpa, b"prefault" * 3)
        except PrefaultError:
            return [gpa, "no memory"]
        return [gpa, self._vm.read_memory(gpa, 24).hex()]


def _rows(leaves: list[Leaf]) -> list[tuple[object, ...]]:
    return [dataclasses.astuple(leaf) for leaf in leaves]


def observe(kvm: Kvm, seed: int, steps: int) -> list[object]:
    """All that can be observed of a seed, as JSON would have it."""
    observer = Observer(kvm, seed)
    try:
        found = list(observer.observe(steps))
    finally:
        observer.close()
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # a list went in


def main() -> None:
    """Print a line for each seed from argv[1] up to argv[2], of argv[3] steps; null if it did not work."""
    from prefault.kvm import open_kvm

    first, last, steps = map(int, sys.argv[1:])
    with open_kvm() as kvm:
        for seed in range(first, last):
            try:
                found = json.dumps(observe(kvm, seed, steps))
            except PrefaultError as error:
                # Huge pages can run out on a real host.
                print(f"seed {seed}: {error}", file=sys.stderr)
                found = "null"
            print(found, flush=True)


if __name__ == "__main__":
    main()
