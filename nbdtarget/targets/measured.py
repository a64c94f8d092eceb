# SPDX-License-Identifier: Apache-2.0
"""The measurements of targets, as the kernel's targets make them for its integrity measurement (IMA).

Here is no such measurement: it is what `measure` prints, as dmsetup's, with devices by path.
"""

import re
from collections.abc import Iterable

from nbdtarget.targets.base import Target

__all__ = ["target_attributes", "yes_or_no"]


def target_attributes(target: Target, pairs: Iterable[tuple[str, object]]) -> str:
    """`name=value` of the target's type and version, and of `pairs`, with commas between and a `;` after.

    A backslash stands before what would end a value.
    """
    version = ".".join(map(str, target.version))
    named = [
        ("target_name", target.type_name),
        ("target_version", version),
        *pairs,
    ]
    return ",".join(f"{name}={_escaped(value)}" for name, value in named) + ";"


def yes_or_no(is_so: bool) -> str:
    """Return the word as the kernel writes it."""
    return "y" if is_so else "n"


def _escaped(value: object) -> str:
    return re.sub(r"([\\;=,])", r"\\\1", str(value))
