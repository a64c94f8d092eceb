# SPDX-License-Identifier: Apache-2.0
"""The words of a cache's table line, checked in the kernel's order, with its texts.

    <metadata dev> <cache dev> <origin dev> <block size>
    <#feature args> [<feature>]*
    <policy> <#policy args> [<key> <value>]*

    feature                     what it does
    writeback                   writes to cached blocks stay in the cache for a while (default)
    writethrough                they go to both devices
    passthrough                 they go to the origin, and the cached block is given up
    metadata2                   dirty bits apart from the mappings: shown as given, and always so here
    no_discard_passdown         discards end here
    dirty_log               *   after a crash only those blocks are dirty that may be
    sorted_writeback        *   an idle cache writes back in the order of the origin

    key                         value                                    default   as a message
    migration_threshold         sectors that migrations may have         2048      the same words
                                under way
    migration_rate          *   bytes a second that migrations may       0         the same words
                                copy, also written as 10M; 0: no
                                bound
    any other                   is the policy's                                    the same words

`*`: not in the kernel; without these words a cache does what the kernel's does, and its status
line reads the same. Features and the keys above are the same in upper case, policies are not. A
feature may be repeated, but for the three modes. As in the kernel there may be 3 features, repeated ones
included; those with a `*` are not counted. The last value of a key wins. Words after the
policy's are ignored. Numbers have 64 bits.

The message `flush_origin` (*) flushes the origin, and fails if that fails; in every mode, and
nothing else happens.

Messages name blocks by ranges: `<n>`, or `<begin>-<end>` without the end.

Pure: devices are opened by the constructor, between the steps here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.common.units import SECTOR, SIZE_MAX
from nbdtarget.policies.base import PolicyConfigError
from nbdtarget.policies.registry import UnknownPolicyError, policy_type
from nbdtarget.targets.arguments import (
    RATES,
    UINT64_MAX,
    parse_rate,
    parse_uint,
    read_group,
)
from nbdtarget_metadata.units import BLOCK_SIZE_MAX, BLOCK_SIZE_MIN

__all__ = [
    "ARGUMENTS_MIN",
    "BAD_FEATURE_COUNT",
    "CORE_KEYS",
    "MESSAGES",
    "PASSTHROUGH",
    "WRITEBACK",
    "WRITETHROUGH",
    "Options",
    "check_words",
    "parse_block_size",
    "parse_core_value",
    "parse_options",
    "parse_ranges",
]

WRITEBACK: Final = "writeback"
WRITETHROUGH: Final = "writethrough"
PASSTHROUGH: Final = "passthrough"

ARGUMENTS_MIN: Final = 6  # up to the name of the policy
BLOCK_SECTORS_MIN: Final = BLOCK_SIZE_MIN // SECTOR
BLOCK_SECTORS_MAX: Final = BLOCK_SIZE_MAX // SECTOR
FEATURES_MAX: Final = 3
FEATURES: Final = (
    WRITEBACK,
    WRITETHROUGH,
    PASSTHROUGH,
    "metadata2",
    "no_discard_passdown",
    "dirty_log",
    "sorted_writeback",
)
OUR_FEATURES: Final = ("dirty_log", "sorted_writeback")  # the kernel does not know them
POLICY_ARGUMENTS_MAX: Final = 1024
BLOCK_SIZES: Final = (
    "a number of sectors of 512 bytes: a multiple of 64 (32 KiB) up to 2097152 (1 GiB)"
)

# Keys that are ours and not the policy's; each is a field of `Options`.
CORE_KEYS: Final = ("migration_threshold", "migration_rate")

# BLOCKS counts in blocks of the cache's block size, from 0: N is one block, BEGIN-END ends before END.
MESSAGES: Final = MappingProxyType(
    {
        "migration_threshold SECTORS": "Set how much migrations may have under way.",
        "migration_rate BYTES": "Set how much migrations may copy a second, for example 10M; 0 sets no bound.",
        "clean_now": "Write every dirty block back now, in the order of the origin.",
        "warm BLOCKS...": "Copy these blocks of the origin into the cache.",
        "pin BLOCKS...": "Copy these blocks of the origin into the cache, and keep them there.",
        "unpin BLOCKS...": "Allow these blocks of the origin to leave the cache again.",
        "invalidate_all": "Drop every clean block, because the origin was changed without the cache.",
        "invalidate_cblocks [BLOCKS...]": "Drop these blocks of the cache; only in passthrough mode.",
        "flush_origin": "Flush the origin, and fail if it fails.",
    }
)

BAD_FEATURE_COUNT: Final = "Invalid number of cache feature arguments"
_INSUFFICIENT: Final = "Insufficient args"
_BAD_CONFIG: Final = "Error setting cache policy's config values"


@dataclass(slots=True)
class Options:
    """The words of a table line behind the block size.

    Attributes:
        mode: one of the three.
        policy_name: as it was typed.
        migration_threshold: sectors. migration_rate: bytes a second.
        policy_config: the pairs that are for the policy to judge.
    """

    mode: str = WRITEBACK
    metadata2: bool = False
    discard_passdown: bool = True
    dirty_log: bool = False
    sorted_writeback: bool = False
    policy_name: str = "default"
    migration_threshold: int = 2048
    migration_rate: int = 0
    policy_config: list[tuple[str, str]] = field(default_factory=list)


def parse_block_size(word: str, *, cache_size: int) -> int:
    """Return the block size in bytes; `word` gives it in sectors.

    Args:
        cache_size: bytes of the cache device, which must hold one block.

    Raises: ConstructorError.
    """
    sectors = parse_uint(word, BLOCK_SECTORS_MAX, plus=True)
    if sectors is None or sectors < BLOCK_SECTORS_MIN or sectors % BLOCK_SECTORS_MIN:
        raise _error("Invalid data block size", f"`{word}' is not {BLOCK_SIZES}")
    if sectors * SECTOR > cache_size:
        raise _error(
            "Data block size is larger than the cache device",
            f"{sectors * SECTOR} bytes, and the device has {cache_size}",
        )
    return sectors * SECTOR


def parse_options(words: Sequence[str]) -> Options:
    """Parse what follows the block size.

    The policy checks its own pairs when it is made.

    Raises: ConstructorError.
    """
    options = Options()
    features, rest = read_group(words, len(words), BAD_FEATURE_COUNT, "cache")
    nr_ours = sum(word.lower() in OUR_FEATURES for word in features)
    if len(features) > FEATURES_MAX + nr_ours:
        raise _error(BAD_FEATURE_COUNT)
    _parse_features(options, features)
    if not rest:
        raise _error(_INSUFFICIENT)
    options.policy_name = rest[0]
    reason = "Invalid number of policy arguments"
    pairs, _ = read_group(rest[1:], POLICY_ARGUMENTS_MAX, reason, "cache")
    try:
        policy_type(options.policy_name)
    except UnknownPolicyError as error:
        raise _error(f"Error creating cache's policy: {error}") from error
    if len(pairs) % 2:
        raise _error(f"{_BAD_CONFIG}: they must be pairs of a key and a value")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        name = key.lower()
        if name not in CORE_KEYS:
            options.policy_config.append((key, value))
            continue
        try:
            setattr(options, name, parse_core_value(name, value))
        except TableError as error:
            raise _error(f"{_BAD_CONFIG}: {error}") from error
    return options


def parse_core_value(key: str, value: str) -> int:
    """Return the value of one of CORE_KEYS. Raises: TableError, with the kernel's text."""
    number = parse_uint(value, UINT64_MAX, plus=True)
    if number is None and key.lower() == "migration_rate":
        number = parse_rate(value)  # ours: it may be written as a size too
    if number is None:
        wanted = RATES if key.lower() == "migration_rate" else "a number of sectors"
        raise TableError(str(PolicyConfigError(key, value)), hint=f"not {wanted}")
    return number


