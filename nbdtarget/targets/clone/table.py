# SPDX-License-Identifier: Apache-2.0
"""The words of a clone's table line, checked in the kernel's order, with its texts.

    <metadata dev> <destination dev> <source dev> <region size>
    [<#feature args> [<feature>]* [<#core args> [<key> <value>]*]]

Pure: devices are opened by the target, between the steps here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nbdtarget.errors import ConstructorError

__all__ = ["Options", "parse_options", "parse_region_size", "parse_uint32"]

SECTOR: Final = 512
ARGUMENTS_MIN: Final = 4
FEATURES_MAX: Final = 2
CORE_ARGUMENTS_MAX: Final = 4
REGION_SECTORS_MIN: Final = 8
REGION_SECTORS_MAX: Final = 2097152
UINT32_MAX: Final = (1 << 32) - 1


@dataclass(slots=True)
class Options:
    """What follows the region size."""

    hydration: bool = True
    discard_passdown: bool = True
    hydration_threshold: int = 1
    hydration_batch_size: int = 1


def parse_uint32(word: str) -> int | None:
    """Parse a base-10 unsigned 32-bit number as the kernel does; None if it is not one."""
    digits = word.removeprefix("+")
    if not (digits.isascii() and digits.isdigit()):
        return None
    number = int(digits)
    return number if number <= UINT32_MAX else None


def parse_region_size(word: str, *, block_size: int) -> int:
    """Return the region size in bytes; `word` gives it in sectors.

    Args:
        block_size: bytes; the region size must be a multiple of it.

    Raises: ConstructorError. A number above 32 bits is refused, where the kernel wraps it.
    """
    sectors = parse_uint32(word)
    if sectors is None or not REGION_SECTORS_MIN <= sectors <= REGION_SECTORS_MAX:
        raise _error("Invalid region size")
    if sectors & (sectors - 1):
        raise _error("Region size is not a power of 2")
    if sectors * SECTOR % block_size:
        raise _error("Region size is not a multiple of device logical block size")
    return sectors * SECTOR


def parse_options(words: Sequence[str]) -> Options:
    """Parse the two optional groups; words after them are ignored, as in the kernel.

    Raises: ConstructorError.
    """
    options = Options()
    features, rest = _group(words, FEATURES_MAX, "Invalid number of feature arguments")
    for word in features:
        match word.lower():
            case "no_hydration":
                options.hydration = False
            case "no_discard_passdown":
                options.discard_passdown = False
            case _:
                raise _error("Invalid feature argument")
    core, _ = _group(rest, CORE_ARGUMENTS_MAX, "Invalid number of core arguments")
    if len(core) % 2:
        raise _error("Number of core arguments must be even")
    for key, value in zip(core[::2], core[1::2], strict=True):
        if key.lower() not in ("hydration_threshold", "hydration_batch_size"):
            raise _error("Invalid core argument")
        number = parse_uint32(value)
        if number is None:
            raise _error(f"Invalid value for argument `{key.lower()}'")
        setattr(options, key.lower(), number)
    return options


def _group(
    words: Sequence[str], count_max: int, message: str
) -> tuple[Sequence[str], Sequence[str]]:
    """Split `words` into the group that its first word counts, and what follows it."""
    if not words:
        return (), ()
    count = parse_uint32(words[0])
    if count is None or count > count_max or count > len(words) - 1:
        raise _error(message)
    return words[1 : 1 + count], words[1 + count :]


def _error(reason: str) -> ConstructorError:
    return ConstructorError(reason, target="clone")
