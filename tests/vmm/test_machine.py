# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import cast

import pytest

from prefault.errors import CapabilityMissing
from prefault.kvm.system import Kvm
from prefault.vmm.config import GuestConfig
from prefault.vmm.machine import Machine


class NoGic:
    """A KVM whose host has a GICv2."""

    def create_vm(self, config: object) -> None:
        raise CapabilityMissing("KVM_CREATE_DEVICE failed: ENODEV")


def test_a_host_without_gicv3_is_told_what_to_do() -> None:
    with pytest.raises(CapabilityMissing, match=r"no GICv3 for guests.*--machine lab"):
        Machine(cast(Kvm, NoGic()), GuestConfig(), lambda piece: None)
