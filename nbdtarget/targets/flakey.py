# SPDX-License-Identifier: Apache-2.0
"""The `flakey` target: `linear`, but now and then it fails.

    <dev> <offset> <up interval> <down interval> [<#feature args> [<arg>]*]

Theory of operation. From the moment the table is loaded, the device is up for the first interval, down
for the second, and so on; intervals are whole seconds. Up, it is `linear`. Down:

    feature                                   reads        writes, zeroing, discards, FLUSH
    none (= error_reads error_writes)         EIO          EIO
    error_reads                               EIO          pass
    drop_writes                               pass         end with 0, are forgotten
    error_writes                              pass         EIO
    corrupt_bio_byte <n> r|w <value> <flags>  byte n is replaced by the value, in bios of that
                                              direction that have these flags
    random_read_corrupt <p>,                  a random byte becomes a random value, in p of
    random_write_corrupt <p>                  1 000 000 000 bios with data

The time at which a bio comes decides, not the time at which it ends. A write is corrupted in a copy: the
client's own buffer is never touched. Byte 1 is the first of a bio; a shorter bio stays as it is.

Flags are the kernel's `bio->bi_opf`, as far as a bio here has any: the operation (read 0,
write 1) and REQ_FUA (131072). A mask that asks for another flag (REQ_META) never matches:
NBD does not tell what a write is for.

With a feature that corrupts writes, WRITE_ZEROES arrive as writes of zeroes, as in the kernel.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from nbdtarget.bio import FUA, OP_CACHE, OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import ConstructorError
from nbdtarget.targets.arguments import (
    UINT32_MAX,
    Run,
    Runs,
    parse_sectors,
    read_argument,
)
from nbdtarget.targets.base import KILL, REMAPPED, SUBMITTED, TargetContext
from nbdtarget.targets.run import RunTarget

__all__ = ["FlakeyTarget"]

PROBABILITY_BASE: Final = 1_000_000_000
FEATURE_WORDS_MAX: Final = 11
_SECOND_NS: Final = 1_000_000_000
_OPF_WRITE: Final = 1
_OPF_FUA: Final = 1 << 17


@dataclass(slots=True)
class Features:
    """The faults while the device is down. `corrupt_byte` counts from 1; 0 is off."""

    error_reads: bool = False
    drop_writes: bool = False
    error_writes: bool = False
    corrupt_byte: int = 0
    corrupt_direction: str = "r"
    corrupt_value: int = 0
    corrupt_flags: int = 0
    random_read: int = 0
    random_write: int = 0

    @property
    def corrupts_reads(self) -> bool:
        return bool(self._byte_of("r") or self.random_read)

    @property
    def corrupts_writes(self) -> bool:
        return bool(self._byte_of("w") or self.random_write)

    def _byte_of(self, direction: str) -> int:
        return self.corrupt_byte if self.corrupt_direction == direction else 0

    def words(self) -> list[str]:
        words = [
            name
            for name in ("error_reads", "drop_writes", "error_writes")
            if getattr(self, name)
        ]
        if self.corrupt_byte:
            words += ["corrupt_bio_byte", str(self.corrupt_byte)]
            words += [self.corrupt_direction, str(self.corrupt_value)]
            words += [str(self.corrupt_flags)]
        if self.random_read:
            words += ["random_read_corrupt", str(self.random_read)]
        if self.random_write:
            words += ["random_write_corrupt", str(self.random_write)]
        return words


class FlakeyTarget(RunTarget):
    """See the module head. Source: drivers/md/dm-flakey.c."""

    type_name = "flakey"
    version = (1, 5, 0)

    def __init__(
        self,
        ctx: TargetContext,
        run: Run,
        intervals_s: tuple[int, int],
        features: Features,
    ) -> None:
        """Args: intervals_s: up, down."""
        super().__init__(ctx, run)
        self._up_s, self._down_s = intervals_s
        self._period_s = sum(intervals_s)
        self._features = features
        self._random = random.Random()
        self._loaded_ns = ctx.clock.now_ns()
        if features.corrupts_writes:
            self.can_write_zeroes = self.can_fast_zero = False

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "FlakeyTarget":
        if len(args) < 4:
            raise _error("Invalid argument count")
        start_sectors = parse_sectors(args[1])
        if start_sectors is None:
            raise _error("Invalid device sector")
        up_s = _number(args[2], 0, UINT32_MAX, "Invalid up interval")
        down_s = _number(args[3], 0, UINT32_MAX, "Invalid down interval")
        if up_s + down_s == 0:
            raise _error("Total (up + down) interval is zero")
        if up_s + down_s > UINT32_MAX:
            raise _error("Interval overflow")
        features = parse_features(args[4:])
        async with Runs(ctx, cls.type_name) as runs:
            run = await runs.open(args[0], start_sectors, ctx.length)
            return cls(ctx, run, (up_s, down_s), features)

    def map(self, bio: Bio) -> int:
        bio.device = self._device
        if bio.op != OP_FLUSH:
            bio.offset += self._delta
        elapsed_s = (self.ctx.clock.now_ns() - self._loaded_ns) // _SECOND_NS
        if elapsed_s % self._period_s < self._up_s:
            return REMAPPED
        if bio.op in (OP_READ, OP_CACHE):
            return self._map_read_down(bio)
        return self._map_write_down(bio)

    def _map_read_down(self, bio: Bio) -> int:
        if self._features.error_reads:
            return KILL
        if bio.op == OP_READ and self._features.corrupts_reads:
            changes = self._changes(bio)
            if changes:
                bio.on_end(lambda ended: _corrupt_read(ended, changes))
        return REMAPPED

    def _map_write_down(self, bio: Bio) -> int:
        if self._features.drop_writes:
            bio.end(0)
            return SUBMITTED
        if self._features.error_writes:
            return KILL
        if bio.op == OP_WRITE and self._features.corrupts_writes:
            changes = self._changes(bio)
            if changes:
                assert bio.payload is not None
                data = bytearray(bio.payload)
                _change(data, changes)
                bio.payload = memoryview(data)
                bio.borrowed = False
        return REMAPPED

    def _changes(self, bio: Bio) -> list[tuple[int, int]]:
        """Return the bytes to change in this bio's data: (index, value)."""
        features = self._features
        if bio.op == OP_READ:
            direction, probability, opf = "r", features.random_read, 0
        else:
            direction, probability, opf = "w", features.random_write, _OPF_WRITE
            if bio.flags & FUA:
                opf |= _OPF_FUA
        changes = []
        if (
            0 < features.corrupt_byte <= bio.length
            and features.corrupt_direction == direction
            and opf & features.corrupt_flags == features.corrupt_flags
        ):
            changes.append((features.corrupt_byte - 1, features.corrupt_value))
        if (
            bio.length
            and probability
            and self._random.randrange(PROBABILITY_BASE) < probability
        ):
            at = self._random.randrange(bio.length)
            changes.append((at, self._random.randrange(256)))
        return changes

    def table_words(self) -> str:
        words = self._features.words()
        intervals = f"{self._up_s} {self._down_s}"
        return " ".join([self._run.words, intervals, str(len(words)), *words])


