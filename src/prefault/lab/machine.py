# SPDX-License-Identifier: Apache-2.0
"""The lab's machine: an arm64 `virt` board with EL2, emulated by QEMU, as a command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefault.errors import UsageError
from prefault.lab.agent import PORT_NAME

QEMU = "qemu-system-aarch64"
MODES = ("nested", "protected", "nvhe")


@dataclass(frozen=True)
class MachineOptions:
    """What can be asked of the machine.

    With ``icount`` the clock counts instructions, one nanosecond each, and there is one CPU whatever
    ``cpus`` says: QEMU runs its CPUs in turn then, and a second one would only add noise.
    """

    memory_mib: int = 2048
    cpus: int = 2
    mode: str = "nested"
    """KVM's mode, kvm-arm.mode=: one of MODES."""
    icount: bool = False
    lpa2: bool = False
    """52-bit addresses. Closing a nested VM takes 15 s with them under emulation, half a second without."""
    append: tuple[str, ...] = ()
    """Extra kernel arguments."""
    cpu: str = "max"
    mte: bool = False
    qemu: tuple[str, ...] = ()
    """More arguments for QEMU itself."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"no KVM mode {self.mode!r}: use one of {', '.join(MODES)}")
        if not 1 <= self.cpus <= 8:
            raise UsageError(f"{self.cpus} CPUs: the lab's machine has 1 to 8")
        if self.memory_mib < 256:
            raise UsageError(f"{self.memory_mib} MiB of memory: the lab's machine needs at least 256")

    @property
    def usable_cpus(self) -> int:
        """CPUs that the machine will have."""
        return 1 if self.icount else self.cpus


def kernel_arguments(options: MachineOptions) -> str:
    """The kernel's command line.

    loglevel=5 lets warnings reach the console, which is slow: the job port brings the whole log.
    panic=-1 with -no-reboot makes a panic end QEMU at once.
    """
    fixed = (
        "console=ttyAMA0",
        "rdinit=/init",
        "loglevel=5",
        "log_buf_len=4M",
        "panic=-1",
        f"kvm-arm.mode={options.mode}",
    )
    # Where a program's memory lies changes what it costs, by percents.
    same_every_time = ("norandmaps",) if options.icount else ()
    return " ".join((*fixed, *same_every_time, *options.append))


def _board(options: MachineOptions) -> list[str]:
    machine = "virt,virtualization=on,gic-version=3" + (",mte=on" if options.mte else "")
    cpu = options.cpu
    if cpu == "max" and not options.lpa2:
        cpu += ",lpa2=off"
    argv = [QEMU, "-machine", machine, "-cpu", cpu]
    argv += ["-smp", str(options.usable_cpus), "-m", f"{options.memory_mib}M"]
    if options.icount:
        argv += ["-icount", "shift=0,sleep=off"]
    return [*argv, "-nodefaults", "-display", "none", "-no-reboot", *options.qemu]


def _boot(options: MachineOptions, kernel: Path, initrd: Path) -> list[str]:
    return ["-kernel", str(kernel), "-initrd", str(initrd), "-append", kernel_arguments(options)]


def _file(path: Path) -> str:
    return str(path).replace(",", ",,")  # QEMU's way to write a comma inside an option


def job_command(
    options: MachineOptions, kernel: Path, initrd: Path, *, console: Path, port: Path
) -> tuple[str, ...]:
    """QEMU's command line for a job: the console and the job port go to files."""
    devices = ["-chardev", f"file,id=console,path={_file(console)}", "-serial", "chardev:console"]
    devices += ["-device", "virtio-serial-device", "-chardev", f"file,id=job,path={_file(port)}"]
    devices += ["-device", f"virtserialport,chardev=job,name={PORT_NAME}"]
    return (*_board(options), *devices, *_boot(options, kernel, initrd))


def shell_command(options: MachineOptions, kernel: Path, initrd: Path) -> tuple[str, ...]:
    """QEMU's command line for a person at the console; Ctrl-A x ends it."""
    return (*_board(options), "-serial", "mon:stdio", *_boot(options, kernel, initrd))
