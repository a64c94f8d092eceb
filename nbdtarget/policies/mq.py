# SPDX-License-Identifier: Apache-2.0
"""mq: another name for smq, kept for old table lines.

mq was the kernel's policy before smq. Its keys are still accepted: they have no effect, are shown as 0, and a
warning says so. Hints belong to a name, so a cache that changes from mq to smq loses them.
"""

from typing import ClassVar, Final

from nbdtarget.policies.base import PolicyConfigError
from nbdtarget.policies.smq.policy import Smq

__all__ = ["Mq"]

KEYS: Final = (
    "random_threshold",
    "sequential_threshold",
    "discard_promote_adjustment",
    "read_promote_adjustment",
    "write_promote_adjustment",
)
_DIGITS_MAX: Final = 20  # of 64 bits


class Mq(Smq):
    """See the module head."""

    name: ClassVar[str] = "mq"

    def set_config_value(self, key: str, value: str) -> str | None:
        if key not in KEYS or not _is_unsigned_long(value):
            raise PolicyConfigError(key, value)
        return (
            f"tunable '{key}' no longer has any effect,"
            " mq policy is now an alias for smq"
        )

    def config_values(self) -> list[tuple[str, str]]:
        return [(key, "0") for key in KEYS]


def _is_unsigned_long(value: str) -> bool:
    if not (value.isascii() and value.isdigit()):
        return False
    digits = value.lstrip("0")
    return len(digits) <= _DIGITS_MAX and int(digits or "0") < 1 << 64
