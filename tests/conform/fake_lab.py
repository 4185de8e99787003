# SPDX-License-Identifier: Apache-2.0
"""A lab whose kernel is the specification: it answers jobs as ``python3 -m prefault.scenarios`` does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from prefault.errors import LabLost
from prefault.lab.frames import Kind
from prefault.lab.job import Job, JobFile, JobResult
from prefault.lab.machine import MachineOptions
from prefault.scenarios import SCENARIOS, perform
from prefault.scenarios.program import read_programs, scenario
from prefault.spec import Faults, HostConfig, open_spec

FACTS = {
    "page_size": 0x1000,
    "ipa_limit": 48,
    "nested": True,
    "mmio_sign_extends": True,
    "access_flag_by_hardware": True,
    "executable_at_once": True,
    "pre_fault_memory": 1,
    "vm_kinds": [{"name": "default", "creatable": True}, {"name": "protected", "creatable": False}],
    "hugetlb": {"65536": 0, "2097152": 4, "33554432": 0, "1073741824": 0},
}
Line = dict[str, object]


class FakeLab:
    """Stands in for ``run_job``.

    :ivar config: the host that the fake kernel runs on
    :ivar faults: bugs of the fake kernel
    :ivar change: told each line before it goes out, to make a bug of it
    :ivar fatal: scenarios that the machine does not survive
    """

    def __init__(self) -> None:
        self.config = HostConfig()
        self.faults = Faults()
        self.facts: dict[str, object] = dict(FACTS)
        self.change: Callable[[Line], None] = lambda line: None
        self.fatal: set[str] = set()
        self.jobs: list[Job] = []
        self.options: list[MachineOptions] = []
        self.kernels: list[Path | None] = []

    def __call__(
        self,
        job: Job,
        options: MachineOptions,
        *,
        kernel: Path | None,
        on_output: Callable[[Kind, bytes], None],
    ) -> JobResult:
        self.jobs.append(job)
        self.options.append(options)
        self.kernels.append(kernel)
        words = list(job.argv[3:])
        wanted = [SCENARIOS[word] for word in words if word in SCENARIOS]
        if "--programs" in words:
            file = job.files[words[words.index("--programs") + 1]]
            data = file.data if isinstance(file, JobFile) else file
            wanted += [scenario(name, program) for name, program in read_programs(data.decode()).items()]
        on_output(Kind.STDOUT, json.dumps({"facts": self.facts}).encode() + b"\n")
        for one in wanted:
            if one.name in self.fatal:
                raise LabLost("the lab's machine ended before the job reported")
            with open_spec(self.config, self.faults) as kvm:
                line: Line = {**dataclasses.asdict(perform(kvm, one)), "kernel_log": []}
            line = json.loads(json.dumps(line))
            self.change(line)
            text = json.dumps(line).encode() + b"\n"
            # As a pipe would have it: not line by line.
            on_output(Kind.STDOUT, text[:7])
            on_output(Kind.STDOUT, text[7:])
        return JobResult(0, b"", b"", {}, "", 1.0, Path("runs/1"))
