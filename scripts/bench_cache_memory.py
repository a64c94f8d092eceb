# SPDX-License-Identifier: Apache-2.0
"""Memory of a cache: bytes for each of its blocks, and for each block of the origin.

The difference between two servers that are the same but for the number of blocks, so what Python and
the server take is in neither figure. What counts is anonymous memory (RssAnon): pages that are
written to, no files. So that each byte that may ever be needed is there:

    cache blocks    all of them are mapped; every 16th is dirtied by a 4 KiB write, so that there is
                    some change on each page of whatever is kept for them
    origin blocks   the origin is discarded from end to end, so every bit of that is set

The devices are holes in files; blocks are of 64 KiB. Opening takes more for a while: the most that
there ever was is shown, too.
"""

import argparse
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from scripts.cache_under_test import (
    KIB,
    MIB,
    CacheUnderTest,
    make_full_metadata,
    make_sparse,
)
from tests.support.plain_client import (
    CMD_TRIM,
    CMD_WRITE,
    PlainClient,
    PlainClientError,
)
from tests.support.processes import peak_rss_bytes, rss_bytes

__all__ = ["run"]

GIB: Final = 1 << 30
TIB: Final = 1 << 40
BLOCK_SIZE: Final = 64 * KIB
SMALL_CBLOCKS, LARGE_CBLOCKS = 64 * KIB, MIB
SMALL_ORIGIN, LARGE_ORIGIN = TIB, 8 * TIB
WANTED_CBLOCK: Final = 64.0
WANTED_OBLOCK: Final = 8.0
DEPTH: Final = 64
EACH: Final = 16
TRIM_BYTES: Final = 2 * GIB
PAGE: Final = 4 * KIB


@dataclass(frozen=True)
class Memory:
    """Of a server that has been used, in bytes."""

    anonymous: int
    resident: int
    peak: int


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, "RssAnon is not in /proc/PID/status"
    return int(found[1]) * KIB


def send_all(client: PlainClient, command: int, offsets: Iterable[int]) -> None:
    """Send a TRIM of TRIM_BYTES or a WRITE of a page to each of `offsets`, some at once."""
    under_way = 0
    for offset in offsets:
        if under_way == DEPTH:
            receive(client)
            under_way -= 1
        if command == CMD_TRIM:
            client.send(command, offset, TRIM_BYTES)
        else:
            client.send(command, offset, payload=bytes(PAGE))
        under_way += 1
    for _ in range(under_way):
        receive(client)


def receive(client: PlainClient) -> None:
    _, error, _ = client.receive()
    if error:
        raise PlainClientError(f"the server answered {error}")


def measure(work: Path, *, nr_cblocks: int, origin_size: int) -> Memory:
    """Serve such a cache, use all of it, and look."""
    origin = work / "origin.img"
    make_sparse(origin, origin_size)
    cache = CacheUnderTest(
        work,
        str(origin),
        origin_size,
        block_size=BLOCK_SIZE,
        # The discarded range is a hole below already; passing it down would only take time. No
        # migrations, as none is part of the question.
        words="2 writeback no_discard_passdown smq 2 migration_threshold 0",
    )
    cache.make_device(nr_cblocks * BLOCK_SIZE)
    make_full_metadata(
        cache.metadata,
        block_size=BLOCK_SIZE,
        origin_size=origin_size,
        nr_cblocks=nr_cblocks,
    )
    stride = origin_size // BLOCK_SIZE // nr_cblocks * BLOCK_SIZE
    with cache.serving() as process, PlainClient(cache.socket, cache.export) as client:
        send_all(client, CMD_TRIM, range(0, origin_size, TRIM_BYTES))
        dirtied = range(0, nr_cblocks * stride, EACH * stride)
        send_all(client, CMD_WRITE, dirtied)
        used, dirty = cache.number("cache_blocks_used"), cache.number("dirty_blocks")
        assert (used, dirty) == (nr_cblocks, len(dirtied))
        memory = Memory(
            anonymous_bytes(process.pid),
            rss_bytes(process.pid),
            peak_rss_bytes(process.pid),
        )
        client.disconnect()
    return memory


def run(work: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, print; return the results."""
    small = measure(work, nr_cblocks=SMALL_CBLOCKS, origin_size=SMALL_ORIGIN)
    large = measure(work, nr_cblocks=LARGE_CBLOCKS, origin_size=SMALL_ORIGIN)
    wide = measure(work, nr_cblocks=SMALL_CBLOCKS, origin_size=LARGE_ORIGIN)
    console.print(f"{'cache blocks':>13} {'origin':>8} {'memory':>9} {'at most':>9}")
    for nr, size, memory in (
        (SMALL_CBLOCKS, SMALL_ORIGIN, small),
        (LARGE_CBLOCKS, SMALL_ORIGIN, large),
        (SMALL_CBLOCKS, LARGE_ORIGIN, wide),
    ):
        console.print(
            f"{nr:13,} {size // TIB:4} TiB {memory.resident / MIB:5.0f} MiB"
            f" {memory.peak / MIB:5.0f} MiB"
        )
    nr_oblocks = (LARGE_ORIGIN - SMALL_ORIGIN) // BLOCK_SIZE
    per_cblock = (large.anonymous - small.anonymous) / (LARGE_CBLOCKS - SMALL_CBLOCKS)
    per_oblock = (wide.anonymous - small.anonymous) / nr_oblocks
    console.print(f"{per_cblock:.1f} bytes a cache block (wanted: < {WANTED_CBLOCK})")
    console.print(f"{per_oblock:.2f} bytes an origin block (wanted: < {WANTED_OBLOCK})")
    return {
        "bytes_per_cache_block": per_cblock,
        "bytes_per_origin_block": per_oblock,
        "small": asdict(small),
        "large": asdict(large),
        "wide": asdict(wide),
    }
