# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget torture`: does what a program has acknowledged survive a power cut?"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbdtarget.cli.common import Json
from nbdtarget.cli.ending import in_order
from nbdtarget.cli.sizes import size_option
from nbdtarget.common.units import SECTOR

if TYPE_CHECKING:
    from nbdtarget.torture.session import Failure, Result, TortureOptions
    from nbdtarget.torture.trials import Outcome

__all__ = ["register"]

SHOWN_MAX = 8  # lost writes

Command = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- COMMAND...",
        help="Program to test, with its arguments. It runs in the root of the file system, and prints a line for"
        " each thing that must survive from then on.",
        show_default=False,
    ),
]
Check = Annotated[
    str | None,
    typer.Option(
        "--check",
        metavar="COMMAND",
        help="Shell command that runs in the root of the file system after each power cut, and fails if something is"
        " wrong. The lines that had been printed by then are in the file $TORTURE_ACKNOWLEDGED.",
    ),
]
Setup = Annotated[
    str | None,
    typer.Option(
        "--setup",
        metavar="COMMAND",
        help="Shell command that runs there first, before the power may be cut.",
    ),
]
FileSystem = Annotated[
    str, typer.Option("--fs", metavar="ext4|xfs", help="File system of the disk.")
]
Size = Annotated[str, typer.Option("--size", metavar="SIZE", help="Size of the disk.")]
Cuts = Annotated[
    int,
    typer.Option(
        "--cuts",
        metavar="NUMBER",
        help="Number of power cuts. Half of them lose all writes at risk, at a flush each; the others lose or tear"
        " some of them, by chance.",
    ),
]
Every = Annotated[
    int,
    typer.Option(
        "--every",
        metavar="WRITES",
        help="Besides, cut the power after each so many writes between two flushes.",
    ),
]
TearSize = Annotated[
    int,
    typer.Option(
        "--tear-size",
        metavar="512|4096",
        help="Bytes that the disk writes in one piece: a torn write is cut at multiples of this. ext4 does not survive 512"
        " everywhere.",
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="NUMBER", help="Seed of what is left to chance."),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="DIR",
        help="New directory for the record of all writes. Default: one for temporary files, which is removed if all"
        " checks pass.",
    ),
]
CommandTimeout = Annotated[
    float,
    typer.Option(
        "--timeout", metavar="SECONDS", help="Time that COMMAND may take.", min=0
    ),
]
CheckTimeout = Annotated[
    float,
    typer.Option(
        "--check-timeout", metavar="SECONDS", help="Time that a check may take.", min=0
    ),
]
Replay = Annotated[
    str | None,
    typer.Option(
        "--replay",
        metavar="CASE",
        help="Make the disk of a case that has failed again, and run its check.",
    ),
]
Image = Annotated[
    str | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="With --replay: write the disk into a new file, and run no check.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(torture)


def torture(
    command: Command = None,
    check: Check = None,
    setup: Setup = None,
    file_system: FileSystem = "ext4",
    size: Size = "64M",
    cuts: Cuts = 200,
    every: Every = 0,
    tear_size: TearSize = 4096,
    seed: Seed = 0,
    output: Output = None,
    timeout: CommandTimeout = 300.0,
    check_timeout: CheckTimeout = 60.0,
    replay: Replay = None,
    image: Image = None,
    json: Json = False,
) -> int:
    """Cut the power under a program, again and again, and check what is left.

    The program runs once, on a file system whose disk records every write and flush. Then the disks are made that power cuts
    at many moments would have left, each is mounted, and the check runs. A failing case is made smaller, and can be replayed. It takes root, for
    mounts. The exit status is 1 if a check has failed.

    Example: nbdtarget torture --check ./check -- ./program
    """
    if replay is not None:
        return _replay(replay, image, check_timeout)
    if image is not None:
        raise typer.BadParameter("--image: goes with --replay")
    if not command:
        raise typer.BadParameter("Missing argument '-- COMMAND...': name the program")
    if check is None:
        raise typer.BadParameter(
            "Missing option '--check': say what tells right from wrong"
        )
    nr_bytes = size_option("--size", size, size_min=SECTOR)
    from nbdtarget.torture.session import TortureOptions

    options = TortureOptions(
        command=tuple(command),
        check=check,
        setup=setup,
        file_system=file_system,
        size=nr_bytes - nr_bytes % SECTOR,
        nr_cuts=cuts,
        seed=seed,
        every=every,
        tear_size=tear_size,
        output=output,
        command_timeout_s=timeout,
        check_timeout_s=check_timeout,
    )
    return _run(options, json=json)


def _run(options: "TortureOptions", *, json: bool) -> int:
    from nbdtarget.cli.progress.common import print_event, say
    from nbdtarget.torture.session import torture

    with in_order():
        result = torture(options, say)
    failure = result.failure
    if json:
        print_event(
            event="tortured",
            writes=result.nr_writes,
            flushes=result.nr_flushes,
            lines=result.nr_lines,
            cuts=result.nr_tried,
            record_s=result.record_s,
            trials_s=result.trials_s,
            case=None if failure is None else str(failure.case),
        )
    else:
        _print(result)
    return 0 if failure is None else 1


def _print(result: "Result") -> None:
    print(
        f"{result.nr_tried} power cuts in {result.trials_s:.1f} s, after a record of {result.nr_writes} writes,"
        f" {result.nr_flushes} flushes and {result.nr_lines} lines in {result.record_s:.1f} s"
    )
    if result.failure is None:
        print("after each of them the check has passed")
    else:
        _print_failure(result.failure, result.nr_flushes)


def _print_failure(failure: "Failure", nr_flushes: int) -> None:
    cut, lost = failure.cut, failure.lost
    print(
        f"FAILED: the power went before flush {cut.flush} of {nr_flushes} had ended, with"
        f" {failure.nr_lines} lines acknowledged: {cut.how}"
    )
    print(
        f"  of {failure.nr_at_risk} writes at risk, it is enough to lose {len(lost)}:"
    )
    for write, sectors in list(lost.items())[:SHOWN_MAX]:
        print(f"    write {write}: {len(sectors)} sectors from {sectors[0]} on")
    if len(lost) > SHOWN_MAX:
        print(f"    … and {len(lost) - SHOWN_MAX} more")
    _print_outcome(failure.outcome)
    case = shlex.quote(str(failure.case))
    print(f"replay it: nbdtarget torture --replay {case}")
    print(f"its disk:  nbdtarget torture --replay {case} --image disk.img")


def _print_outcome(outcome: "Outcome") -> None:
    print(f"  {outcome.reason or 'the check has passed'}")
    for line in outcome.output.splitlines():
        print(f"    {line}")


def _replay(case: str, image: str | None, check_timeout: float) -> int:
    from nbdtarget.torture.session import replay

    kept = None if image is None else Path(image)
    with in_order():
        recording, cut, outcome = replay(Path(case).absolute(), kept, check_timeout)
    print(
        f"{shlex.join(recording.command)}: the power went before flush {cut.flush} had ended: {cut.how}"
    )
    if outcome is None:
        print(f"{image}: this is the disk, with {recording.file_system}")
        return 0
    _print_outcome(outcome)
    return 0 if outcome.has_passed else 1
