# SPDX-License-Identifier: Apache-2.0
"""Completion of command lines in real shells, and the words that the scripts for zsh and fish ask for.

A server that does not answer within half a second is left out, so on a busy machine names may be offered only later.
"""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from nbdtarget.cli.completion import VARIABLE
from nbdtarget.dm.registry import Registry
from tests.support.clients import needs
from tests.support.command_line import CommandLine
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import NBDTARGET

BASH = """
source <("$1" completion bash)
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_nbdtarget_completion "$1" "$2" "$3"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def output(*argv: str, **environment: str) -> str:
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **environment},
    )
    assert done.stderr == ""
    return done.stdout


def in_bash(*line: str) -> list[str]:
    """Return the words that TAB offers at the end of a command line whose first word is the program."""
    bash = shutil.which("bash")
    assert bash is not None
    return output(bash, "-c", BASH, "bash", NBDTARGET, NBDTARGET, *line).split("\n")[
        :-1
    ]


@pytest.fixture
def devices(cli: CommandLine, registry: Registry) -> None:
    for name in ("disk", "dust-1", "other", "x$(reboot)"):
        cli("create", name, "--table", "0 8 zero")


@needs("bash")
@pytest.mark.usefixtures("devices")
def test_bash_completes_names_of_devices() -> None:
    wait_until(lambda: in_bash("remove", "") == ["disk", "dust-1", "other"])


@needs("bash")
@pytest.mark.usefixtures("devices")
def test_bash_does_not_offer_a_name_twice_on_a_line() -> None:
    wait_until(lambda: in_bash("status", "--noflush", "disk", "d") == ["dust-1"])


@needs("bash")
def test_bash_completes_commands_and_options() -> None:
    assert in_bash("remove") == ["remove", "remove_all"]
    assert in_bash("metadata", "check", "--q") == ["--quiet"]


@pytest.mark.usefixtures("devices")
def test_zsh_and_fish_complete_names_of_devices() -> None:
    line = {"_TYPER_COMPLETE_ARGS": "nbdtarget resume d"}
    fish = {VARIABLE: "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    wait_until(lambda: output(NBDTARGET, **line, **fish) == "disk\ndust-1\n")
    zsh = {VARIABLE: "complete_zsh"}
    offered = '_arguments \'*: :(("disk"\n"dust-1"))\'\n'
    wait_until(lambda: output(NBDTARGET, **line, **zsh) == offered)


@needs("zsh")
@pytest.mark.usefixtures("devices")
def test_zsh_completes_names_of_devices() -> None:
    # The script prints the words that zsh's own completion would get, as that needs a terminal.
    script = """
    compdef() {}; _arguments() { print -r -- "$@" }
    source <("$1" completion zsh)
    path=(${1:h} $path)
    words=(nbdtarget remove d); CURRENT=3
    _nbdtarget_completion
    """
    zsh = str(shutil.which("zsh"))
    argv = zsh, "-f", "-c", script, "zsh", NBDTARGET
    wait_until(lambda: output(*argv) == '*: :(("disk" "dust-1"))\n')


@needs("fish")
@pytest.mark.usefixtures("devices")
def test_fish_completes_names_of_devices(tmp_path: Path) -> None:
    path = f"{Path(NBDTARGET).parent}:{os.environ['PATH']}"
    script = "nbdtarget completion fish | source; complete -C 'nbdtarget remove d'"
    fish = str(shutil.which("fish"))
    places = {"PATH": path, "HOME": str(tmp_path)}
    wait_until(lambda: output(fish, "-c", script, **places) == "disk\ndust-1\n")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_script_runs_the_program(cli: CommandLine, shell: str) -> None:
    assert f"{VARIABLE}=complete_{shell}" in cli("completion", shell)


def test_unknown_shell_is_refused(cli: CommandLine) -> None:
    assert "'bash', 'zsh', 'fish'" in cli("completion", "tcsh", status=2)


def test_server_that_does_not_answer_is_left_out(
    cli: CommandLine, tmp_path: Path
) -> None:
    directory = tmp_path / "nbdtarget"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(directory / "control.sock"))
        silent.listen()
        environment = {VARIABLE: "complete_bash", "COMP_CWORD": "2"}
        assert output(NBDTARGET, **environment, COMP_WORDS="nbdtarget remove ") == "\n"
