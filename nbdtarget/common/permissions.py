# SPDX-License-Identifier: Apache-2.0
"""The words that allow what is refused otherwise: a person gives them with one command.

They are options of the verbs that load a table, and no words of a table line: a line that stands in
a configuration file would allow it at every start.

    overwrite    data on the disk may be lost: metadata is made anew although the disk holds data
    moved        the disk is the one that the metadata names, under another name or in another place
    other-disk   the disk is another one, or cannot be recognised; the caller answers for that

This module imports nothing heavy, so that the command line can use it.
"""

from typing import Final, Literal

__all__ = ["MOVED", "OTHER_DISK", "OVERWRITE", "Permission", "option_of", "permissions"]

Permission = Literal["overwrite", "moved", "other-disk"]

OVERWRITE: Final = "overwrite"
MOVED: Final = "moved"
OTHER_DISK: Final = "other-disk"


def option_of(permission: Permission) -> str:
    """The command line option that gives the word."""
    return "--accept-other-disk" if permission == OTHER_DISK else f"--{permission}"


def permissions(
    *, overwrite: bool = False, moved: bool = False, accept_other_disk: bool = False
) -> frozenset[Permission]:
    """The words for the options `--overwrite`, `--moved` and `--accept-other-disk`."""
    given: list[Permission] = []
    if overwrite:
        given.append(OVERWRITE)
    if moved:
        given.append(MOVED)
    if accept_other_disk:
        given.append(OTHER_DISK)
    return frozenset(given)
