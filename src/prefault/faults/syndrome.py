# SPDX-License-Identifier: Apache-2.0
"""What a fault's syndrome says: arm64's ESR_EL2, and x86's error codes and EPT exit qualifications.

Source: Arm ARM (DDI 0487), ESR_EL2, ISS encoding for an exception from a Data Abort and from an
Instruction Abort; Intel SDM volume 3, Exit Qualification for EPT Violations; AMD APM volume 2, Nested Paging
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class Kind(enum.IntEnum):
    """Why an access was not let through."""

    TRANSLATION = 0
    """Nothing was mapped there."""
    PERMISSION = 1
    """Something was, but not for this access."""
    ACCESS_FLAG = 2
    """A mapping that the host marked as old."""
    MMIO = 3
    """A device."""
    OTHER = 4


class Access(enum.IntEnum):
    """What the guest did."""

    READ = 0
    WRITE = 1
    EXECUTE = 2


KINDS = ("translation", "permission", "access flag", "mmio", "other")
ACCESSES = ("read", "write", "execute")

NO_LEVEL = -128

_EC_SHIFT, _EC_MASK = 26, 0x3F
_EC_INSTRUCTION_ABORTS = (0x20, 0x21)
_WNR, _S1PTW, _CACHE_MAINTENANCE = 1 << 6, 1 << 7, 1 << 8
_FSC, _FSC_TRANSLATION_LEVEL_MINUS_1 = 0x3F, 0x2B
_BY_TYPE = {0x04: Kind.TRANSLATION, 0x08: Kind.ACCESS_FLAG, 0x0C: Kind.PERMISSION}

_PRESENT, _WRITE, _RESERVED, _FETCH = 1 << 0, 1 << 1, 1 << 3, 1 << 4
"""Of a page-fault error code."""
_EPT_WRITE, _EPT_FETCH, _EPT_MAPPED, _EPT_ADDRESS_VALID = 1 << 1, 1 << 2, 7 << 3, 1 << 7


@dataclass(frozen=True)
class Meaning:
    """Of many syndromes."""

    kind: npt.NDArray[np.int8]
    access: npt.NDArray[np.int8]
    level: npt.NDArray[np.int8]
    """NO_LEVEL where it is not known."""


def decode(syndromes: npt.NDArray[np.uint64], arm64: npt.NDArray[np.bool_]) -> Meaning:
    """Take syndromes apart; ``arm64`` says which are ESR_EL2."""
    ours, theirs = decode_arm64(syndromes), decode_x86(syndromes)
    return Meaning(
        np.where(arm64, ours.kind, theirs.kind),
        np.where(arm64, ours.access, theirs.access),
        np.where(arm64, ours.level, theirs.level),
    )


def decode_arm64(esr: npt.NDArray[np.uint64]) -> Meaning:
    """ESR_EL2 of an abort from a lower exception level."""
    low = esr.astype(np.int64)
    fsc = low & _FSC
    kind = np.full(len(low), Kind.OTHER, np.int8)
    for code, meaning in _BY_TYPE.items():
        kind[fsc & ~3 == code] = meaning
    level = np.where(kind == Kind.OTHER, NO_LEVEL, fsc & 3)
    minus_1 = fsc == _FSC_TRANSLATION_LEVEL_MINUS_1
    kind[minus_1] = Kind.TRANSLATION
    level[minus_1] = -1
    fetch = np.isin(low >> _EC_SHIFT & _EC_MASK, _EC_INSTRUCTION_ABORTS)
    # A walk of the guest's own tables writes only to set flags in them: kvm_is_write_fault().
    walk = low & _S1PTW != 0
    write = np.where(walk, kind == Kind.PERMISSION, (low & _WNR != 0) & (low & _CACHE_MAINTENANCE == 0))
    return Meaning(kind, _access(write, fetch & ~walk), level.astype(np.int8))


def decode_x86(code: npt.NDArray[np.uint64]) -> Meaning:
    """The ``error_code`` of kvm_page_fault: an exit qualification on Intel, a page-fault error code on AMD.

    An exit qualification has bit 7 (the guest linear address is valid) and nothing above bit 31; an error
    code has no bit 7, and KVM's AMD ones have one of bits 32 and 33.
    """
    low = (code & np.uint64(0xFFFF_FFFF)).astype(np.int64)
    ept = (low & _EPT_ADDRESS_VALID != 0) & (code >> np.uint64(32) == 0)
    kind = np.where(
        ept,
        np.where(low & _EPT_MAPPED != 0, Kind.PERMISSION, Kind.TRANSLATION),
        np.where(low & _PRESENT != 0, Kind.PERMISSION, Kind.TRANSLATION),
    ).astype(np.int8)
    kind[~ept & (low & _RESERVED != 0)] = Kind.MMIO
    write = np.where(ept, low & _EPT_WRITE, low & _WRITE) != 0
    fetch = np.where(ept, low & _EPT_FETCH, low & _FETCH) != 0
    return Meaning(kind, _access(write, fetch), np.full(len(low), NO_LEVEL, np.int8))


def _access(write: npt.NDArray[np.bool_], fetch: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
    return np.where(fetch, Access.EXECUTE, np.where(write, Access.WRITE, Access.READ)).astype(np.int8)
