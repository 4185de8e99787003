# SPDX-License-Identifier: Apache-2.0
"""``python3 -m prefault.soak.run JSON``: rounds of fighting and checking, a JSON line for each.

A round is a new VM: its actors fight for some seconds, rest, and every byte and leaf is checked; so a few
times, and at the end the guest reads and writes all that there is.
"""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prefault.abi.constants import KVM_CAP_ARM_EL2, KVM_CAP_GUEST_MEMFD_FLAGS
from prefault.errors import PrefaultError
from prefault.kvm import open_kvm
from prefault.kvm.system import Kvm
from prefault.kvm.vcpu import Vcpu
from prefault.machine import VcpuConfig
from prefault.soak import check
from prefault.soak.actors import Act, Host, Interrupter, PreFaulter, Runner, Slots, here, programs, repeat
from prefault.soak.ground import Ground, lay_out

_KSM = Path("/sys/kernel/mm/ksm")
_INJECTION = {
    "failslab": {"ignore-gfp-wait": "0", "verbose": "0"},
    "fail_page_alloc": {"ignore-gfp-wait": "0", "min-order": "0", "verbose": "0"},
}
_SHOWN = 20


@dataclass(frozen=True)
class SoakConfig:
    """What to do, and for how long.

    :ivar seconds: of fighting, in all
    :ivar round_seconds: of fighting, in a round
    :ivar bout_seconds: of fighting, between two checks
    :ivar vcpus: two of them only pre-fault and only run; the others do both
    :ivar nested: vCPUs have EL2, and every other walk is an L2's; in every other round, where KVM has that
    :ivar seed: of all chances; threads still race as they like
    """

    seconds: float = 60
    round_seconds: float = 10
    bout_seconds: float = 2
    vcpus: int = 4
    nested: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Round:
    """What came of one.

    :ivar wrong: what does not hold, a line each; at most _SHOWN of each kind
    :ivar counts: operations by kind
    """

    number: int
    nested: bool
    seconds: float
    counts: dict[str, int]
    wrong: list[str]


def soak(kvm: Kvm, config: SoakConfig, tell: Callable[[Round], None]) -> None:
    """Rounds until the time is up, or until something is wrong."""
    fought, number = 0.0, 0
    while fought < config.seconds:
        one = play(kvm, config, number)
        tell(one)
        if one.wrong:
            return
        fought += config.round_seconds
        number += 1


def play(kvm: Kvm, config: SoakConfig, number: int) -> Round:
    """One round."""
    began = time.monotonic()
    nested = config.nested and number % 2 == 1 and bool(kvm.check_extension(KVM_CAP_ARM_EL2))
    counts: Counter[str] = Counter()
    chance = random.Random(config.seed * 1_000_003 + number)
    with kvm.create_vm() as vm:
        guest_memfd = bool(vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS))
        ground = Ground(vm, kvm.page_size, lay_out(kvm.page_size, guest_memfd=guest_memfd))
        ground.set_up()
        vcpus = [vm.create_vcpu(VcpuConfig(el2=nested)) for _ in range(config.vcpus)]
        ground.stamp()
        bodies = programs(ground, nested)
        for program in bodies:
            vm.install(program)
        reader = check.Reader(ground)
        slots = Slots(ground, chance, 0.01)
        wrong: list[str] = []
        try:
            acts: list[list[Act]] = []
            for index, vcpu in enumerate(vcpus):
                pre_fault = PreFaulter(ground, vcpu, random.Random(chance.random()))
                run = Runner(ground, vcpu, random.Random(chance.random()), bodies)
                both: list[Act] = [pre_fault, run]
                acts.append(both[index : index + 1] if index < 2 else both)
            others: list[Act] = [Host(ground, random.Random(chance.random()), 0.001) for _ in range(2)]
            for bout in range(max(1, round(config.round_seconds / config.bout_seconds))):
                ground.look_at(chance)
                # Guests that run repair what they meet, so that less is left to be seen.
                active = acts if bout % 2 else [one[:1] for one in acts if one is not acts[1]]
                _fight(active, [*others, slots], config.bout_seconds, counts, chance)
                with _ksm_at_rest():
                    wrong = _rest(ground, slots)
                if wrong:
                    break
            else:
                with _ksm_at_rest():
                    wrong = _compare(ground, reader, vcpus[0], nested)
        except Exception:
            wrong.append(traceback.format_exc())
    return Round(number, nested, time.monotonic() - began, dict(counts), wrong)


