# SPDX-License-Identifier: Apache-2.0
"""The target types that a table line may name."""

from typing import Final

from nbdtarget.targets.base import Target
from nbdtarget.targets.cache.target import CacheTarget
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget.targets.delay import DelayTarget
from nbdtarget.targets.dust import DustTarget
from nbdtarget.targets.error import ErrorTarget
from nbdtarget.targets.flakey import FlakeyTarget
from nbdtarget.targets.linear import LinearTarget
from nbdtarget.targets.log_writes.target import LogWritesTarget
from nbdtarget.targets.powercut.target import PowercutTarget
from nbdtarget.targets.striped import StripedTarget
from nbdtarget.targets.zero import ZeroTarget

__all__ = ["TARGET_TYPES"]

TARGET_TYPES: Final[dict[str, type[Target]]] = {
    target_type.type_name: target_type
    for target_type in (
        LinearTarget,
        StripedTarget,
        ZeroTarget,
        ErrorTarget,
        DelayTarget,
        FlakeyTarget,
        DustTarget,
        LogWritesTarget,
        PowercutTarget,
        CloneTarget,
        CacheTarget,
    )
}
