# SPDX-License-Identifier: Apache-2.0
"""The files: whole, or refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefault.errors import BadSnapshot, PrefaultError, UsageError
from prefault.vmm import snapshot
from prefault.vmm.snapshot import CHUNK, MEMORY, STATE, Snapshot

CHUNKS = 6
CONTENTS = bytearray(CHUNKS * CHUNK + 4096)
CONTENTS[100:103] = b"abc"
CONTENTS[3 * CHUNK :] = bytes(range(1, 256)) * ((len(CONTENTS) - 3 * CHUNK) // 255) + b"z" * (
    (len(CONTENTS) - 3 * CHUNK) % 255
)
SAID = {"guest": {"vcpus": 2}, "text": "naïve"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("snapshots") / "warm"
    snapshot.write(made, SAID, memoryview(CONTENTS))
    return made


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def contents(folder: Path) -> bytes:
    """All of the memory, put together as an eager restore does."""
    source = Snapshot(folder)
    try:
        memory = bytearray(source.size)
        for offset, chunk in source.pieces():
            memory[offset : offset + len(chunk)] = chunk
        return bytes(memory)
    finally:
        source.close()


def whole(folder: Path) -> None:
    """Open and check it.

    :raises BadSnapshot: something is wrong
    """
    source = Snapshot(folder)
    try:
        source.check()
    finally:
        source.close()


def test_what_was_written_is_read(folder: Path) -> None:
    assert contents(folder) == CONTENTS
    source = Snapshot(folder)
    assert {name: source.state[name] for name in SAID} == SAID
    source.close()


def test_what_is_zero_takes_no_room(folder: Path) -> None:
    source = Snapshot(folder)
    assert [one is None for one in source.sums] == [False, True, True, False, False, False, False]
    source.close()
    assert (folder / MEMORY).stat().st_blocks * 512 < len(CONTENTS)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_changed_byte_is_found(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from([STATE, MEMORY]))
    at = data.draw(st.integers(0, path.stat().st_size - 1))
    change = data.draw(st.integers(1, 255))
    before = path.read_bytes()
    try:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([before[at] ^ change]))
        with pytest.raises(BadSnapshot):
            whole(folder)
    finally:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(before[at : at + 1])
    whole(folder)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_missing_end_and_any_longer_one_is_found(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([STATE, MEMORY]))
    text = (folder / name).read_bytes()
    length = data.draw(st.integers(0, len(text) + 100).filter(lambda length: length != len(text)))
    try:
        (folder / name).write_bytes((text + bytes(100))[:length])
        with pytest.raises(BadSnapshot):
            whole(folder)
    finally:
        (folder / name).write_bytes(text)
    whole(folder)


@pytest.mark.parametrize("name", [STATE, MEMORY])
def test_a_missing_file_is_found(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BadSnapshot, match="No such file"):
        whole(copy)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSnapshot, match="No such file"):
        Snapshot(tmp_path / "none")


def rewritten(folder: Path, state: object, version: int = 1) -> Path:
    """The snapshot with another state, whose sum is right."""
    return with_body(folder, json.dumps(state).encode(), version)


def with_body(folder: Path, body: bytes, version: int = 1) -> Path:
    """The snapshot with other bytes in place of its state's JSON, their sum right."""
    head = f"prefault-snapshot {version} {len(body)} {zlib.crc32(body):08x}\n".encode()
    (folder / STATE).write_bytes(head + body)
    return folder