def parse_ranges(
    words: Sequence[str], size: int, noun: str = "cblock"
) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) for each word: `<n>` or `<begin>-<end>`, of blocks below `size`.

    One at a time: what was yielded before a bad one may have been carried out.

    Raises: TableError. A number above 64 bits is refused, where the kernel wraps it at 32.
    """
    for word in words:
        first, dash, last = word.partition("-")
        begin = parse_uint(first, UINT64_MAX)
        end = parse_uint(last, UINT64_MAX) if dash else begin
        if begin is None or end is None:
            raise TableError(f"invalid {noun} range '{word}'")
        if not dash:
            end = begin + 1
        if begin >= size:
            raise TableError(f"begin {noun} out of range: {begin} >= {size}")
        if end > size:
            raise TableError(f"end {noun} out of range: {end} > {size}")
        if begin >= end:
            raise TableError(f"invalid {noun} range: {begin} >= {end}")
        yield begin, end


def _parse_features(options: Options, words: Sequence[str]) -> None:
    modes = []
    for word in words:
        match name := word.lower():
            case "writeback" | "writethrough" | "passthrough":
                modes.append(name)
            case "metadata2":
                options.metadata2 = True
            case "no_discard_passdown":
                options.discard_passdown = False
            case "dirty_log":
                options.dirty_log = True
            case "sorted_writeback":
                options.sorted_writeback = True
            case _:
                raise _error(
                    "Unrecognised cache feature requested",
                    f"`{word}' is none of {', '.join(FEATURES)}",
                )
    if len(modes) > 1:
        raise _error(
            "Duplicate cache io_mode features requested",
            f"{' and '.join(modes)} exclude each other",
        )
    if modes:
        options.mode = modes[0]


def check_words(words: Sequence[str]) -> None:
    """Refuse a table line that no device could make right. Raises: ConstructorError."""
    if len(words) < ARGUMENTS_MIN:
        raise _error(_INSUFFICIENT)
    # The size of the cache device is not known yet.
    parse_block_size(words[3], cache_size=SIZE_MAX)
    parse_options(words[4:])


def _error(reason: str, hint: str = "") -> ConstructorError:
    return ConstructorError(reason, target="cache", hint=hint)
