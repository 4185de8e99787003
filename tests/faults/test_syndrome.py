# SPDX-License-Identifier: Apache-2.0
"""Syndromes mean what the architectures say."""

from __future__ import annotations

import numpy as np
import pytest

from prefault.faults.syndrome import NO_LEVEL, Access, Kind, Meaning, decode_arm64, decode_x86


def one(meaning: Meaning) -> tuple[int, int, int]:
    (kind,), (access,), (level,) = meaning.kind.tolist(), meaning.access.tolist(), meaning.level.tolist()
    return kind, access, level


@pytest.mark.parametrize(
    ("esr", "expected"),
    [
        (0x9200_0004, (Kind.TRANSLATION, Access.READ, 0)),
        (0x9200_0007, (Kind.TRANSLATION, Access.READ, 3)),
        (0x9200_0046, (Kind.TRANSLATION, Access.WRITE, 2)),
        (0x9200_002B, (Kind.TRANSLATION, Access.READ, -1)),
        (0x9200_000B, (Kind.ACCESS_FLAG, Access.READ, 3)),
        (0x9200_004F, (Kind.PERMISSION, Access.WRITE, 3)),
        (0x8200_0007, (Kind.TRANSLATION, Access.EXECUTE, 3)),
        (0x8200_000F, (Kind.PERMISSION, Access.EXECUTE, 3)),
        (0x8200_0047, (Kind.TRANSLATION, Access.EXECUTE, 3)),  # bit 6 is no WnR in an instruction abort
        (0x9200_0147, (Kind.TRANSLATION, Access.READ, 3)),  # cache maintenance
        (0x9200_00C7, (Kind.TRANSLATION, Access.READ, 3)),  # a walk of the guest's tables
        (0x9200_00CF, (Kind.PERMISSION, Access.WRITE, 3)),  # such a walk, setting a flag
        (0x8200_0087, (Kind.TRANSLATION, Access.READ, 3)),
        (0x9200_0010, (Kind.OTHER, Access.READ, NO_LEVEL)),  # external abort
        (0x9200_0003, (Kind.OTHER, Access.READ, NO_LEVEL)),  # address size
    ],
)
def test_esr_el2(esr: int, expected: tuple[int, int, int]) -> None:
    assert one(decode_arm64(np.array([esr], np.uint64))) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0x1_0000_0004, (Kind.TRANSLATION, Access.READ)),  # AMD
        (0x1_0000_0006, (Kind.TRANSLATION, Access.WRITE)),
        (0x1_0000_0014, (Kind.TRANSLATION, Access.EXECUTE)),
        (0x1_0000_0007, (Kind.PERMISSION, Access.WRITE)),
        (0x2_0000_0006, (Kind.TRANSLATION, Access.WRITE)),  # on a walk of the guest's tables
        (0x1_0000_000D, (Kind.MMIO, Access.READ)),  # reserved bit: KVM's mark of MMIO
        (0x181, (Kind.TRANSLATION, Access.READ)),  # Intel
        (0x182, (Kind.TRANSLATION, Access.WRITE)),
        (0x184, (Kind.TRANSLATION, Access.EXECUTE)),
        (0x1AA, (Kind.PERMISSION, Access.WRITE)),
        (0x6, (Kind.TRANSLATION, Access.WRITE)),
    ],
)
def test_x86_codes(code: int, expected: tuple[int, int]) -> None:
    assert one(decode_x86(np.array([code], np.uint64))) == (*expected, NO_LEVEL)
