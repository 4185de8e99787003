# SPDX-License-Identifier: Apache-2.0
"""Brings a snapshot's memory while the guest runs: what is touched at once, and the rest in the background.

Chunks are brought whole and in turn, so that a chunk is there or it is not. Who touches a chunk that turns
out to be damaged waits, and is told to leave before it is let go: the guest never sees wrong bytes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prefault.errors import PrefaultError
from prefault.kvm.userfault import Userfault
from prefault.kvm.vm import Vm
from prefault.machine import Userfault as Served
from prefault.machine import UserfaultMode
from prefault.vmm import snapshot
from prefault.vmm.config import RAM_BASE
from prefault.vmm.snapshot import CHUNK, Snapshot


class Pager:
    """Serves faults from its making on; ``start`` begins the background copy. From the main thread.

    :param page_size: of the backing; chunks are at least as large
    :param first: (ipa, size) ranges to bring before all others
    :param checked: the snapshot's sums have been compared already
    :param zero_pages: whether the backing can have pages of zeroes without copying any
    :param on_failure: told what went wrong, from another thread; the VM must not go on
    """

    def __init__(
        self,
        vm: Vm,
        source: Snapshot,
        *,
        page_size: int,
        first: Sequence[tuple[int, int]],
        checked: bool,
        zero_pages: bool,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._source = source
        self._unit = max(CHUNK, page_size)
        self._checked = checked
        self._zero_pages = zero_pages
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._there = bytearray(-(-source.size // self._unit))
        self._first = list(self._units(first))
        self.counts = {"asked": 0, "first": 0, "background": 0}
        self.seconds = 0.0
        self.complete = False
        self._leave = False
        self.error: BaseException | None = None
        self._first_done = threading.Event()
        self._done = threading.Event()
        self._exit = contextlib.ExitStack()
        self._view, self._address = self._exit.enter_context(snapshot.mapped(source))
        self._userfault: Userfault = vm.handle_userfaults(
            RAM_BASE, source.size, UserfaultMode.MISSING, self._serve
        )
        self._thread = threading.Thread(target=self._copy_all, name="pager", daemon=True)

    def _units(self, ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
        for ipa, size in ranges:
            start = (ipa - RAM_BASE) // self._unit
            yield from range(start, -(-(ipa + size - RAM_BASE) // self._unit))

    def start(self) -> None:
        """Begin to copy what nobody has asked for."""
        self._began = time.monotonic()
        self._thread.start()

    def wait_for_first(self) -> None:
        """Return when all of ``first`` is there."""
        self._first_done.wait()

    def finish(self) -> None:
        """Return when everything is there.

        :raises BaseException: what went wrong, if it never will be
        """
        self._done.wait()
        if self.error:
            raise self.error

    def facts(self) -> dict[str, object]:
        """What was brought, and why: chunks by who asked for them."""
        return {
            **self.counts,
            "chunk": self._unit,
            "seconds": round(self.seconds, 6),
            "complete": self.complete,
        }

    def release(self) -> None:
        """Serve no more, and let go who waits, with whatever memory there is. Safe to call again."""
        self._leave = True
        if self._thread.ident:
            self._thread.join()
        self._userfault.close()

    def close(self) -> None:
        """``release``, and close what is left. Safe to call again."""
        self.release()
        self._exit.close()

    # The threads.

    def _serve(self, _: Served, ipa: int, write: bool) -> None:
        self._bring((ipa - RAM_BASE) // self._unit, "asked")

    def _copy_all(self) -> None:
        try:
            for index in self._first:
                if self._leave or self.error:
                    return
                self._bring(index, "first")
            self._first_done.set()
            for index in range(len(self._there)):
                if self._leave or self.error:
                    return
                self._bring(index, "background")
            self.complete = not self.error
        finally:
            self.seconds = time.monotonic() - self._began
            self._first_done.set()
            self._done.set()

    def _bring(self, index: int, why: str) -> None:
        with self._lock:
            if self._there[index]:
                return
            start = index * self._unit
            end = min(start + self._unit, self._source.size)
            try:
                self._copy(start, end)
            except PrefaultError as error:
                self.error = self.error or error
                self._on_failure(error)
                return
            self._there[index] = 1
            self.counts[why] += 1

    def _copy(self, start: int, end: int) -> None:
        chunks = range(start // CHUNK, -(-end // CHUNK))
        if not self._checked:
            for chunk in chunks:
                # Released at once, or the mapping could not be taken down while an error is on its way.
                with self._view[chunk * CHUNK : min(end, (chunk + 1) * CHUNK)] as piece:
                    self._source.check_chunk(chunk, piece)
        if self._zero_pages and all(self._source.sums[chunk] is None for chunk in chunks):
            self._userfault.zero(RAM_BASE + start, end - start)
        else:
            self._userfault.copy_from(RAM_BASE + start, self._address + start, end - start)
