# SPDX-License-Identifier: Apache-2.0
"""Verbs that users of dmsetup know: help, splitname, mangle, setgeometry, and those about udev.

They print on stdout what dmsetup prints. There is neither udev nor a device node here: the
verbs about them say so on stderr and succeed, so that scripts that call them go on.
"""

import sys
from collections.abc import Callable
from typing import Annotated, Final

import typer

from nbdtarget.cli.columns import describe_fields, report
from nbdtarget.cli.common import Control, Name, Names, ask
from nbdtarget.cli.names import mangled
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.control import messages as m

__all__ = ["register"]

SPLIT_FIELDS: Final = "vg_name,lv_name,lv_layer"
COOKIE_COLUMNS: Final = (
    "Cookie       Semid      Value      Last semop time           Last change time"
)
COOKIE_MAX: Final = 0xFFFFFFFF
COOKIE_FLAGS_SHIFT: Final = 16
# By their bit in the upper half of a cookie. The others have no name but their number.
COOKIE_FLAGS: Final = {
    0: "DM_UDEV_DISABLE_DM_RULES_FLAG",
    1: "DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG",
    2: "DM_UDEV_DISABLE_DISK_RULES_FLAG",
    3: "DM_UDEV_DISABLE_OTHER_RULES_FLAG",
    4: "DM_UDEV_LOW_PRIORITY_FLAG",
    5: "DM_UDEV_DISABLE_LIBRARY_FALLBACK_FLAG",
    6: "DM_UDEV_PRIMARY_SOURCE_FLAG",
    7: "DM_UDEV_FLAG7",
    **{bit: f"DM_SUBSYSTEM_UDEV_FLAG{bit - 8}" for bit in range(8, 16)},
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("help")(help_)
    for command in (splitname, mangle, setgeometry):
        app.command()(command)
    # They do nothing here: a page that lists them would only be longer.
    hidden: tuple[Callable[..., None], ...] = (
        udevcookies,
        udevcreatecookie,
        udevreleasecookie,
        udevflags,
        udevcomplete,
        udevcomplete_all,
        mknodes,
    )
    for each in hidden:
        app.command(each.__name__, hidden=True)(each)


def help_(
    context: typer.Context,
    verb: Annotated[
        str | None,
        typer.Argument(
            metavar="[VERB]", help="The command to explain; default: all of them."
        ),
    ] = None,
    columns: Annotated[
        bool,
        typer.Option("--columns", "-c", "-C", help="Print the columns of `info', too."),
    ] = False,
) -> None:
    """Explain the commands, or one of them."""
    top = context.parent
    assert top is not None
    if verb is None:
        print(top.get_help())
    else:
        group = top.command
        command = group.get_command(top, verb)  # type: ignore[attr-defined]
        if command is None:
            raise typer.BadParameter(
                f"No such command '{verb}': `nbdtarget help' lists all commands"
            )
        with command.make_context(verb, [], parent=top, resilient_parsing=True) as page:
            print(page.get_help())
    if columns:
        print(f"\nColumns of `info -c -o':\n{describe_fields()}")


def splitname(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A name; there need not be such a device."),
    ],
    subsystem: Annotated[
        str,
        typer.Argument(
            metavar="[SUBSYSTEM]", help="Only names of the subsystem LVM are split."
        ),
    ] = "LVM",
    fields: Annotated[
        str | None,
        typer.Option(
            "-o", "--options", metavar="FIELDS", help="Columns, as of `info -c -o'."
        ),
    ] = None,
    columns: Annotated[bool, typer.Option("-c", "-C", hidden=True)] = False,
    noheadings: Annotated[
        bool,
        typer.Option("--noheadings", help="Print neither headings nor padding."),
    ] = False,
    nameprefixes: Annotated[
        bool,
        typer.Option(
            "--nameprefixes", help="Print each value as DM_FIELD='value', for shells."
        ),
    ] = False,
    separator: Annotated[
        str | None,
        typer.Option("--separator", help="Text between columns; it turns padding off."),
    ] = None,
) -> None:
    """Split the name that LVM gave a device.

    The parts are volume group, logical volume and layer.
    """
    device = m.InfoLine(
        name=name,
        uuid=f"{subsystem}-",
        state="ACTIVE",
        read_only=False,
        failed=False,
        live=False,
        inactive=False,
        open_count=0,
        event_nr=0,
        major=0,
        minor=0,
        nr_targets=0,
        size=0,
    )
    for line in report(
        [device],
        default_fields=SPLIT_FIELDS,
        fields=fields,
        headings=not noheadings,
        name_prefixes=nameprefixes,
        separator=separator,
    ):
        print(line)


