# SPDX-License-Identifier: Apache-2.0
"""Faults of this process, served by a thread of its own. What KVM makes of it is for the scenarios."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefault.errors import CapabilityMissing, PrefaultError, UsageError
from prefault.kvm import memory
from prefault.kvm.userfault import Userfault
from prefault.machine import Backing, MemoryRegion, UserfaultHandler, UserfaultMode
from prefault.machine import Userfault as AnyUserfault

PAGE = os.sysconf("SC_PAGE_SIZE")
GPA = 64 * PAGE
# Foreign calls let other threads run meanwhile, which ctypes.string_at() does not.
_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@pytest.fixture
def hva() -> Iterator[int]:
    """Four pages that nobody has touched."""
    made = memory.create(MemoryRegion(0, GPA, 4 * PAGE, Backing.PRIVATE), PAGE)
    yield made.hva
    made.close()


def serve(hva: int, handler: UserfaultHandler, mode: UserfaultMode = UserfaultMode.MISSING) -> Userfault:
    try:
        return Userfault(hva, GPA, 4 * PAGE, mode, handler, PAGE)
    except CapabilityMissing as missing:
        pytest.skip(str(missing))


def read(hva: int) -> bytes:
    found = ctypes.create_string_buffer(8)
    _memcpy(ctypes.addressof(found), hva, 8)
    return found.raw


def test_whoever_faults_waits_for_the_handler(hva: int) -> None:
    asked = []

    def handler(userfault: AnyUserfault, gpa: int, write: bool) -> None:
        asked.append((gpa, write))
        userfault.copy(gpa, gpa.to_bytes(8, "little") * (PAGE // 8))

    with serve(hva, handler):
        for index in (2, 0, 2):
            gpa = GPA + index * PAGE
            assert read(hva + index * PAGE + 64) == gpa.to_bytes(8, "little")
    assert asked == [(GPA + 2 * PAGE, False), (GPA, False)]


def test_zeroes_can_be_served(hva: int) -> None:
    with serve(hva, lambda userfault, gpa, write: userfault.zero(gpa, PAGE)):
        assert read(hva) == bytes(8)


def test_writes_to_protected_pages_are_asked_for(hva: int) -> None:
    asked = []

    def handler(userfault: AnyUserfault, gpa: int, write: bool) -> None:
        asked.append((gpa, write))
        userfault.write_protect(gpa, PAGE, protect=False)

    ctypes.memset(hva, 1, 4 * PAGE)
    with serve(hva, handler, UserfaultMode.WRITE_PROTECT) as userfault:
        userfault.write_protect(GPA, 2 * PAGE, protect=True)
        _memcpy(hva + PAGE, hva, 8)
        _memcpy(hva + 3 * PAGE, hva, 8)
    assert asked == [(GPA + PAGE, True)]


def test_a_handler_that_fails_leaves_nobody_waiting_and_is_not_hushed_up(hva: int) -> None:
    def handler(userfault: AnyUserfault, gpa: int, write: bool) -> None:
        raise ValueError("this handler has a bug")

    userfault = serve(hva, handler)
    assert read(hva) == bytes(8)
    with pytest.raises(ValueError, match="has a bug"):
        userfault.close()
    userfault.close()


def test_serving_what_is_there_already_is_no_error(hva: int) -> None:
    with serve(hva, lambda userfault, gpa, write: userfault.zero(gpa, PAGE)) as userfault:
        userfault.copy(GPA, bytes(PAGE))
        userfault.copy(GPA, bytes(PAGE))


def test_serving_elsewhere_is(hva: int) -> None:
    with (
        serve(hva, lambda userfault, gpa, write: None) as userfault,
        pytest.raises(PrefaultError, match="UFFDIO_ZEROPAGE failed: No such file"),
    ):
        userfault.zero(GPA + (1 << 20), PAGE)


def test_other_threads_cannot_have_a_signal_for_whoever_waits(hva: int) -> None:
    def elsewhere() -> None:
        Userfault(hva, GPA, PAGE, UserfaultMode.MISSING, lambda userfault, gpa, write: None, PAGE)

    with ThreadPoolExecutor(1) as pool, pytest.raises(UsageError, match="main thread only"):
        pool.submit(elsewhere).result()