def _fight(
    vcpus: list[list[Act]], others: list[Act], seconds: float, counts: Counter[str], chance: random.Random
) -> None:
    """Let all act at once."""
    until = time.monotonic() + seconds
    threads: list[int] = []
    with ThreadPoolExecutor(len(vcpus) + len(others) + 1) as pool:
        interrupter = Interrupter(threads, random.Random(chance.random()))
        running = [pool.submit(_vcpu, acts, until, counts, threads) for acts in vcpus]
        everybody: list[Act] = [*others, interrupter]
        running += [pool.submit(repeat, act, until, counts) for act in everybody]
        for one in running:
            one.result()


def _vcpu(acts: list[Act], until: float, counts: Counter[str], threads: list[int]) -> None:
    threads.append(here())
    try:
        turn = random.Random(here())
        repeat(lambda: turn.choice(acts)(), until, counts)
    finally:
        threads.remove(here())


@contextmanager
def _ksm_at_rest() -> Iterator[None]:
    """No page is merged between the looks at its leaf and at itself. Waits for the scan that is on."""
    with suppress(OSError):
        (_KSM / "run").write_text("0")
    try:
        yield
    finally:
        with suppress(OSError):
            (_KSM / "run").write_text("1")


def _rest(ground: Ground, slots: Slots) -> list[str]:
    """What does not hold after a bout. Nothing changes by looking, but that the dirty logs are read."""
    table = ground.vm.stage2()
    logged = slots.rest()
    return [*_some(check.contents(ground)), *_some(check.leaves(ground, table, logged))]


def _compare(ground: Ground, reader: check.Reader, vcpu: Vcpu, nested: bool) -> list[str]:
    """What does not hold if the guest now reads everything, and then writes everything."""
    wrong = _some(reader.reads(vcpu))
    if nested:
        # Breaking copy-on-write takes the shadow MMUs apart each time: minutes, for so many pages.
        return wrong
    return [*wrong, *_some(reader.writes(vcpu)), *_some(check.contents(ground))]


def _some(lines: Iterable[str]) -> list[str]:
    """The first few, and how many more there are."""
    whole = list(lines)
    return whole[:_SHOWN] + ([f"and {len(whole) - _SHOWN} more"] if len(whole) > _SHOWN else [])


def _prepare() -> None:
    """Let KSM merge, and let allocations fail where threads ask for that."""
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    sys.setswitchinterval(0.0005)
    with suppress(OSError):
        (_KSM / "run").write_text("1")
        (_KSM / "sleep_millisecs").write_text("20")
        (_KSM / "pages_to_scan").write_text("1000")
    for name, values in _INJECTION.items():
        for file, value in values.items():
            with suppress(OSError):
                (Path("/sys/kernel/debug") / name / file).write_text(value)


def main() -> int:
    """Soak as the JSON in argv[1] says; 1 if something is wrong."""
    config = SoakConfig(**json.loads(sys.argv[1]))
    _prepare()
    failed = False

    def tell(one: Round) -> None:
        nonlocal failed
        failed = failed or bool(one.wrong)
        print(json.dumps(dataclasses.asdict(one)), flush=True)

    try:
        with open_kvm() as kvm:
            soak(kvm, config, tell)
    except PrefaultError as error:
        print(json.dumps({"error": {"message": str(error), "exit_code": int(error.exit_code)}}))
        return int(error.exit_code)
    return int(failed)


if __name__ == "__main__":
    threading.current_thread().name = "soak"
    sys.exit(main())
