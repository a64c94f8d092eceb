# SPDX-License-Identifier: Apache-2.0
"""Disks that a filter of nbdkit would serve wrong, without an error.

- `tar` serves the bytes that lie in the archive. Of a member that tar has stored as a sparse file these are its data without its
  holes, with a map before them: not the disk.
- `gzip` serves the first member of a file that consists of several (nbdkit 1.32.5).

The first is looked for, and refused. For the second the whole file would have to be unpacked, so there is a warning; `gzip:PATH` reads all members.
"""

import asyncio
import logging
import tarfile
from typing import Final

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper.words import NbdkitName

__all__ = ["refuse_wrong_filters"]

MEMBERS_MAX: Final = 4096  # of an archive; those behind them are not looked at

log = logging.getLogger(__name__)


async def refuse_wrong_filters(words: NbdkitName) -> None:
    """Refuse a sparse member of a tar archive, and warn of what else may be served wrong.

    Raises: ResolveError.
    """
    if "gzip" in words.filters:
        log.warning(
            "%s: nbdkit's filter gzip serves only the first member of a file that consists of several: compare the size, or write gzip:PATH",
            words.shown,
        )
    entry = dict(words.parameters).get("tar-entry", "")
    if words.filters != ("tar",) or not words.file or not entry:
        return
    if await asyncio.to_thread(_is_sparse, words.file, entry):
        raise ResolveError(
            words.shown,
            f"tar has stored {entry} as a sparse file, which nbdkit serves wrong: `tar -xf {words.file} {entry}' unpacks it",
        )


def _is_sparse(path: str, entry: str) -> bool:
    """Whether the first member of this name is sparse; False also if the archive cannot be read: nbdkit will say so."""
    try:
        with tarfile.open(path, "r:") as archive:
            for nr, member in enumerate(archive):
                if member.name == entry:
                    return member.issparse()
                if nr == MEMBERS_MAX:
                    return False
    except (OSError, tarfile.TarError) as error:
        log.debug("%s: %s", path, error)
    return False
