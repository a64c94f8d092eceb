# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget replay-log`: a log of the log-writes target, looked at or replayed onto a disk.

Options and output are those of the log-writes tools' replay-log.
"""

import sys
from typing import Annotated

import msgspec
import typer

from nbdtarget.cli.common import Json

__all__ = ["register"]

Log = Annotated[
    str, typer.Option("--log", metavar="LOG", help="The log; only ever read.")
]
Replay = Annotated[
    str | None,
    typer.Option("--replay", metavar="DISK", help="Replay onto this disk."),
]
StartEntry = Annotated[
    int, typer.Option("--start-entry", min=0, help="Begin with this entry.")
]
StartMark = Annotated[
    str | None, typer.Option("--start-mark", help="Begin after this mark.")
]
EndMark = Annotated[str | None, typer.Option("--end-mark", help="Stop at this mark.")]
Limit = Annotated[
    int, typer.Option("--limit", min=0, help="Stop after so many entries.")
]
NextFlush = Annotated[
    bool, typer.Option("--next-flush", help="Stop after the next flush.")
]
NextFua = Annotated[
    bool, typer.Option("--next-fua", help="Stop after the next FUA write.")
]
StartSector = Annotated[
    int, typer.Option("--start-sector", min=0, help="Only from this sector on.")
]
EndSector = Annotated[
    int | None, typer.Option("--end-sector", min=0, help="Only up to this sector.")
]
NoDiscard = Annotated[bool, typer.Option("--no-discard", help="Leave out discards.")]
Fsck = Annotated[
    str | None,
    typer.Option(
        "--fsck", metavar="COMMAND", help="Run where --check says; 0 goes on."
    ),
]
Check = Annotated[
    str | None,
    typer.Option("--check", metavar="N|flush|fua", help="When to run --fsck."),
]
Find = Annotated[
    bool, typer.Option("--find", help="Print where the replay would stop.")
]
NumEntries = Annotated[
    bool, typer.Option("--num-entries", help="Print how many entries there are.")
]
List = Annotated[
    bool, typer.Option("--list", help="Print the entries; without --replay.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print what is replayed.")
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
    """Replay a log of the log-writes target up to a mark, or look into it."""
    if (fsck is None) != (check is None):
        raise typer.BadParameter("--fsck and --check need each other")
    if sum((find, num_entries, list_, replay is not None)) > 1:
        raise typer.BadParameter("--replay, --find, --num-entries, --list: one of them")
    if fsck is not None and replay is None:
        raise typer.BadParameter("--fsck needs --replay")
    if start_mark is not None and start_entry:
        raise typer.BadParameter("--start-mark or --start-entry, not both")
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
        raise typer.BadParameter("--check: a number of entries, flush or fua")
    return int(check)
