# SPDX-License-Identifier: Apache-2.0
"""vCPU threads, with vCPUs that only wait."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import cast

import pytest

from prefault.errors import PrefaultError
from prefault.kvm.vcpu import Bus, Vcpu
from prefault.machine import Exit, Interrupted, OtherExit
from prefault.vmm import runner
from prefault.vmm.runner import KICK, Runner


class Idle:
    """In the guest until it is kicked."""

    def __init__(self) -> None:
        self.kicked = False
        self.runs = 0
        self.running = False
        self.deaf = False
        self.end: Exit | Exception | None = None

    def run_with(self, bus: object) -> Exit:
        self.running = not self.kicked
        self.runs += 1
        while (self.deaf or not self.kicked) and self.end is None:
            time.sleep(0.001)
        self.running = False
        if isinstance(self.end, Exception):
            raise self.end
        return self.end or Interrupted()

    def kick(self) -> None:
        self.kicked = True

    def settle(self) -> None:
        self.kicked = False


class Fixture:
    """A runner with its vCPUs."""

    def __init__(self, count: int) -> None:
        self.vcpus = [Idle() for _ in range(count)]
        self.exits: list[tuple[int, object]] = []
        self.runner = Runner(
            [cast(Vcpu, vcpu) for vcpu in self.vcpus],
            cast(Bus, None),
            lambda number, exit_: self.exits.append((number, exit_)),
        )


@pytest.fixture
def four() -> Iterator[Fixture]:
    before = signal.getsignal(KICK)
    made = Fixture(4)
    made.runner.start()
    yield made
    made.runner.stop()
    signal.signal(KICK, before)


def soon(condition: object) -> bool:
    assert callable(condition)
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return bool(condition())


def test_in_a_pause_no_vcpu_runs(four: Fixture) -> None:
    for _ in range(20):
        four.runner.pause()
        assert not any(vcpu.running for vcpu in four.vcpus)
        four.runner.resume()
        assert soon(lambda: all(vcpu.running for vcpu in four.vcpus))


def test_a_pause_outlasts_the_next_one_at_once(four: Fixture) -> None:
    for _ in range(20):
        four.runner.pause()
        four.runner.resume()
        four.runner.pause()
        assert not any(vcpu.running for vcpu in four.vcpus)
        four.runner.resume()


def test_a_pause_that_was_given_up_leaves_no_vcpu_out_of_the_guest(
    four: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "STOP_SECONDS", 0.1)
    assert soon(lambda: all(vcpu.running for vcpu in four.vcpus))
    four.vcpus[1].deaf = True
    with pytest.raises(PrefaultError, match="did not leave the guest"):
        four.runner.pause()
    four.runner.resume()
    four.vcpus[1].deaf = False
    assert soon(lambda: all(vcpu.running and not vcpu.kicked for vcpu in four.vcpus))


def test_stopping_ends_all_threads_also_in_a_pause(four: Fixture) -> None:
    four.runner.pause()
    four.runner.stop()
    four.runner.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vcpu")]


def test_an_exit_is_told_with_its_vcpu_and_does_not_hinder_a_pause(four: Fixture) -> None:
    four.vcpus[2].end = OtherExit(24, "KVM_EXIT_SYSTEM_EVENT", (1,))
    assert soon(lambda: four.exits)
    assert four.exits == [(2, four.vcpus[2].end)]
    four.runner.pause()
    assert not any(vcpu.running for vcpu in four.vcpus)


def test_an_error_of_a_vcpus_thread_is_told(four: Fixture) -> None:
    error = RuntimeError("no")
    four.vcpus[0].end = error
    assert soon(lambda: four.exits)
    assert four.exits == [(0, error)]
