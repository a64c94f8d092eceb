# SPDX-License-Identifier: Apache-2.0
"""The words of a clone's table line, checked in the kernel's order, with its texts.

    <metadata dev> <destination dev> <source dev> <region size>
    [<#feature args> [<feature>]* [<#core args> [<key> <value>]*]]

    feature                     what it does                               as a message
    no_hydration                the background copies nothing              disable_hydration,
                                                                           enable_hydration
    no_discard_passdown         discards end here                          -
    hydrate_on_read         *   regions that are read from the source      enable_hydrate_on_read,
                                are copied before others                   disable_hydrate_on_read
    then_linear             *   when all is hydrated, `linear` takes the   then_linear,
                                clone's place in the table                 disable_then_linear

    key                         value                            default   as a message
    hydration_threshold         regions copied at a time         1         the same words
    hydration_batch_size        regions copied in one go         1         the same words
    hydration_rate          *   bytes a second that the back-    0         the same words
                                ground copies, also written as
                                10M; 0: no bound
    event_after_errors      *   failed copies before one is an   1         the same words
                                event; 0: they never are

`*`: not in the kernel; without these words a clone does what the kernel's does, and its status
line reads the same. The kernel bounds how many features (2) and core arguments (4 words) there may be,
repeated ones included; so do we, but do not count our own words. Words are the same in upper case; what is repeated counts once, the last value of a
key wins. Numbers have 32 bits, the rate has 64.

Pure: devices are opened by the target, between the steps here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from nbdtarget.common.errors import ConstructorError
from nbdtarget.common.units import SECTOR
from nbdtarget.targets.arguments import (
    RATES,
    UINT32_MAX,
    UINT64_MAX,
    parse_rate,
    parse_uint,
    parse_uint32,
    read_group,
)
from nbdtarget_metadata.units import REGION_SIZE_MAX, REGION_SIZE_MIN

__all__ = [
    "MESSAGES",
    "NUMBERS",
    "Options",
    "check_words",
    "describe_value",
    "parse_options",
    "parse_region_size",
    "parse_value",
]

ARGUMENTS_MIN: Final = 4
FEATURES_MAX: Final = 2
CORE_ARGUMENTS_MAX: Final = 4
REGION_SECTORS_MIN: Final = REGION_SIZE_MIN // SECTOR
REGION_SECTORS_MAX: Final = REGION_SIZE_MAX // SECTOR

# The largest value of each core argument, and of the message of that name.
NUMBERS: Final = {
    "hydration_threshold": UINT32_MAX,
    "hydration_batch_size": UINT32_MAX,
    "hydration_rate": UINT64_MAX,
    "event_after_errors": UINT32_MAX,
}


FEATURES: Final = (
    "no_hydration",
    "no_discard_passdown",
    "hydrate_on_read",
    "then_linear",
)
REGION_SIZES: Final = (
    "a number of sectors of 512 bytes: a power of two from 8 (4 KiB) to 2097152 (1 GiB)"
)

MESSAGES: Final = MappingProxyType(
    {
        "enable_hydration": "Start copying in the background.",
        "disable_hydration": "Stop copying in the background.",
        "hydration_threshold REGIONS": "Set how many regions are copied at a time.",
        "hydration_batch_size REGIONS": "Set how many regions are copied in one go.",
        "hydration_rate BYTES": "Set how much the background copies a second, for example 10M; 0 sets no bound.",
        "event_after_errors NUMBER": "Set how many failed copies raise one event; 0 raises none.",
        "enable_hydrate_on_read": "Copy regions that clients read before the others.",
        "disable_hydrate_on_read": "Copy all regions in order.",
        "source_url URL": "Read the same source by another URL from now on, for example under a new signature.",
        "then_linear": "Let a linear target take the clone's place when all is copied.",
        "disable_then_linear": "Keep the clone when all is copied.",
    }
)

# Those of the words above that the kernel does not know.
OUR_FEATURES: Final = ("hydrate_on_read", "then_linear")
OUR_KEYS: Final = ("hydration_rate", "event_after_errors")


@dataclass(slots=True)
class Options:
    """The words of a table line behind the region size."""

    hydration: bool = True
    discard_passdown: bool = True
    hydration_threshold: int = 1
    hydration_batch_size: int = 1
    hydrate_on_read: bool = False
    then_linear: bool = False
    hydration_rate: int = 0
    event_after_errors: int = 1


def parse_value(key: str, word: str) -> int | None:
    """Parse the value of one of NUMBERS; None if it is not one.

    A rate, which is ours, may be written as a size too, for example 10M.
    """
    number = parse_uint(word, NUMBERS[key], plus=True)
    if number is None and key == "hydration_rate":
        number = parse_rate(word)
    return number


def describe_value(key: str, word: str) -> str:
    """Say why `word` is no value of one of NUMBERS."""
    wanted = {
        "hydration_threshold": "a number of regions",
        "hydration_batch_size": "a number of regions",
        "hydration_rate": RATES,
        "event_after_errors": "a number of failed copies",
    }
    return f"`{word}' is not {wanted[key]}"


def parse_region_size(word: str, *, block_size: int) -> int:
    """Return the region size in bytes; `word` gives it in sectors.

    Args:
        block_size: bytes; the region size must be a multiple of it.

    Raises: ConstructorError. A number above 32 bits is refused, where the kernel wraps it.
    """
    sectors = parse_uint32(word)
    if sectors is None or not REGION_SECTORS_MIN <= sectors <= REGION_SECTORS_MAX:
        raise _error("Invalid region size", f"`{word}' is not {REGION_SIZES}")
    if sectors & (sectors - 1):
        raise _error(
            "Region size is not a power of 2", f"`{word}' is not {REGION_SIZES}"
        )
    if sectors * SECTOR % block_size:
        raise _error(
            "Region size is not a multiple of device logical block size",
            f"{sectors * SECTOR} bytes, and the blocks have {block_size}",
        )
    return sectors * SECTOR


def parse_options(words: Sequence[str]) -> Options:
    """Parse the two optional groups; words after them are ignored, as in the kernel.

    Raises: ConstructorError.
    """
    options = Options()
    if not words:
        return options
    reason = "Invalid number of feature arguments"
    features, rest = read_group(words, len(words), reason, "clone")
    nr_ours = sum(word.lower() in OUR_FEATURES for word in features)
    if len(features) > FEATURES_MAX + nr_ours:
        raise _error(reason)
    for word in features:
        match word.lower():
            case "no_hydration":
                options.hydration = False
            case "no_discard_passdown":
                options.discard_passdown = False
            case "hydrate_on_read":
                options.hydrate_on_read = True
            case "then_linear":
                options.then_linear = True
            case _:
                raise _error(
                    "Invalid feature argument",
                    f"`{word}' is none of {', '.join(FEATURES)}",
                )
    if not rest:
        return options
    reason = "Invalid number of core arguments"
    core, _ = read_group(rest, len(rest), reason, "clone")
    nr_ours = 2 * sum(key.lower() in OUR_KEYS for key in core[::2])
    if len(core) > CORE_ARGUMENTS_MAX + nr_ours:
        raise _error(reason)
    if len(core) % 2:
        raise _error("Number of core arguments must be even")
    for key, value in zip(core[::2], core[1::2], strict=True):
        name = key.lower()
        if name not in NUMBERS:
            raise _error(
                "Invalid core argument",
                f"`{key}' is none of {', '.join(NUMBERS)}",
            )
        number = parse_value(name, value)
        if number is None:
            raise _error(
                f"Invalid value for argument `{name}'", describe_value(name, value)
            )
        setattr(options, name, number)
    return options


def check_words(words: Sequence[str]) -> None:
    """Refuse a table line that no device could make right. Raises: ConstructorError."""
    if len(words) < ARGUMENTS_MIN:
        raise _error("Invalid number of arguments")
    # The logical block size of the devices is not known yet; it is a sector at least.
    parse_region_size(words[3], block_size=SECTOR)
    parse_options(words[4:])


def _error(reason: str, hint: str = "") -> ConstructorError:
    return ConstructorError(reason, target="clone", hint=hint)