def test_another_version_is_named(copy: Path) -> None:
    with pytest.raises(BadSnapshot, match="version 2, this prefault reads version 1"):
        Snapshot(rewritten(copy, {}, version=2))


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"memory": 1},
        {"memory": {"size": len(CONTENTS), "chunk": CHUNK, "crc32": [None]}},
        {"memory": {"size": CHUNK, "chunk": 4096, "crc32": [None]}},
    ],
)
def test_a_state_that_says_nothing_of_memory_is_refused(copy: Path, state: object) -> None:
    with pytest.raises(BadSnapshot):
        Snapshot(rewritten(copy, state))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff\xfe{}", "can't decode byte 0xff"),
        ("{}".encode("utf-16"), "can't decode"),
        (b"[" * 200_000, "recursion"),
        (b'{"memory": NaN}', "NaN is no number"),
        (b'{"memory": {}, "memory": {}}', "'memory' is there twice"),
        (b'{"memory": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_a_state_that_is_no_json_is_refused(copy: Path, body: bytes, why: str) -> None:
    with pytest.raises(BadSnapshot, match=why):
        Snapshot(with_body(copy, body))


@pytest.mark.parametrize(
    "facts",
    [
        {"size": "Infinity"},
        {"size": 1e400},
        {"size": -CHUNK, "crc32": []},
        {"size": 0, "crc32": []},
        {"size": float(len(CONTENTS))},
        {"size": True},
        {"size": 1 << 200},
        {"chunk": float(CHUNK)},
        {"crc32": {str(number): None for number in range(CHUNKS + 1)}},
        {"crc32": "abcdefg"},
        {"crc32": [1 << 32] * (CHUNKS + 1)},
        {"crc32": [-1] * (CHUNKS + 1)},
        {"crc32": [False] * (CHUNKS + 1)},
    ],
)
def test_memory_of_no_size_or_with_no_sums_is_refused(copy: Path, facts: dict[str, object]) -> None:
    state = json.loads((copy / STATE).read_bytes().partition(b"\n")[2])
    state["memory"] |= facts
    with pytest.raises(BadSnapshot):
        Snapshot(rewritten(copy, state))


@pytest.mark.parametrize("head", [b"1 " + b"9" * 5000, b"9" * 5000 + b" 2", b"1 -2", "1 ٢".encode()])
def test_a_length_or_version_that_is_no_number_is_refused(copy: Path, head: bytes) -> None:
    (copy / STATE).write_bytes(b"prefault-snapshot " + head + b" 00000000\n{}")
    with pytest.raises(BadSnapshot, match="does not begin"):
        Snapshot(copy)


def test_a_state_that_is_larger_than_any_is_not_read(copy: Path) -> None:
    os.truncate(copy / STATE, 1 << 40)
    with pytest.raises(BadSnapshot, match="more than any guest's"):
        Snapshot(copy)


@pytest.mark.parametrize("name", [STATE, MEMORY])
@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "/proc/self/pagemap"])
def test_a_file_that_is_none_is_refused_at_once(copy: Path, name: str, kind: str) -> None:
    (copy / name).unlink()
    if kind == "pipe":
        os.mkfifo(copy / name)
    elif kind == "folder":
        (copy / name).mkdir()
    else:
        (copy / name).symlink_to(kind)
    why = "does not begin|bytes in place of" if kind.startswith("/proc") else f"its {name} is no regular file"
    with pytest.raises(BadSnapshot, match=why):
        Snapshot(copy)


@pytest.mark.parametrize("body", [b"{", b"[" * 200_000, b'{"memory": {"size": 1e400}}', b"{}"])
def test_a_pack_whose_state_is_none_is_refused_and_leaves_nothing_behind(tmp_path: Path, body: bytes) -> None:
    state = f"prefault-snapshot 1 {len(body)} {zlib.crc32(body):08x}\n".encode() + body
    packed = b"prefault-snapshot-pack 1\n" + len(state).to_bytes(8, "little") + state
    with pytest.raises(BadSnapshot):
        snapshot.unpack(packed, tmp_path / "warm")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(folder: Path) -> None:
    before = (folder / STATE).read_bytes()
    with pytest.raises(UsageError, match="there already"):
        snapshot.write(folder, {}, memoryview(CONTENTS))
    assert (folder / STATE).read_bytes() == before


def test_a_folder_for_it_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder to put a snapshot into"):
        snapshot.refuse_existing(tmp_path / "none" / "warm")


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond two chunks."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * CHUNK, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(PrefaultError, match="could not be written: File too large"):
        snapshot.write(tmp_path / "warm", SAID, memoryview(CONTENTS))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, state: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "_write_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        snapshot.write(tmp_path / "warm", SAID, memoryview(CONTENTS))
    assert list(tmp_path.iterdir()) == []


def test_a_packed_snapshot_is_the_same_again(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "pack"
    snapshot.pack(folder, packed)
    assert packed.stat().st_size < len(CONTENTS)
    snapshot.unpack(packed.read_bytes(), tmp_path / "again")
    assert contents(tmp_path / "again") == CONTENTS
    assert (tmp_path / "again" / STATE).read_bytes() == (folder / STATE).read_bytes()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_damaged_pack_is_refused_or_found_out(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("pack")
    snapshot.pack(folder, place / "pack")
    packed = bytearray((place / "pack").read_bytes())
    if data.draw(st.booleans()):
        del packed[data.draw(st.integers(0, len(packed) - 1)) :]
    else:
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadSnapshot):
        snapshot.unpack(bytes(packed), place / "again")
        whole(place / "again")


def test_the_memory_file_can_be_looked_at_in_place(folder: Path) -> None:
    source = Snapshot(folder)
    with snapshot.mapped(source) as (view, address):
        assert bytes(view[100:103]) == b"abc"
        assert address
        source.check_chunk(0, view[:CHUNK])
        with pytest.raises(BadSnapshot, match="damaged at byte 0x10000"):
            source.check_chunk(1, view[:CHUNK])
    source.close()
