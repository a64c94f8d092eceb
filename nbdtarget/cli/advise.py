# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget advise`: how large a cache should be."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbdtarget.cli.common import Json
from nbdtarget.cli.sizes import block_size_option, size_option
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import describe_bytes

if TYPE_CHECKING:
    from nbdtarget.advise.advice import Advice

__all__ = ["register"]

TraceFile = Annotated[
    Path,
    typer.Argument(
        metavar="TRACE",
        help="List of what was read and written: recorded from a device (see `message' @trace_start), blkparse's"
        " text, fio's log (write_iolog), the CSV of MSR Cambridge, or libCacheSim's oracleGeneral.",
    ),
]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--cache-size",
        metavar="SIZE",
        help="Size of a cache to try, for example 10G; may be given more than once. Default: shares of what the"
        " trace touches.",
    ),
]
BlockSize = Annotated[
    str,
    typer.Option("--block-size", metavar="SIZE", help="Size of a block of the cache."),
]
PolicyName = Annotated[
    str, typer.Option("--policy", metavar="NAME", help="Policy of the cache.")
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="Format of the trace: plain, fio, blkparse, msr or oracleGeneral. Default: what it looks like.",
    ),
]
WarmUp = Annotated[
    int | None,
    typer.Option(
        "--warm-up",
        metavar="NUMBER",
        min=0,
        help="Accesses that fill the cache and are not counted. Default: half of them.",
    ),
]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--picture", metavar="FILE", help="File for a picture of it, .png or .svg."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(advise)


def advise(
    trace: TraceFile,
    cache_size: Sizes = None,
    block_size: BlockSize = "64K",
    policy: PolicyName = "smq",
    format_: Format = None,
    warm_up: WarmUp = None,
    picture: Picture = None,
    json: Json = False,
) -> None:
    """Say how large a cache should be, from a trace: hit ratios of smq, LRU and the best possible cache.

    The trace is run through caches of several sizes, without any disk. The last line names the size at which more stops to help.
    """
    from nbdtarget.advise.advice import Ratios, Request
    from nbdtarget.advise.advice import advise as advised
    from nbdtarget.advise.picture import SUFFIXES, draw
    from nbdtarget.advise.traces import FORMATS, read_trace
    from nbdtarget.policies.registry import POLICY_TYPES

    if format_ is not None and format_ not in FORMATS:
        raise typer.BadParameter(
            f"--format: {format_!r} is none of {', '.join(FORMATS)}"
        )
    if policy not in POLICY_TYPES:
        raise typer.BadParameter(
            f"--policy: {policy!r} is none of {', '.join(sorted(POLICY_TYPES))}"
        )
    if picture is not None and picture.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(
            f"--picture: {picture} is called neither .png nor .svg"
        )
    request = Request(
        block_size_option("--block-size", block_size),
        policy,
        tuple(size_option("--cache-size", size) for size in cache_size or ()),
        warm_up,
    )
    try:
        accesses = read_trace(trace, request.block_size, format_)
    except OSError as error:
        raise NbdTargetError(f"{trace}: {error.strerror or error}") from None

    def tell(row: Ratios) -> None:
        if not json:
            shares = (row.policy, row.lru, row.best)
            print(
                f"{describe_bytes(row.size):>12}",
                *(f"{each:>13.1%}" for each in shares),
                flush=True,
            )

    if not json:
        print(f"{'cache':>12} {policy:>13} {'LRU':>13} {'best possible':>13}")
    advice = advised(accesses, request, tell)
    if json:
        _print_json(advice)
    else:
        print(
            f"\n{advice.nr_accesses:,} accesses of {describe_bytes(advice.touched)}, {advice.nr_writes / advice.nr_accesses:.0%}"
            f" of them writes; the last {advice.nr_counted:,} are counted."
        )
        print(_conclusion(advice))
    if picture is not None:
        draw(advice, trace.name, picture)


def _conclusion(advice: "Advice") -> str:
    enough = advice.enough
    if enough is None:
        return "A cache does not help: hardly anything is used twice."
    if enough == advice.rows[-1].size and len(advice.rows) > 1:
        return "Each larger cache has more hits, up to the largest that was tried."
    return f"More than {describe_bytes(enough)} stops to help: no larger cache has one more hit in a hundred."


def _print_json(advice: "Advice") -> None:
    import msgspec

    print(msgspec.json.encode(advice).decode())
