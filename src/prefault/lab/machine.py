# SPDX-License-Identifier: Apache-2.0
"""The lab's machine, emulated by QEMU, as a command line.

On arm64 a `virt` board with EL2; on x86 a `q35` board with an AMD CPU that has SVM and nested paging.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefault.errors import UsageError
from prefault.lab.agent import PORT_NAME
from prefault.lab.arch import ARM64, Architecture

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
    arch: Architecture = ARM64

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"no KVM mode {self.mode!r}: use one of {', '.join(MODES)}")
        self._refuse_what_only_arm64_has()
        if not 1 <= self.cpus <= 8:
            raise UsageError(f"{self.cpus} CPUs: the lab's machine has 1 to 8")
        if self.memory_mib < 256:
            raise UsageError(f"{self.memory_mib} MiB of memory: the lab's machine needs at least 256")

    def _refuse_what_only_arm64_has(self) -> None:
        if self.arch is ARM64:
            return
        asked = {"a KVM mode": self.mode != MODES[0], "LPA2": self.lpa2, "MTE": self.mte}
        for what, wanted in asked.items():
            if wanted:
                raise UsageError(f"{what} is a matter of arm64, not of {self.arch.name}: leave it out")

    @property
    def usable_cpus(self) -> int:
        """CPUs that the machine will have."""
        return 1 if self.icount else self.cpus


def kernel_arguments(options: MachineOptions) -> str:
    """The kernel's command line.

    loglevel=5 lets warnings reach the console, which is slow: the job port brings the whole log.
    panic=-1 with -no-reboot makes a panic end QEMU at once.
    """
    fixed = (f"console={options.arch.console}", "rdinit=/init", "loglevel=5", "log_buf_len=4M", "panic=-1")
    own = (f"kvm-arm.mode={options.mode}",) if options.arch is ARM64 else _X86_ARGUMENTS
    # Where a program's memory lies changes what it costs, by percents.
    same_every_time: tuple[str, ...] = ("norandmaps",) if options.icount else ()
    if options.icount and options.arch is not ARM64:
        same_every_time += _X86_ICOUNT_ARGUMENTS
    return " ".join((*fixed, *own, *same_every_time, *options.append))


_X86_ARGUMENTS = ("no_timer_check", "tsc=reliable")
"""An emulated timer that comes late is no broken one."""
_X86_ICOUNT_ARGUMENTS = ("nokaslr", "randomize_kstack_offset=off", "tsc_early_khz=1000000")
"""The TSC counts instructions then, one each nanosecond: nothing has to be found out about it."""


def _cpu_and_board(options: MachineOptions) -> tuple[str, str]:
    if options.arch is not ARM64:
        return (f"{options.cpu},+svm,+npt" if options.cpu == "max" else options.cpu), "q35"
    board = "virt,virtualization=on,gic-version=3" + (",mte=on" if options.mte else "")
    return ("max,lpa2=off" if options.cpu == "max" and not options.lpa2 else options.cpu), board


def _board(options: MachineOptions) -> list[str]:
    cpu, board = _cpu_and_board(options)
    argv = [options.arch.qemu, "-machine", board, "-cpu", cpu]
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
    bus = "virtio-serial-device" if options.arch is ARM64 else "virtio-serial-pci"
    devices += ["-device", bus, "-chardev", f"file,id=job,path={_file(port)}"]
    devices += ["-device", f"virtserialport,chardev=job,name={PORT_NAME}"]
    return (*_board(options), *devices, *_boot(options, kernel, initrd))


def shell_command(options: MachineOptions, kernel: Path, initrd: Path) -> tuple[str, ...]:
    """QEMU's command line for a person at the console; Ctrl-A x ends it."""
    return (*_board(options), "-serial", "mon:stdio", *_boot(options, kernel, initrd))
