# SPDX-License-Identifier: Apache-2.0
"""The `dust` target: a disk on which sectors go bad, and are remapped when written.

    <dev> <offset> <block size in bytes>

Theory of operation. A list of bad blocks is kept by message, in memory, for as long as the table
lives. At first it means nothing (`bypass`); after `enable`:

    read that touches a bad block    EIO
    write, zeroing, discard of it    passes, and the block is good again; unless the block was
                                     added with a write fail count: then it fails with EIO, so
                                     many times, and the rest of the bio is carried out

Blocks are counted from the start of the *device*, the offset included, as in the kernel. FLUSH
passes always (the kernel's takes block 0 off the list).

    addbadblock <block> [<write fail count>]   removebadblock <block>   queryblock <block>
    countbadblocks   listbadblocks   clearbadblocks   enable   disable   quiet

`quiet` switches logging of blocks that are added, removed, or written over off and on.
"""

import errno as errnos
import logging
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Final

from nbdtarget.bio import OP_CACHE, OP_FLUSH, OP_READ, Bio, split_bio
from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.common.units import SECTOR
from nbdtarget.common.words import quote_word
from nbdtarget.targets.arguments import (
    Run,
    Runs,
    parse_sectors,
    parse_uint,
    parse_uint32,
)
from nbdtarget.targets.base import (
    KILL,
    REMAPPED,
    SUBMITTED,
    StatusFields,
    TargetContext,
)
from nbdtarget.targets.run import RunTarget

__all__ = ["DustTarget"]

BLOCK_SECTORS_MAX: Final = 2097152
WRITE_FAIL_COUNT_MAX: Final = 255
_BLOCK_MAX: Final = (1 << 64) - 1

log = logging.getLogger(__name__)


