# SPDX-License-Identifier: Apache-2.0
"""Host memory behind slots. All of it but guest_memfd and hugetlb can be had on any Linux."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import CapabilityMissing, UsageError
from prefault.kvm import host, hugepages, memory
from prefault.machine import FILE_CONTENTS, Backing, Frames, MemoryRegion, Resident

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
PLAIN = (Backing.PRIVATE, Backing.SHARED, Backing.FILE_PRIVATE, Backing.FILE_SHARED)


def resident_pages(hva: int, size: int) -> int:
    """Pages present in this process, by /proc/self/pagemap."""
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(hva // PAGE * 8)
        entries = pagemap.read(size // PAGE * 8)
    return sum(entries[at + 7] >> 7 for at in range(0, len(entries), 8))


@pytest.mark.parametrize("backing", PLAIN)
@pytest.mark.parametrize("resident", Resident)
def test_memory_is_as_resident_as_asked(backing: Backing, resident: Resident) -> None:
    region = MemoryRegion(0, 0, MIB, backing, resident)
    made = memory.create(region, PAGE)
    try:
        expected = 0 if resident is Resident.NOTHING else MIB // PAGE
        assert resident_pages(made.hva, MIB) == expected
    finally:
        made.close()


@pytest.mark.parametrize("backing", PLAIN)
def test_what_is_written_is_read(backing: Backing) -> None:
    made = memory.create(MemoryRegion(0, 0, MIB, backing), PAGE)
    try:
        made.write(MIB - 4, b"last")
        assert made.read(MIB - 4, 4) == b"last"
        first = FILE_CONTENTS[:8] if backing is Backing.FILE_PRIVATE else bytes(8)
        assert made.read(0, 8) == first
    finally:
        made.close()


@given(page=st.integers(0, 1 << 20), shift=st.integers(0, 1024))
def test_the_hva_agrees_with_the_gpa_up_to_the_shift_that_was_asked(page: int, shift: int) -> None:
    block = hugepages.pmd_size() or PAGE
    region = MemoryRegion(0, page * PAGE, PAGE, hva_offset=shift * PAGE)
    made = memory.create(region, PAGE)
    try:
        assert (made.hva - region.gpa - region.hva_offset) % block == 0
    finally:
        made.close()


def mappings() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


@pytest.mark.parametrize("backing", PLAIN)
def test_closing_leaves_neither_mapping_nor_descriptor(backing: Backing) -> None:
    made = memory.create(MemoryRegion(0, PAGE, MIB, backing), PAGE)
    place = f"{made.hva:x}-"
    assert any(line.startswith(place) for line in mappings())
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    made.close()
    assert not any(line.startswith(place) for line in mappings())
    files = backing in (Backing.FILE_PRIVATE, Backing.FILE_SHARED)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors - files
    made.close()


@pytest.mark.parametrize(
    ("field", "region"),
    [
        ("gpa", MemoryRegion(0, PAGE + 1, PAGE)),
        ("size", MemoryRegion(0, 0, PAGE + 1)),
        ("hva_offset", MemoryRegion(0, 0, PAGE, hva_offset=1)),
    ],
)
def test_a_slot_is_made_of_whole_pages(field: str, region: MemoryRegion) -> None:
    with pytest.raises(UsageError, match=field):
        memory.create(region, PAGE)


def test_thp_is_one_huge_page_a_block() -> None:
    if hugepages.thp_mode() in ("", "never"):
        pytest.skip("this host has no transparent huge pages")
    size = 4 * hugepages.pmd_size()
    made = memory.create(MemoryRegion(0, 0, size, Backing.THP, Resident.WRITE), PAGE)
    try:
        text = Path("/proc/self/smaps").read_text()
        after = text.partition(f"{made.hva:x}-")[2]
        huge = next(line for line in after.splitlines() if line.startswith("AnonHugePages:"))
        assert int(huge.split()[1]) << 10 == size
    finally:
        made.close()


def test_thp_switched_off_says_how_to_switch_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugepages, "thp_mode", lambda: "never")
    with pytest.raises(CapabilityMissing, match="echo madvise"):
        memory.create(MemoryRegion(0, 0, MIB, Backing.THP), PAGE)


class FakePool:
    """A hugetlb pool that grants at most ``limit`` pages, and of which mappings have reserved some."""

    def __init__(self, root: Path, pages: int, limit: int, reserved: int = 0) -> None:
        self.folder = root / "hugepages-2048kB"
        self.folder.mkdir(parents=True)
        self.limit = limit
        (self.folder / "nr_hugepages").write_text(str(pages))
        (self.folder / "free_hugepages").write_text(str(pages))
        (self.folder / "resv_hugepages").write_text(str(reserved))

    def count(self) -> int:
        return int((self.folder / "nr_hugepages").read_text())

    def grant(self, path: Path, text: str) -> int:
        with path.open("w") as file:
            return file.write(str(min(int(text), self.limit)))


def fake_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int, limit: int, reserved: int = 0
) -> FakePool:
    pool = FakePool(tmp_path, pages, limit, reserved)
    monkeypatch.setattr(hugepages, "_HUGETLB", tmp_path)
    monkeypatch.setattr(Path, "write_text", lambda path, text: pool.grant(path, text))
    return pool


def test_a_pool_is_grown_by_what_is_missing_and_shrunk_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = fake_pool(tmp_path, monkeypatch, 3, 100)
    reservation = hugepages.Reservation(2 * MIB, 8)
    assert pool.count() == 8
    reservation.close()
    reservation.close()
    assert pool.count() == 3


def test_pages_that_others_have_reserved_are_missing_though_they_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = fake_pool(tmp_path, monkeypatch, 3, 100, reserved=2)
    hugepages.Reservation(2 * MIB, 1)
    assert pool.count() == 3
    hugepages.Reservation(2 * MIB, 3)
    assert pool.count() == 5


def test_a_pool_that_cannot_grow_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = fake_pool(tmp_path, monkeypatch, 3, 5)
    with pytest.raises(CapabilityMissing, match="5 more huge pages"):
        hugepages.Reservation(2 * MIB, 8)
    assert pool.count() == 3


def test_a_huge_page_size_that_is_not_there_is_told_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pool(tmp_path, monkeypatch, 0, 0)
    with pytest.raises(UsageError, match="there are: 0x200000"):
        hugepages.Reservation(3 * MIB, 1)


def neighbours(region: MemoryRegion) -> float:
    """Share of neighbouring pages that have neighbouring frames; the memory is right besides."""
    made = memory.create(region, PAGE)
    try:
        frames = host.frames(made.hva, region.size, PAGE)
        wanted = FILE_CONTENTS if region.backing is Backing.FILE_PRIVATE else bytes(256)
        assert made.read(0, region.size) == wanted * (region.size // 256)
    except CapabilityMissing as error:
        pytest.skip(str(error))
    finally:
        made.close()
    assert all(frames)
    pairs = itertools.pairwise(frames)
    return sum(other == one + 1 for one, other in pairs) / (len(frames) - 1)


@pytest.mark.parametrize("backing", PLAIN)
def test_scattered_memory_has_hardly_a_neighbour(backing: Backing) -> None:
    region = MemoryRegion(0, 0, 8 * MIB, backing, Resident.WRITE, frames=Frames.SCATTERED)
    assert neighbours(region) < 0.02


def test_the_pages_of_a_scattered_file_are_scattered() -> None:
    region = MemoryRegion(0, 0, 8 * MIB, Backing.FILE_PRIVATE, Resident.READ, frames=Frames.SCATTERED)
    assert neighbours(region) < 0.02


def test_a_file_can_be_mapped_and_does_not_change(tmp_path: Path) -> None:
    path = tmp_path / "contents"
    path.write_bytes(b"a" * PAGE)
    with path.open("rb") as file:
        made = memory.create(MemoryRegion(0, 0, PAGE, Backing.FILE_PRIVATE), PAGE, contents=file.fileno())
    assert made.read(0, 2) == b"aa"
    made.write(0, b"b")
    assert made.read(0, 2) == b"ba"
    made.close()
    assert path.read_bytes() == b"a" * PAGE