def _change(data: bytearray | memoryview, changes: Iterable[tuple[int, int]]) -> None:
    for at, value in changes:
        data[at] = value


def _corrupt_read(bio: Bio, changes: Iterable[tuple[int, int]]) -> None:
    if bio.status == 0:
        assert bio.payload is not None
        _change(bio.payload, changes)


def parse_features(words: Sequence[str]) -> Features:
    """Parse the group of feature words; words after it are ignored, as in the kernel.

    Raises: ConstructorError.
    """
    features = Features()
    if words:
        reason = "Invalid number of feature args"
        count = _number(words[0], 0, FEATURE_WORDS_MAX, reason)
        if count > len(words) - 1:
            raise _error(reason)
        rest = iter(words[1 : 1 + count])
        for word in rest:
            _parse_feature(features, word.lower(), rest)
    _refuse_conflicts(features)
    if not features.words():
        features.error_reads = features.error_writes = True
    return features


def _parse_feature(features: Features, name: str, rest: Iterator[str]) -> None:
    match name:
        case "error_reads":
            _set_once(features, name)
        case "drop_writes" | "error_writes":
            _set_once(features, name)
            other = "error_writes" if name == "drop_writes" else "drop_writes"
            if getattr(features, other):
                raise _error(f"Feature {name} conflicts with feature {other}")
        case "corrupt_bio_byte":
            _parse_corrupt_byte(features, list(rest))
        case "random_read_corrupt" | "random_write_corrupt":
            field = name.removesuffix("_corrupt")
            if getattr(features, field):
                raise _error(f"Feature {name} duplicated")
            word = next(rest, None)
            if word is None:
                raise _error(f"Feature {name} requires a parameter")
            reason = "Invalid random corrupt argument"
            setattr(features, field, _number(word, 0, PROBABILITY_BASE, reason))
        case _:
            raise _error("Unrecognised flakey feature requested")


def _set_once(features: Features, name: str) -> None:
    if getattr(features, name):
        raise _error(f"Feature {name} duplicated")
    setattr(features, name, True)


def _parse_corrupt_byte(features: Features, words: Sequence[str]) -> None:
    """Take the four parameters; what follows them are features again."""
    if features.corrupt_byte:
        raise _error("Feature corrupt_bio_byte duplicated")
    if len(words) < 4:
        raise _error("Feature corrupt_bio_byte requires 4 parameters")
    byte, direction, value, flags, *rest = words
    features.corrupt_byte = _number(byte, 1, UINT32_MAX, "Invalid corrupt bio byte")
    if direction.lower() not in ("r", "w"):
        raise _error("Invalid corrupt bio direction (r or w)")
    features.corrupt_direction = direction.lower()
    reason = "Invalid corrupt value to write into bio byte (0-255)"
    features.corrupt_value = _number(value, 0, 255, reason)
    reason = "Invalid corrupt bio flags mask"
    features.corrupt_flags = _number(flags, 0, UINT32_MAX, reason)
    left = iter(rest)
    for word in left:
        _parse_feature(features, word.lower(), left)


def _refuse_conflicts(features: Features) -> None:
    for name, direction, corrupts in (
        ("drop_writes", "write", features.corrupts_writes),
        ("error_writes", "write", features.corrupts_writes),
        ("error_reads", "read", features.corrupts_reads),
    ):
        if getattr(features, name) and corrupts:
            raise _error(
                f"{name} is incompatible with random_{direction}_corrupt or"
                f" corrupt_bio_byte with the {direction.upper()} flag set"
            )


def _number(word: str, number_min: int, number_max: int, reason: str) -> int:
    return read_argument(word, number_min, number_max, reason, FlakeyTarget.type_name)


def _error(reason: str) -> ConstructorError:
    return ConstructorError(reason, target=FlakeyTarget.type_name)
