# SPDX-License-Identifier: Apache-2.0
"""Stage-2 tables as KVM prints them in debugfs (CONFIG_PTDUMP_STAGE2_DEBUGFS).

Source: arch/arm64/kvm/ptdump.c, arch/arm64/mm/ptdump.c
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from prefault.errors import CapabilityMissing
from prefault.machine import Leaf

DEBUGFS_KVM = Path("/sys/kernel/debug/kvm")

_LINE = re.compile(r"^0x([0-9a-f]+)-0x([0-9a-f]+)\s+\d+[KMGTPE] (\d)(.*)$", re.MULTILINE)
_IN_USE = "VTCR:"


def parse(text: str) -> list[Leaf]:
    """Leaves, adjacent equal ones as one, from what ``stage2_page_tables`` says."""
    leaves = []
    for start, end, level, attributes in _LINE.findall(text):
        words = attributes.split()
        # A hole has no words; an entry that is not valid but not 0 either has an F.
        if words and "F" not in words:
            leaves.append(_leaf(int(start, 16), int(end, 16), int(level), words))
    return merge(leaves)


def _leaf(start: int, end: int, level: int, words: list[str]) -> Leaf:
    return Leaf(
        ipa=start,
        size=end - start,
        level=level,
        readable="R" in words,
        writable="W" in words,
        px="px" in words,
        ux="ux" in words or "PXNux" in words,
        accessed="AF" in words,
        block="BLK" in words,
    )


def merge(leaves: Iterable[Leaf]) -> list[Leaf]:
    """Join neighbours that differ in nothing but their place."""
    merged: list[Leaf] = []
    for leaf in leaves:
        last = merged[-1] if merged else None
        if last and last.ipa + last.size == leaf.ipa:
            grown = dataclasses.replace(last, size=last.size + leaf.size)
            if dataclasses.replace(leaf, ipa=last.ipa, size=grown.size) == grown:
                merged[-1] = grown
                continue
        merged.append(leaf)
    return merged


def canonical(vm_folder: Path) -> list[Leaf]:
    """Leaves of a VM's own table."""
    return parse(_read(vm_folder / "stage2_page_tables"))


def shadows(vm_folder: Path) -> list[list[Leaf]]:
    """Leaves of every shadow table that is in use, by index."""
    files = sorted((vm_folder / "nested").glob("nested_mmu*"), key=_shadow_index)
    texts = [_read_shadow(file) for file in files]
    return [parse(text) for text in texts if _IN_USE in text]


def _shadow_index(file: Path) -> int:
    return int(file.name.removeprefix("nested_mmu"))


def _read_shadow(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""  # The MMU exists, but has no table yet.


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise CapabilityMissing(
            f"stage-2 tables cannot be read from {file}: {error.strerror}; they need root, a mounted "
            "debugfs, CONFIG_PTDUMP_STAGE2_DEBUGFS, and a kernel that is not in protected mode"
        ) from error
