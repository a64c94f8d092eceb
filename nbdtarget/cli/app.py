# SPDX-License-Identifier: Apache-2.0
"""The command line: it reads the options, calls one function, and prints one line if that fails.

Exit status: 0; 1 for a failure, with one line on stderr; 2 for wrong usage. There is no logic here: a
command asks the server over the control socket, or runs a job of `nbdtarget.porcelain`.

Nothing heavy is imported before it is known which command runs: `status` in a shell loop
should cost little more than starting Python. So only the module of the command that was typed is imported, and Typer
looks only at its options: for all commands that takes 0.15 s. Help, completion and a word that is no command need all of them.
"""

import io
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Final, NoReturn

import typer

from nbdtarget import __version__
from nbdtarget.cli import completion
from nbdtarget.common.collector import look_no_more, look_rarely
from nbdtarget.common.errors import NbdTargetError

__all__ = ["COMMANDS", "main", "make_app", "run"]

# The modules of this package that have commands, with the names of these: in the order of the help.
COMMANDS: Final[dict[str, tuple[str, ...]]] = {
    "clone": ("clone",),
    "cache": ("cache",),
    "uncache": ("uncache",),
    "export": ("export",),
    "scratch": ("scratch", "reset"),
    "serve": ("serve",),
    "upgrade": ("upgrade",),
    "access": ("access",),
    "tables": ("create", "load", "reload", "clear", "wipe_table"),
    "devices": (
        *("suspend", "resume", "remove", "remove_all"),
        *("rename", "message", "wait"),
    ),
    "listing": (
        *("status", "table", "measure", "info", "ls"),
        *("deps", "targets", "version", "target-version"),
    ),
    "dmsetup": (
        *("help", "splitname", "mangle", "setgeometry"),
        *("udevcookies", "udevcreatecookie", "udevreleasecookie"),
        *("udevflags", "udevcomplete", "udevcomplete_all", "mknodes"),
    ),
    "events": ("events",),
    "top": ("top",),
    "page": ("page",),
    "stats": ("stats",),
    "log_writes": ("replay-log",),
    "torture": ("torture",),
    "advise": ("advise",),
    "metadata": ("metadata",),
    "sources": ("sources",),
    "doctor": ("doctor",),
    "completion": ("completion",),
}


def make_app(modules: Iterable[str] = COMMANDS) -> typer.Typer:
    """Return the program with the commands of these modules; default: with all commands."""
    app = typer.Typer(
        name="nbdtarget",
        no_args_is_help=False,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in modules:
        import_module(f"nbdtarget.cli.{module}").register(app)
    app.callback()(_program)
    return app


def _modules_for(argv: list[str]) -> Iterable[str]:
    """The modules whose commands a command line may mean."""
    word = argv[0] if argv else ""
    if word == "--version":
        return []
    for module, names in COMMANDS.items():
        if word in names and word != "help":  # which explains any of them
            return [module]
    return COMMANDS


def _print_version(wanted: bool) -> None:
    if wanted:
        from nbdtarget.fast.compiled import describe

        print(f"nbdtarget {__version__}, {describe()}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """device-mapper's clone and cache over NBD, without a kernel module and without root.

    Start with one of these, each of which serves one disk: export, clone, cache. All other commands
    talk to a server that is running. Its sockets are in the runtime directory: $RUNTIME_DIRECTORY,
    $XDG_RUNTIME_DIR/nbdtarget, /run/nbdtarget for root, or ~/.local/state/nbdtarget, whichever is
    there first. `nbdtarget COMMAND --help` explains a command.
    """


# Typer brings its own click in some versions: its exceptions are reached through Typer.
_UsageError: Final[type[BaseException]] = typer.BadParameter.__mro__[1]


def main() -> NoReturn:
    """The console script."""
    look_rarely()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A name with letters that the terminal does not have is printed all the same.
        sys.stdout.reconfigure(errors="backslashreplace")
    status = run(sys.argv[1:])
    process = sys.modules.get("nbdtarget.daemon.process")
    if process is not None and process.must_leave_at_once():
        # A thread on a dead disk cannot be ended, and Python would wait for it.
        sys.stderr.flush()
        os._exit(status)
    look_no_more()
    sys.exit(status)


def run(argv: list[str]) -> int:
    """Run one command line. Returns the exit status."""
    try:
        if completion.VARIABLE in os.environ:
            completion.answer(make_app())
        status = make_app(_modules_for(argv))(
            argv, prog_name="nbdtarget", standalone_mode=False
        )
        sys.stdout.flush()
    except typer.Abort:
        return 1
    except NbdTargetError as error:
        return _fail(error.lines())
    except BrokenPipeError:
        # For example `nbdtarget status | head`. The exit must not flush to the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except _UsageError as error:
        return _usage(error)
    return status if isinstance(status, int) else 0


def _fail(reasons: list[str]) -> int:
    for reason in reasons:
        print("nbdtarget:", " ".join(reason.split()), file=sys.stderr)
    return 1


def _usage(error: BaseException) -> int:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "nbdtarget"
    message = getattr(error, "format_message", error.__str__)()
    message = message.removeprefix("Invalid value: ")
    print(
        f"nbdtarget: {' '.join(message.split())} (see {command} --help)",
        file=sys.stderr,
    )
    return 2
