# SPDX-License-Identifier: Apache-2.0
"""``prefault vm`` without a VM: what goes into the lab, what comes out, and what is refused before."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from prefault.cli import vm as command
from prefault.cli.main import main
from prefault.lab.job import Job, JobResult
from prefault.vmm import app, snapshot
from prefault.vmm.order import Boot, Outcome, Why, boot_from, restore_from

from ..vmm.samples import MEMORY, changed_states, with_empty_memory, with_state, written

Fake = Callable[[dict[str, object]], list[Job]]


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "Image"
    path.write_bytes(struct.pack("<8xQQQ24x4s4x", 0, 4096, 0, b"ARM\x64"))
    return str(path)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_cache: Path) -> Fake:
    """A lab that only answers; the jobs that it was given."""

    def plant(answer: dict[str, object], files: dict[str, bytes] | None = None) -> list[Job]:
        jobs: list[Job] = []

        def run(job: Job, *_: object, on_output: Callable[..., None], **__: object) -> JobResult:
            jobs.append(job)
            result = {"/root/vm/result.json": json.dumps(answer).encode(), **(files or {})}
            return JobResult(0, b"", b"", result, "", 1.0, tmp_path)

        monkeypatch.setattr(command, "run_job", run)
        return jobs

    return plant


def outcome(why: Why = Why.SHUTDOWN, **facts: Any) -> dict[str, object]:
    made = Outcome(why)
    for name, value in facts.items():
        setattr(made, name, value)
    return made.to_json()


def order_of(job: Job) -> dict[str, Any]:
    content = job.files["/root/vm/order.json"]
    assert isinstance(content, bytes)
    found = json.loads(content)
    assert isinstance(found, dict)
    return found


def test_the_order_that_goes_into_the_lab_is_what_was_asked_for(image: str, lab: Fake) -> None:
    jobs = lab(outcome())
    asked = ["--vcpus", "3", "--memory", "64M", "--backing", "thp", "--append", "quiet", "--append", "a=b"]
    assert main(["vm", "boot", image, "--machine", "lab", *asked]) == 0
    raw = order_of(jobs[0])
    assert raw.pop("do") == "boot"
    order = boot_from(raw)
    assert (order.guest.vcpus, order.guest.memory, order.guest.backing.value) == (3, 64 << 20, "thp")
    assert order.command_line == "console=ttyAMA0 panic=-1 quiet a=b"
    assert jobs[0].files[order.image] == Path(image).read_bytes()


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (outcome(), 0, ""),
        (outcome(Why.STOPPED), 0, ""),
        (outcome(Why.RESET), 1, "asked for a reset"),
        (outcome(Why.CRASH), 1, "crashed"),
        ({"error": {"type": "KvmError", "message": "KVM_RUN failed", "exit_code": 3}}, 3, "KVM_RUN failed"),
        ({"error": {"type": "CapabilityMissing", "message": "no GICv3", "exit_code": 77}}, 77, "no GICv3"),
    ],
)
def test_how_the_guest_ends_is_the_exit_status(
    image: str,
    lab: Fake,
    capsys: pytest.CaptureFixture[str],
    answer: dict[str, object],
    status: int,
    message: str,
) -> None:
    lab(answer)
    assert main(["vm", "boot", image, "--machine", "lab"]) == status
    assert message in capsys.readouterr().err


def test_a_guest_that_ends_before_it_said_what_was_waited_for_died(
    image: str, lab: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    lab(outcome())
    assert main(["vm", "boot", image, "--machine", "lab", "--stop-when", "ready"]) == 1
    assert "before it said 'ready'" in capsys.readouterr().err


def test_a_snapshot_that_could_not_be_written_is_told_at_the_end(
    image: str, lab: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab(outcome(snapshot={"folder": "/tmp/taken", "error": "No space left on device"}))
    asked = ["--snapshot", str(tmp_path / "warm"), "--snapshot-when", "x"]
    assert main(["vm", "boot", image, "--machine", "lab", *asked]) == 3
    assert "without a snapshot: No space left" in capsys.readouterr().err


def test_a_snapshot_comes_out_of_the_lab(image: str, lab: Any, tmp_path: Path) -> None:
    snapshot.pack(written(tmp_path / "made"), tmp_path / "pack")
    taken = {"folder": "/tmp/taken", "stored": 1}
    lab(outcome(snapshot=taken), {"/tmp/taken.pack": (tmp_path / "pack").read_bytes()})
    asked = ["--snapshot", str(tmp_path / "warm"), "--snapshot-when", "x"]
    assert main(["vm", "boot", image, "--machine", "lab", *asked]) == 0
    assert main(["vm", "show", str(tmp_path / "warm")]) == 0


def test_a_snapshot_goes_into_the_lab(lab: Fake, tmp_path: Path) -> None:
    folder = written(tmp_path / "warm")
    jobs = lab(outcome())
    asked = [
        "--how",
        "userfaultfd",
        "--first",
        "0x40000000+65536",
        "--prefault",
        "all",
        "--backing",
        "shared",
    ]
    assert main(["vm", "restore", str(folder), "--machine", "lab", *asked]) == 0
    raw = order_of(jobs[0])
    assert raw.pop("do") == "restore"
    packed = jobs[0].files[raw.pop("unpack")]
    assert isinstance(packed, bytes)
    assert len(packed) < len(MEMORY)
    order = restore_from(raw)
    assert order.first == ((0x4000_0000, 65536),)
    assert (order.pre_fault, order.pre_fault_all) == ((), True)
    assert order.guest == {"backing": "shared", "resident": "nothing"}


def test_a_damaged_snapshot_is_refused_before_the_lab_is_started(
    lab: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "warm")
    with (folder / "memory").open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"HERE")
    jobs = lab(outcome())
    assert main(["vm", "restore", str(folder), "--machine", "lab"]) == 1
    assert "damaged at byte 0x500000" in capsys.readouterr().err
    assert jobs == []
    assert main(["vm", "show", str(folder)]) == 1


def test_what_the_vmm_in_the_lab_refuses_has_the_name_of_the_snapshot_here(
    lab: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "warm")
    message = "the snapshot /tmp/given cannot be restored: another CPU"
    lab({"error": {"type": "BadSnapshot", "message": message, "exit_code": 1}})
    assert main(["vm", "restore", str(folder), "--machine", "lab"]) == 1
    assert f"the snapshot {folder} cannot be restored: another CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["--snapshot-when", "x"], "needs a folder"),
        (["--stop-after-snapshot"], "needs a folder"),
        (["--snapshot", "."], "there already"),
        (["--snapshot", "none/warm"], "no folder to put a snapshot into"),
        (["--mode", "nvhe"], "add --machine lab"),
        (["--memory", "1536M", "--machine", "lab"], "use --lab-memory 3GiB"),
        (["--memory", "3M"], "at least 16 MiB"),
        (["--el2", "--machine", "lab", "--mode", "nvhe"], "needs --mode nested"),
        (["--initrd", "none"], "does not exist"),
        (["--vcpus", "9"], "1<=x<=8"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    image: str, lab: Fake, capsys: pytest.CaptureFixture[str], asked: list[str], why: str
) -> None:
    jobs = lab(outcome())
    assert main(["vm", "boot", image, *asked]) == 2
    assert why in capsys.readouterr().err
    assert jobs == []


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["--first", "0+1"], "add --how userfaultfd"),
        (["--how", "map", "--backing", "thp"], "leave --backing out"),
        (["--how", "userfaultfd", "--resident", "write"], "leave one out"),
        (["--prefault", "much"], "no range"),
    ],
)
def test_a_restore_that_contradicts_itself_is_refused(
    lab: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], why: str
) -> None:
    folder = written(tmp_path / "warm")
    jobs = lab(outcome())
    assert main(["vm", "restore", str(folder), "--machine", "lab", *asked]) == 2
    assert why in capsys.readouterr().err
    assert jobs == []


def test_json_is_one_object_with_the_console_in_it(
    image: str, lab: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    lab(outcome())
    assert main(["vm", "boot", image, "--machine", "lab", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["command"], found["why"]) == (1, "vm boot", "shutdown")


def test_show_says_what_is_in_a_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", "show", str(written(tmp_path / "warm")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["guest"]["vcpus"] == 2
    assert (found["stored"], found["kernel"], found["registers"]) == (65536, "7.3.4", 3)


@settings(max_examples=100, deadline=None)
@given(body=changed_states())
def test_whatever_is_in_a_state_show_says_whole_or_why_not(
    tmp_path_factory: pytest.TempPathFactory, body: dict[str, Any]
) -> None:
    folder = with_empty_memory(tmp_path_factory.mktemp("snapshots") / "warm")
    assert main(["vm", "show", str(with_state(folder, body))]) in (0, 1)


@pytest.mark.parametrize("command", ["show", "restore"])
@pytest.mark.parametrize("name", ["memory", "state"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    folder = written(tmp_path / "warm")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert main(["vm", command, str(folder)]) == 1
    assert f"its {name} is no regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("added", "why"),
    [("nothing", "the absolute path"), ("a=b", "the absolute path"), ("/a=none", "No such file")],
)
def test_files_that_cannot_be_added_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], added: str, why: str
) -> None:
    target = tmp_path / "guest.cpio"
    assert main(["vm", "initrd", str(target), "--add", added]) == 2
    assert why in capsys.readouterr().err
    assert not target.exists()


def test_on_this_hosts_kvm_the_vmm_runs_here_and_has_the_keyboard(
    image: str, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    def boot(order: Boot, *, out: Callable[[bytes], None], stdin: int) -> Outcome:
        assert order.image == image
        assert isinstance(stdin, int)
        out(b"hello\n")
        return Outcome(
            Why.SHUTDOWN, faults={"read": 1, "write": 2, "execute": 3, "permission": 1}, strays=[16]
        )

    monkeypatch.setattr(app, "boot", boot)
    assert main(["vm", "boot", image]) == 0
    printed = capsysbinary.readouterr()
    assert printed.out == b"hello\n"
    assert b"6 stage-2 faults (1 read, 2 write, 3 execute, 1 permission)" in printed.err
    assert b"at which it has nothing: 0x10" in printed.err
