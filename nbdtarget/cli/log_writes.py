# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget replay-log`: look into a log of the log-writes target, or replay it onto a disk.

Options and output are those of replay-log of the log-writes tools.
"""

import sys
from typing import Annotated

import msgspec
import typer

from nbdtarget.cli.common import Json

__all__ = ["register"]

Log = Annotated[
    str,
    typer.Option(
        "--log", metavar="LOG", help="Device or file with the log. It is only read."
    ),
]
Replay = Annotated[
    str | None,
    typer.Option("--replay", metavar="DISK", help="Disk to replay the log onto."),
]
StartEntry = Annotated[
    int, typer.Option("--start-entry", min=0, help="Entry to begin with.")
]
StartMark = Annotated[
    str | None, typer.Option("--start-mark", help="Mark to begin after.")
]
EndMark = Annotated[str | None, typer.Option("--end-mark", help="Mark to stop at.")]
Limit = Annotated[
    int,
    typer.Option(
        "--limit", min=0, help="Number of entries to stop after; 0: no limit."
    ),
]
NextFlush = Annotated[
    bool, typer.Option("--next-flush", help="Stop after the next flush.")
]
NextFua = Annotated[
    bool, typer.Option("--next-fua", help="Stop after the next FUA write.")
]
StartSector = Annotated[
    int, typer.Option("--start-sector", min=0, help="First sector to replay.")
]
EndSector = Annotated[
    int | None, typer.Option("--end-sector", min=0, help="Last sector to replay.")
]
NoDiscard = Annotated[
    bool, typer.Option("--no-discard", help="Do not replay discards.")
]
Fsck = Annotated[
    str | None,
    typer.Option(
        "--fsck",
        metavar="COMMAND",
        help="Command to run where --check says. The replay ends if it does not exit with 0.",
    ),
]
Check = Annotated[
    str | None,
    typer.Option(
        "--check",
        metavar="N|flush|fua",
        help="When to run --fsck: after every N entries, each flush or each FUA write.",
    ),
]
Find = Annotated[
    bool, typer.Option("--find", help="Print the entry at which the replay would stop.")
]
NumEntries = Annotated[
    bool, typer.Option("--num-entries", help="Print the number of entries.")
]
List = Annotated[
    bool, typer.Option("--list", help="Print the entries; not together with --replay.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print each entry that is replayed.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("replay-log")(replay_log)


def replay_log(
    log: Log,
    replay: Replay = None,
    start_entry: StartEntry = 0,
    start_mark: StartMark = None,
    end_mark: EndMark = None,
    limit: Limit = 0,
    next_flush: NextFlush = False,
    next_fua: NextFua = False,
    start_sector: StartSector = 0,
    end_sector: EndSector = None,
    no_discard: NoDiscard = False,
    fsck: Fsck = None,
    check: Check = None,
    find: Find = False,
    num_entries: NumEntries = False,
    list_: List = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Replay a log of the log-writes target, or look into it.

    Example: nbdtarget replay-log --log log.img --replay disk.img --end-mark before-crash
    """
    if (fsck is None) != (check is None):
        raise typer.BadParameter("--fsck and --check must be given together")
    if sum((find, num_entries, list_, replay is not None)) > 1:
        raise typer.BadParameter(
            "Give only one of --replay, --find, --num-entries and --list"
        )
    if fsck is not None and replay is None:
        raise typer.BadParameter("--fsck needs --replay")
    if start_mark is not None and start_entry:
        raise typer.BadParameter("Give either --start-mark or --start-entry, not both")
    from nbdtarget.targets.log_writes.replay import Selection
    from nbdtarget.tools.replay_log import Answer, ReplayJob, run

    job = ReplayJob(
        log=log,
        replay=replay,
        find=find,
        num_entries=num_entries,
        list_entries=list_,
        verbose=verbose,
        fsck=fsck,
        check_every=_check_every(check),
        selection=Selection(
            start_entry=start_entry,
            start_mark=start_mark,
            end_mark=end_mark,
            limit=limit,
            next_flush=next_flush,
            next_fua=next_fua,
            start_sector=start_sector,
            end_sector=end_sector,
            discard=not no_discard,
        ),
    )

    def tell(answer: Answer) -> None:
        text = msgspec.json.encode(answer).decode() if json else str(answer)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()  # before what --fsck prints

    run(job, tell)


def _check_every(check: str | None) -> int | str:
    """When to run --fsck: a number of entries, or "flush" or "fua"."""
    if check is None or check in ("flush", "fua"):
        return check or 0
    if not (check.isascii() and check.isdecimal() and int(check)):
        raise typer.BadParameter("--check must be a number of entries, flush or fua")
    return int(check)
