# SPDX-License-Identifier: Apache-2.0
"""The target types that a table line may name, by name.

A new target is a module of its own and one line here: docs/extending.md.
"""

from operator import attrgetter
from typing import Final

from nbdtarget.common.named import by_name
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
from nbdtarget.targets.scratch.target import ScratchTarget
from nbdtarget.targets.striped import StripedTarget
from nbdtarget.targets.zero import ZeroTarget

__all__ = ["TARGET_TYPES"]

TARGET_TYPES: Final[dict[str, type[Target]]] = by_name(
    (
        LinearTarget,
        StripedTarget,
        ZeroTarget,
        ErrorTarget,
        DelayTarget,
        FlakeyTarget,
        DustTarget,
        LogWritesTarget,
        PowercutTarget,
        ScratchTarget,
        CloneTarget,
        CacheTarget,
    ),
    attrgetter("type_name"),
)
