# SPDX-License-Identifier: Apache-2.0
"""A guest walks its memory, once without and once with pre-faulting.

Each of the two is done twice, in new VMs over new memory: once on the clock and once with stage-2
faults being counted, because counting costs time.

Every vCPU walks a part of the memory of its own. Ordinary guests walk it in two halves. Nested
ones do so as L2, and then walk the whole of it as L1: L2's faults fill the shadow table, which
pre-faulting leaves alone; it is L1 that it spares.

``python3 -m prefault.scenarios.walk --json CONFIG...`` prints the result of each as one line of JSON,
and CLOCK_STARTS and CLOCK_STOPS on standard error around each timed run: under icount the machine's
own clock counts instructions, so wall time can only be taken by whoever reads these lines outside.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence

from prefault.abi.constants import KVM_CAP_PRE_FAULT_MEMORY
from prefault.errors import CapabilityMissing, PrefaultError, UsageError
from prefault.machine import Kvm, VmConfig
from prefault.scenarios.walk_result import Phase, WalkConfig, WalkResult, WalkRun, When
from prefault.scenarios.walker import CLOCK_STARTS, CLOCK_STOPS, Note, Walker, silence

__all__ = [
    "CLOCK_STARTS",
    "CLOCK_STOPS",
    "Phase",
    "WalkConfig",
    "WalkResult",
    "WalkRun",
    "When",
    "main",
    "walk",
]


def walk(kvm: Kvm, config: WalkConfig, note: Note = silence) -> WalkResult:
    """Walk without and with pre-faulting.

    :raises Mismatch: the guest read, or the host finds, other bytes than were written
    :raises CapabilityMissing: this KVM cannot pre-fault, or has no such backing or nested guests
    """
    config = prepare(kvm, config)
    runs = [_run_twice(kvm, config, permille, note) for permille in (0, config.prefault_permille)]
    return WalkResult(config, kvm.page_size, *runs)


def prepare(kvm: Kvm, config: WalkConfig) -> WalkConfig:
    """The walk with its stride, if it can be done here.

    :raises UsageError: it cannot be cut as it must be
    :raises CapabilityMissing: this KVM cannot pre-fault
    """
    stride = config.stride or kvm.page_size
    config = dataclasses.replace(config, stride=stride)
    if config.size % (2 * config.vcpus * stride) or stride % 8:
        raise UsageError(
            f"size {config.size:#x} cannot be cut into two halves of whole strides of {stride:#x} "
            f"for {config.vcpus} vCPUs; use a multiple of {2 * config.vcpus * stride:#x}"
        )
    if config.prefault_permille:
        _require_capability(kvm)
    return config


def _require_capability(kvm: Kvm) -> None:
    """Say so before half of the work is done."""
    with kvm.create_vm(VmConfig()) as vm:
        if not vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY):
            raise CapabilityMissing(
                "this VM does not report KVM_CAP_PRE_FAULT_MEMORY: boot a kernel with the series"
            )


def _run_twice(kvm: Kvm, config: WalkConfig, permille: int, note: Note) -> WalkRun:
    with Walker(kvm, config, permille) as walker:
        timed = walker.run(count=False, note=note)
    with Walker(kvm, config, permille) as walker:
        counted = walker.run(count=True)
    phases = tuple(
        dataclasses.replace(clock, faults=count.faults)
        for clock, count in zip(timed.phases, counted.phases, strict=True)
    )
    return dataclasses.replace(timed, phases=phases)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    # Whoever passes the line on must be done with that before the clock runs.
    time.sleep(0.02)


def read_config(text: str) -> WalkConfig:
    """A walk from JSON text.

    :raises UsageError: it is none
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"the configuration is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"the configuration is a JSON object, not {text}")
    return WalkConfig.from_json(values)


def main(argv: Sequence[str] | None = None) -> int:
    """Walk on this host's KVM as ``--json CONFIG...`` says; print results, or the first error, as JSON."""
    from prefault.kvm import open_kvm  # the one place that says which back end it is

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if len(arguments) < 2 or arguments[0] != "--json":
            raise UsageError("usage: python3 -m prefault.scenarios.walk --json CONFIG...")
        configs = [read_config(text) for text in arguments[1:]]
        with open_kvm() as kvm:
            for config in configs:
                print(json.dumps(walk(kvm, config, _tell).to_json()), flush=True)
    except PrefaultError as error:
        print(json.dumps({"error": {"message": str(error), "exit_code": int(error.exit_code)}}))
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