class DustTarget(RunTarget):
    """See the module head. Source: drivers/md/dm-dust.c."""

    type_name = "dust"
    volatile_state = "the list of bad blocks"
    version = (1, 0, 0)
    messages = MappingProxyType(
        {
            "addbadblock BLOCK [WRITES]": "Make a block bad; it stays bad for so many writes.",
            "removebadblock BLOCK": "Make a block good again.",
            "queryblock BLOCK": "Print whether a block is bad.",
            "countbadblocks": "Print how many blocks are bad.",
            "listbadblocks": "Print the bad blocks.",
            "clearbadblocks": "Make all blocks good again.",
            "enable": "Fail reads of bad blocks from now on.",
            "disable": "Do not fail reads of bad blocks any more.",
            "quiet": "Stop logging each block that is made bad or good; sent again, go on logging.",
        }
    )

    def __init__(self, ctx: TargetContext, run: Run, block_size: int) -> None:
        """Args: block_size: bytes, a power of two."""
        super().__init__(ctx, run)
        self._block_size = block_size
        self._bad: dict[int, int] = {}  # block -> writes that still fail
        self._fails = False
        self._quiet = False

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "DustTarget":
        if len(args) != 3:
            raise _error("Invalid argument count")
        block_size = parse_uint32(args[2])
        if not block_size:
            raise _error("Invalid block size parameter")
        if block_size < SECTOR:
            raise _error("Block size must be at least 512")
        if block_size & (block_size - 1):
            raise _error("Block size must be a power of 2")
        if block_size > min(ctx.length, BLOCK_SECTORS_MAX * SECTOR):
            raise _error("Block size is too large")
        start_sectors = parse_sectors(args[1])
        if start_sectors is None:
            raise _error("Invalid device offset sector")
        async with Runs(ctx, cls.type_name) as runs:
            run = await runs.open(args[0], start_sectors, ctx.length)
            return cls(ctx, run, block_size)

    def map(self, bio: Bio) -> int:
        bio.device = self._device
        if bio.op == OP_FLUSH:
            return REMAPPED
        bio.offset += self._delta
        if not self._fails or not self._bad:
            return REMAPPED
        bad = self._bad_blocks(bio.offset, bio.length)
        if not bad:
            return REMAPPED
        if bio.op in (OP_READ, OP_CACHE):
            return KILL
        return self._write_bad(bio, bad)

    def _bad_blocks(self, offset: int, length: int) -> list[int]:
        """The bad blocks that a range of the device touches, in order."""
        first = offset // self._block_size
        last = (offset + length - 1) // self._block_size
        if last - first < len(self._bad):
            return [block for block in range(first, last + 1) if block in self._bad]
        return sorted(block for block in self._bad if first <= block <= last)

    def _write_bad(self, bio: Bio, bad: Iterable[int]) -> int:
        """A write repairs the blocks that let it, and fails on the others."""
        failing = []
        for block in bad:
            if self._bad[block]:
                self._bad[block] -= 1
                failing.append(block)
            else:
                del self._bad[block]
                self._tell("block %d removed from badblocklist by write", block)
        if not failing:
            return REMAPPED
        pieces = self._pieces(bio, failing)
        if len(pieces) == 1:
            return KILL
        children = split_bio(bio, [length for length, _ in pieces])
        for child, (_, fails) in zip(children, pieces, strict=True):
            if fails:
                child.end(errnos.EIO)
            else:
                self._device.submit(child)
        return SUBMITTED

    def _pieces(self, bio: Bio, failing: Iterable[int]) -> list[tuple[int, bool]]:
        """Cut a bio around its failing blocks: (bytes, fails)."""
        pieces = []
        at, end = bio.offset, bio.offset + bio.length
        for block in failing:
            begin = max(block * self._block_size, at)
            stop = min((block + 1) * self._block_size, end)
            if at < begin:
                pieces.append((begin - at, False))
            pieces.append((stop - begin, True))
            at = stop
        if at < end:
            pieces.append((end - at, False))
        return pieces

    def _tell(self, text: str, *args: int) -> None:
        if not self._quiet:
            log.info(f"%s: {text}", self.ctx.name, *args)

    async def message(self, words: Sequence[str]) -> str | None:
        name = words[0].lower()
        match len(words):
            case 1:
                return self._message_alone(name, words[0])
            case 2 | 3:
                return self._message_of_block(name, words)
        raise self.unknown_message(words, f"invalid number of arguments '{len(words)}'")

    def _message_alone(self, name: str, given: str) -> str | None:
        match name:
            case "enable" | "disable":
                self._fails = name == "enable"
                log.info(
                    "%s: %s read failures on bad sectors",
                    self.ctx.name,
                    "enabling" if self._fails else "disabling",
                )
                return None
            case "quiet":
                self._quiet = not self._quiet
                return None
            case "countbadblocks":
                return f"countbadblocks: {len(self._bad)} badblock(s) found"
            case "listbadblocks":
                blocks = "\n".join(str(block) for block in sorted(self._bad))
                return blocks or "No blocks in badblocklist"
            case "clearbadblocks":
                found = "badblocks cleared" if self._bad else "no badblocks found"
                self._bad.clear()
                return f"dust_clear_badblocks: {found}"
            case "addbadblock" | "removebadblock" | "queryblock":
                raise TableError(f"{given} requires an additional argument")
        raise self.unknown_message([given], f"unrecognized message '{given}' received")

    def _message_of_block(self, name: str, words: Sequence[str]) -> str | None:
        block = parse_uint(words[1], _BLOCK_MAX)
        if block is None:
            raise TableError(f"Invalid argument: {words[1]} is not a block number")
        write_fails: int | None = 0
        if len(words) == 3:
            write_fails = parse_uint(words[2], WRITE_FAIL_COUNT_MAX)
            if write_fails is None:
                raise TableError("selected write fail count out of range")
        if block > self._device.size // self._block_size:
            raise TableError("selected block value out of range")
        if name == "addbadblock":
            assert write_fails is not None
            self._add(block, write_fails)
        elif name == "removebadblock" and len(words) == 2:
            self._remove(block)
        elif name == "queryblock" and len(words) == 2:
            found = "found" if block in self._bad else "not found"
            return f"dust_query_block: block {block} {found} in badblocklist"
        else:
            raise self.unknown_message(
                words, f"unrecognized message '{words[0]}' received"
            )
        return None

    def _add(self, block: int, write_fails: int) -> None:
        if block in self._bad:
            raise TableError(f"dust_add_block: block {block} already in badblocklist")
        self._bad[block] = write_fails
        self._tell(
            "dust_add_block: badblock added at block %d with write fail count %d",
            block,
            write_fails,
        )

    def _remove(self, block: int) -> None:
        if block not in self._bad:
            raise TableError(
                f"dust_remove_block: block {block} not found in badblocklist"
            )
        del self._bad[block]
        self._tell("dust_remove_block: badblock removed at block %d", block)

    async def status(self, *, noflush: bool = False) -> str:
        mode = "fail_read_on_bad_block" if self._fails else "bypass"
        noise = "quiet" if self._quiet else "verbose"
        return f"{quote_word(self._device.name)} {mode} {noise}"

    def status_fields(self) -> StatusFields:
        return {
            "fails_reads_of_bad_blocks": self._fails,
            "nr_bad_blocks": len(self._bad),
            "quiet": self._quiet,
        }

    def table_words(self) -> str:
        return f"{self._run.words} {self._block_size}"


def _error(reason: str) -> ConstructorError:
    return ConstructorError(reason, target=DustTarget.type_name)