def mangle(names: Names = None, control: Control = None) -> None:
    """Rename devices to the form of device nodes.

    This is the form that dmsetup writes. Nothing here needs this, because names are served as they are. The exports are renamed, too.
    """
    request = m.Info(tuple(names or ()))
    about = " ".join(names or ())
    devices = ask(control, "info", request, m.InfoAnswer, about=about, command="mangle")
    for device in sorted(devices.devices, key=lambda each: each.name):
        name, uuid = device.name, device.uuid
        correct = mangled(name)
        if mangled(uuid) != uuid:
            raise NbdTargetError(
                f"mangle: {name}: {uuid}: UUID in incorrect form. Unable to change UUID."
            )
        if correct == name:
            what = "name and UUID" if uuid else "name"
            print(f"{name}: {uuid or '[no UUID]'}: {what} already in correct form")
            continue
        print(f"{name}: renaming to {correct}")
        ask(
            control,
            "rename",
            m.Rename(name, correct),
            m.Done,
            about=name,
            command="mangle",
        )


def setgeometry(
    name: Name,
    cylinders: Annotated[
        str, typer.Argument(metavar="CYL", help="Number of cylinders.")
    ],
    heads: Annotated[str, typer.Argument(metavar="HEAD", help="Number of heads.")],
    sectors: Annotated[
        str, typer.Argument(metavar="SECT", help="Number of sectors of a track.")
    ],
    start: Annotated[
        str,
        typer.Argument(
            metavar="START", help="First sector, on the disk that it is a part of."
        ),
    ],
    control: Control = None,
) -> None:
    """Set the disk geometry of a device.

    `info -c -o geometry' and `info --json' show it. NBD clients are not told, because the
    protocol has no geometry. The geometry is dropped when the size of the device changes.
    """
    words = (cylinders, heads, sectors, start)
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise TableError(
            f"setgeometry {name}: Invalid argument: these must be numbers: {' '.join(words)}"
        )
    request = m.SetGeometry(name, *(int(word) for word in words))
    ask(control, "set_geometry", request, m.Done, about=name, command="setgeometry")


# ---- udev ----

Cookie = Annotated[str, typer.Argument(metavar="COOKIE")]


def _say_no_udev(what: str = "there are no cookies") -> None:
    print(
        f"nbdtarget: there is no udev and no device node here, so {what}:"
        " nothing was done",
        file=sys.stderr,
    )


def udevcookies() -> None:
    """List udev cookies. There is no udev here: there never are any."""
    print(COOKIE_COLUMNS)
    _say_no_udev()


def udevcreatecookie() -> None:
    """Make a udev cookie. There is no udev here: none is made."""
    _say_no_udev("no cookie is needed")


def udevreleasecookie(
    cookie: Annotated[str | None, typer.Argument(metavar="[COOKIE]")] = None,
) -> None:
    """Wait for a udev cookie. There is no udev here: nothing is waited for."""
    if cookie is None:
        raise NbdTargetError("udevreleasecookie: No udev transaction cookie given.")
    _say_no_udev("no cookie is waited for")


def udevflags(cookie: Cookie) -> None:
    """Print the flags that a udev cookie holds. Only the number is looked at."""
    flags = _cookie("udevflags", cookie) >> COOKIE_FLAGS_SHIFT
    for bit, name in COOKIE_FLAGS.items():
        if flags >> bit & 1:
            print(f"{name}='1'")


def udevcomplete(cookie: Cookie) -> None:
    """Say that udev is done. There is no udev here: nothing waits for it."""
    number = _cookie("udevcomplete", cookie)
    print(f"DM_COOKIE_COMPLETED=0x{number:<10x}")
    _say_no_udev("no cookie is waited for")


def udevcomplete_all(
    age_in_minutes: Annotated[
        int | None, typer.Argument(metavar="[AGE_IN_MINUTES]")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", hidden=True)] = False,
) -> None:
    """Remove all udev cookies. There is no udev here: there never are any."""
    print("0 semaphores with keys prefixed by 3405 (0xd4d) destroyed. 0 skipped.")
    _say_no_udev()


def mknodes(names: Names = None) -> None:
    """Make device nodes. There are none here: disks are exports, see `version'."""
    _say_no_udev("there are no nodes to make")


def _cookie(verb: str, word: str) -> int:
    try:
        number = int(word, 0)
    except ValueError:
        number = 0
    if not 0 < number <= COOKIE_MAX:
        raise NbdTargetError(f"{verb}: Incorrect cookie value.")
    return number
