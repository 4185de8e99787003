# SPDX-License-Identifier: Apache-2.0
"""``prefault probe``: what the KVM of this machine offers."""

from __future__ import annotations

import click

from prefault.cli import output
from prefault.errors import ExitCode
from prefault.kvm.probe import facts
from prefault.report.probe import can_pre_fault, probe_tables

EPILOG = """\b
Examples:
  prefault probe              tables
  prefault probe --json       the same facts for programs

\b
Exit codes: 0 this KVM can pre-fault guest memory; 77 it cannot, or there is none (what is missing is
said)."""


@click.command(epilog=EPILOG)
@output.json_option
def probe() -> None:
    """Say what the KVM of this machine offers: capability by kind of VM, IPA limit, page size, backings.

    Changes nothing and runs on any Linux host, x86 included, also without /dev/kvm.
    """
    found = facts()
    if output.wants_json():
        output.emit("probe", {"facts": found})
    else:
        console = output.stdout()
        for table in probe_tables(found):
            console.print(table)
    for line in found.missing:
        click.echo(f"missing: {line}", err=True)
    if not can_pre_fault(found):
        raise click.exceptions.Exit(ExitCode.MISSING)
