# SPDX-License-Identifier: Apache-2.0
"""VMSAv8-64 stage-2 descriptors and the shape of the tables that they are in.

Source: Arm ARM (DDI 0487), D8.3 "Translation table descriptor formats";
arch/arm64/include/asm/kvm_pgtable.h
"""

from __future__ import annotations

from dataclasses import dataclass, field

VALID = 1 << 0
TABLE = 1 << 1
"""A table above level 3, a page at level 3; a block has it clear."""
MEMATTR = 0xF << 2
S2AP_R = 1 << 6
S2AP_W = 1 << 7
SH_IS = 3 << 8
AF = 1 << 10
XN = 3 << 53
SW = 0xF << 55
NV_LEVEL = 3 << 56
"""KVM_NV_GUEST_MAP_SZ: in a shadow table, the level of L1's own leaf."""
PERMS = S2AP_R | S2AP_W | XN
LOCKED = 1 << 60
"""KVM_INVALID_PTE_TYPE_LOCKED: an entry between break and make."""

LAST_LEVEL = 3
_NORMAL_FWB = 6 << 2
_NORMAL = 0xF << 2
_DEVICE = 1 << 2


class Prot:
    """enum kvm_pgtable_prot, the part that is no software bit. Plain ints: this is where time goes."""

    NONE = 0
    PX = 1
    UX = 2
    X = 3
    W = 4
    R = 8
    DEVICE = 16


_XN_OF = {Prot.PX | Prot.UX: 0, Prot.UX: 1 << 53, Prot.NONE: 2 << 53, Prot.PX: 3 << 53}
_EXEC_OF = {xn: prot for prot, xn in _XN_OF.items()}


def executable(pte: int) -> int:
    """Who may execute through a leaf. Mirrors: kvm_pgtable_stage2_pte_prot()"""
    return _EXEC_OF[pte & XN]


def xn(prot: int) -> int:
    """Mirrors: stage2_set_xn_attr()"""
    return _XN_OF[prot & Prot.X]


@dataclass(frozen=True)
class Granule:
    """The translation granule, and whether descriptors have the LPA2 format.

    :ivar page_shift: 12, 14 or 16
    """

    page_shift: int = 12
    lpa2: bool = False
    fwb: bool = True
    stride: int = field(init=False)
    mask: int = field(init=False)
    """Number of entries of a table, minus 1."""
    page_size: int = field(init=False)
    """Bytes of a page, and of a table."""
    _sizes: list[int] = field(init=False, compare=False, repr=False)
    """By level, -1 last."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", self.page_shift - 3)
        object.__setattr__(self, "mask", (1 << self.stride) - 1)
        object.__setattr__(self, "page_size", 1 << self.page_shift)
        object.__setattr__(self, "_sizes", [1 << self.shift(level) for level in (*range(LAST_LEVEL + 1), -1)])

    @property
    def min_block_level(self) -> int:
        """KVM_PGTABLE_MIN_BLOCK_LEVEL."""
        return 1 if self.page_shift == 12 else 2

    def shift(self, level: int) -> int:
        """Mirrors: kvm_granule_shift()"""
        return self.page_shift + (LAST_LEVEL - level) * self.stride

    def size(self, level: int) -> int:
        """Bytes that an entry of a level spans. Mirrors: kvm_granule_size()"""
        return self._sizes[level]

    def level_of(self, size: int) -> int:
        """The level whose leaves have a size."""
        return LAST_LEVEL - (size.bit_length() - 1 - self.page_shift) // self.stride

    def start_level(self, ia_bits: int) -> int:
        """Where the walk begins, with up to 16 concatenated tables. Mirrors: kvm_get_vtcr()"""
        levels = (ia_bits - 4 - 4) // (self.page_shift - 3)
        return LAST_LEVEL + 1 - max(levels, 2)

    def to_phys(self, pte: int) -> int:
        """Mirrors: kvm_pte_to_phys()"""
        if self.lpa2:
            return (pte & ((1 << 50) - (1 << self.page_shift))) | (pte >> 8 & 3) << 50
        pa = pte & ((1 << 48) - (1 << self.page_shift))
        return pa | (pte >> 12 & 0xF) << 48 if self.page_shift == 16 else pa

    def to_pte(self, pa: int) -> int:
        """Mirrors: kvm_phys_to_pte()"""
        if self.lpa2:
            return (pa & ((1 << 50) - (1 << self.page_shift))) | (pa >> 50 & 3) << 8
        pte = pa & ((1 << 48) - (1 << self.page_shift))
        return pte | (pa >> 48 & 0xF) << 12 if self.page_shift == 16 else pte

    def attributes(self, prot: int) -> int:
        """All of a leaf but its address and type. Mirrors: stage2_set_prot_attr()"""
        attr = xn(prot) | AF | prot & SW
        attr |= _DEVICE if prot & Prot.DEVICE else _NORMAL_FWB if self.fwb else _NORMAL
        attr |= S2AP_R if prot & Prot.R else 0
        attr |= S2AP_W if prot & Prot.W else 0
        return attr if self.lpa2 else attr | SH_IS

    def leaf(self, pa: int, attr: int, level: int) -> int:
        """Mirrors: kvm_init_valid_leaf_pte()"""
        return self.to_pte(pa) | attr | VALID | (TABLE if level == LAST_LEVEL else 0)
