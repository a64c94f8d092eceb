# SPDX-License-Identifier: Apache-2.0
"""The commands of `helper:NAME`, which only the configuration file gives: a table or a message can name one, and not make one."""

from collections.abc import Mapping, Sequence

__all__ = ["helper_commands", "set_helper_commands"]

# A process has one configuration, so there is one of these.
_commands: dict[str, tuple[str, ...]] = {}


def set_helper_commands(commands: Mapping[str, Sequence[str]]) -> None:
    """Set the commands of this process, by NAME; the first word is the program."""
    _commands.clear()
    _commands.update({name: tuple(words) for name, words in commands.items()})


def helper_commands() -> dict[str, tuple[str, ...]]:
    """Return the commands, by NAME."""
    return dict(_commands)
