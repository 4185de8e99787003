# SPDX-License-Identifier: Apache-2.0
"""What ``prefault probe`` found, as tables."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from prefault.kvm.probe import Facts, VmKind
from prefault.report.units import format_size


def probe_tables(found: Facts) -> list[Table]:
    """One table for the host, and one for the kinds of VM if KVM is there."""
    tables = [_rows("this host", _host(found))]
    if found.kvm:
        tables += [_rows("KVM", _kvm(found)), _vm_kinds(found.vm_kinds)]
    return tables


def can_pre_fault(found: Facts) -> bool:
    """Whether any kind of VM here reports KVM_CAP_PRE_FAULT_MEMORY."""
    return any(kind.pre_fault_memory for kind in found.vm_kinds)


def _host(found: Facts) -> list[tuple[str, Text]]:
    hugetlb = ", ".join(f"{format_size(size)}: {free} free" for size, free in sorted(found.hugetlb.items()))
    thp = f"{found.thp}, {format_size(found.thp_size)}" if found.thp else ""
    return [
        ("machine", Text(f"{found.machine}, Linux {found.kernel}")),
        ("page size", Text(format_size(found.page_size))),
        ("/dev/kvm", _yes(found.kvm)),
        ("memfd", _yes(found.memfd)),
        ("transparent huge pages", Text(thp) if thp else _yes(False)),
        ("hugetlb pages", Text(hugetlb) if hugetlb else _yes(False)),
        ("userfaultfd", _yes(found.userfaultfd)),
        ("stage-2 faults can be counted", _yes(found.fault_tracing)),
    ]


def _kvm(found: Facts) -> list[tuple[str, Text]]:
    nested = "E2H 0 and 1" if found.nested_e2h0 else "E2H 1"
    return [
        ("KVM_CAP_PRE_FAULT_MEMORY", _yes(bool(found.pre_fault_memory))),
        ("arm64 guests", _yes(found.guests)),
        ("IPA limit", Text(f"{found.ipa_limit} bits" if found.ipa_limit else "not reported")),
        ("nested guests", Text(f"yes, {nested}", style="green") if found.nested else _yes(False)),
        ("stage-2 tables in debugfs", _yes(found.stage2_tables)),
    ]


def _vm_kinds(kinds: tuple[VmKind, ...]) -> Table:
    table = Table(title="kinds of VM", title_justify="left", title_style="bold")
    for heading in ("VM", "can be created", "pre-fault", "guest_memfd", "vCPUs"):
        table.add_column(heading)
    for kind in kinds:
        if not kind.creatable:
            table.add_row(kind.name, Text(f"no: {kind.why_not}", style="yellow"))
            continue
        memfd = Text(f"yes, flags {kind.guest_memfd_flags:#x}") if kind.guest_memfd else _yes(False)
        table.add_row(
            kind.name, _yes(True), _yes(bool(kind.pre_fault_memory)), memfd, Text(f"up to {kind.max_vcpus}")
        )
    return table


def _rows(title: str, rows: list[tuple[str, Text]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    return table


def _yes(there: bool) -> Text:
    return Text("yes", style="green") if there else Text("no", style="yellow")
