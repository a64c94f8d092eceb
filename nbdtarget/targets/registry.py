# SPDX-License-Identifier: Apache-2.0
"""The target types that a table line may name, by name.

A new target is a module of its own, a function and one line here: docs/extending.md. Each is imported when a table first names it,
because a cache alone costs as much start time as half of what serves a clone. A server that makes devices while it
serves others imports all of them before (`load_all`), so that no client waits for that.
"""

from operator import attrgetter
from typing import Final

from nbdtarget.common.named import NamedLater
from nbdtarget.targets.base import Target

__all__ = ["TARGET_TYPES", "load_all"]


def _linear() -> type[Target]:
    from nbdtarget.targets.linear import LinearTarget

    return LinearTarget


def _striped() -> type[Target]:
    from nbdtarget.targets.striped import StripedTarget

    return StripedTarget


def _zero() -> type[Target]:
    from nbdtarget.targets.zero import ZeroTarget

    return ZeroTarget


def _error() -> type[Target]:
    from nbdtarget.targets.error import ErrorTarget

    return ErrorTarget


def _delay() -> type[Target]:
    from nbdtarget.targets.delay import DelayTarget

    return DelayTarget


def _flakey() -> type[Target]:
    from nbdtarget.targets.flakey import FlakeyTarget

    return FlakeyTarget


def _dust() -> type[Target]:
    from nbdtarget.targets.dust import DustTarget

    return DustTarget


def _log_writes() -> type[Target]:
    from nbdtarget.targets.log_writes.target import LogWritesTarget

    return LogWritesTarget


def _powercut() -> type[Target]:
    from nbdtarget.targets.powercut.target import PowercutTarget

    return PowercutTarget


def _scratch() -> type[Target]:
    from nbdtarget.targets.scratch.target import ScratchTarget

    return ScratchTarget


def _clone() -> type[Target]:
    from nbdtarget.targets.clone.target import CloneTarget

    return CloneTarget


def _cache() -> type[Target]:
    from nbdtarget.targets.cache.target import CacheTarget

    return CacheTarget


TARGET_TYPES: Final[NamedLater[type[Target]]] = NamedLater(
    {
        "linear": _linear,
        "striped": _striped,
        "zero": _zero,
        "error": _error,
        "delay": _delay,
        "flakey": _flakey,
        "dust": _dust,
        "log-writes": _log_writes,
        "powercut": _powercut,
        "scratch": _scratch,
        "clone": _clone,
        "cache": _cache,
    },
    attrgetter("type_name"),
)


def load_all() -> None:
    """Import every target now."""
    for _ in TARGET_TYPES.values():
        pass
