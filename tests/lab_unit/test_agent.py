# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from prefault.lab import agent
from prefault.lab.agent import Order, Port, collected, find_port, format_record, run_command
from prefault.lab.frames import Decoder, Frame, Kind


@pytest.fixture(autouse=True)
def _work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "WORK_DIR", str(tmp_path))


def run_here(code: str, heartbeat: float = 60) -> tuple[int, list[Frame]]:
    """Run Python code as the agent would; its status and the frames."""
    order = Order((sys.executable, "-c", code), (), heartbeat)
    reader, writer = os.pipe()
    status = run_command(order, Port(writer))
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        return status, list(Decoder().feed(stream.read()))


def text(frames: list[Frame], kind: Kind) -> bytes:
    return b"".join(frame.payload for frame in frames if frame.kind is kind)


def test_output_and_status_are_reported() -> None:
    status, frames = run_here("import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
    assert (status, text(frames, Kind.STDOUT), text(frames, Kind.STDERR)) == (7, b"out\n", b"err\n")


def test_a_signal_is_a_negative_status() -> None:
    assert run_here("import os; os.kill(os.getpid(), 9)")[0] == -9


def test_a_program_that_is_not_there_is_status_127() -> None:
    reader, writer = os.pipe()
    assert run_command(Order(("/no/such/program",), (), 1), Port(writer)) == 127
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert b"/no/such/program: No such file" in stream.read()


def test_a_silent_job_gives_signs_of_life() -> None:
    _, frames = run_here("import time; time.sleep(0.5)", heartbeat=0.1)
    assert sum(frame.kind is Kind.HEARTBEAT for frame in frames) >= 2


def test_a_job_without_output_streams_is_waited_for() -> None:
    status, _ = run_here("import os, time; os.close(1); os.close(2); time.sleep(0.3); os._exit(5)", 0.1)
    assert status == 5


def test_a_grandchild_that_holds_the_pipe_does_not_hold_the_job() -> None:
    status, _ = run_here("import os, time\nif os.fork() == 0: time.sleep(3)\nelse: os._exit(4)")
    assert status == 4


def test_files_and_folders_are_collected_and_absent_ones_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b").write_bytes(b"data")
    paths = (str(tmp_path / "a"), str(tmp_path / "sub"), str(tmp_path / "none"))
    payloads = [frame.payload for frame in collected(paths)]
    assert payloads == [f"{tmp_path}/a\0".encode(), f"{tmp_path}/sub/b\0data".encode()]


def test_the_port_is_found_by_its_name(tmp_path: Path) -> None:
    for device, name in (("vport0p0", "console"), ("vport0p1", agent.PORT_NAME)):
        (tmp_path / device).mkdir()
        (tmp_path / device / "name").write_text(name + "\n")
    assert find_port(tmp_path) == Path("/dev/vport0p1")
    assert find_port(tmp_path / "vport0p0", wait=0) is None


def test_a_kernel_log_record_reads_as_in_dmesg() -> None:
    record = "6,339,5140900,-;NET: Registered\\x09protocol\n SUBSYSTEM=net\n"
    assert format_record(record) == "[    5.140900] NET: Registered\tprotocol"


def test_a_line_of_a_stack_trace_is_kept() -> None:
    assert (
        format_record("6,339,5140900,-;  kvm_ioctl+0x1/0x2\n DEVICE=+x\n")
        == "[    5.140900]   kvm_ioctl+0x1/0x2"
    )


def test_a_message_of_several_lines_has_the_time_on_each() -> None:
    assert format_record("6,339,5140900,-;one\\x0atwo\n") == "[    5.140900] one\n[    5.140900] two"


def test_an_order_survives_the_way_inside() -> None:
    order = Order(("python3", "-c", "ü\0"), ("/tmp/x",), 1.5)
    assert Order.from_json(order.to_json()) == order
