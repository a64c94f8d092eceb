# SPDX-License-Identifier: Apache-2.0
"""The files that the offline metadata tools read and write, and what may go wrong with them.

A metadata file is opened and locked as the server does it, so metadata in use is refused. An output
appears, or is replaced, only when it is complete; or it is taken back if writing it fails.
"""

import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO, Final, TextIO, TypeVar

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.devices import resolve
from nbdtarget.devices.file.open import create_fd, give_space, open_fd, sync_directory
from nbdtarget.targets.metadata_io import run_file
from nbdtarget_metadata.errors import MetadataError, NotOurs
from nbdtarget_metadata.log.foreign import KERNEL_CACHE, KERNEL_CLONE
from nbdtarget_metadata.log.superblock import SUPERBLOCK_MAGIC
from nbdtarget_metadata.operations import Steps

__all__ = [
    "MetadataFile",
    "dump_input",
    "dump_output",
    "failing_at",
    "opened",
    "output_of",
    "pieces_of",
    "refuse_same",
]

T = TypeVar("T")

PIECE_SIZE: Final = 1 << 16
HEAD_SIZE: Final = 512


class MetadataFile:
    """An open and locked metadata file."""

    def __init__(self, path: str, fd: int, size: int) -> None:
        self.path = path
        self.fd = fd
        self.size = size

    def run(self, steps: Steps[T], *, unreadable: list[int] | None = None) -> T:
        """Run `steps`; what goes wrong names the file. Raises: NbdTargetError."""
        try:
            return run_file(self.fd, steps, name=self.path, unreadable=unreadable)
        except NotOurs as error:
            if _looks_like_dump(os.pread(self.fd, HEAD_SIZE, 0)):
                raise NbdTargetError(
                    f"{self.path}: looks like a dump, not metadata:"
                    " `nbdtarget metadata restore` makes metadata of it"
                ) from error
            hint = ""
            if error.found in (KERNEL_CACHE, KERNEL_CLONE):
                hint = (
                    ": `nbdtarget metadata import` makes metadata of this program of it"
                )
            raise NbdTargetError(f"{self.path}: {error}{hint}") from error
        except MetadataError as error:
            raise NbdTargetError(f"{self.path}: {error}") from error


@contextmanager
def opened(path: str, *, read_only: bool = True) -> Iterator[MetadataFile]:
    fd, size = open_fd(path, read_only=read_only)
    try:
        yield MetadataFile(path, fd, size)
    finally:
        os.close(fd)


@contextmanager
def output_of(path: str, preferred: int) -> Iterator[MetadataFile]:
    """Open the file that metadata is written to; a missing or empty one is given `preferred` bytes.

    If the body fails, such a file is removed, or emptied, again.
    """
    undo: Callable[[], None] | None = None
    if not os.path.lexists(path):
        file = MetadataFile(path, create_fd(path, preferred), preferred)
        undo = partial(os.unlink, path)
    else:
        if _is_empty_file(path):
            with failing_at(path):
                give_space(path, preferred)
            undo = partial(os.truncate, path, 0)
        try:
            file = MetadataFile(path, *open_fd(path, read_only=False))
        except NbdTargetError:
            if undo is not None:
                undo()
            raise
    try:
        yield file
    except BaseException:
        if undo is not None:
            undo()
        raise
    finally:
        os.close(file.fd)


@contextmanager
def dump_output(path: str) -> Iterator[TextIO]:
    """Open the file that a dump is written to. It appears, or is replaced, when it is complete.

    Durable: the file and its name, unless it is a pipe.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        if os.path.isdir(path) or stat.S_ISBLK(os.stat(path).st_mode):
            raise NbdTargetError(f"{path}: is not a file")
        with failing_at(path), open(path, "w", encoding="ascii") as pipe:
            yield pipe
        return
    _refuse_metadata(path)
    directory, name = os.path.split(os.path.realpath(path))
    with failing_at(path):
        fd, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
        try:
            with open(fd, "w", encoding="ascii") as text:
                yield text
                text.flush()
                os.fchmod(fd, 0o666 & ~_umask())
                os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_directory(directory)


@contextmanager
def dump_input(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield sys.stdin.buffer
    else:
        with open(source, "rb") as file:
            yield file


def pieces_of(source: str, text: BinaryIO) -> Iterator[bytes]:
    first = True
    while piece := text.read(PIECE_SIZE):
        if first and piece.startswith(SUPERBLOCK_MAGIC):
            raise NbdTargetError(f"{source}: is metadata, not a dump of it")
        first = False
        yield piece


@contextmanager
def failing_at(path: str) -> Iterator[None]:
    """Turn an error of the system into one that names the file."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise NbdTargetError(f"{path}: {reason}") from error


def refuse_same(path: str, output: str) -> None:
    if resolve.identity(path) == resolve.identity(output):
        raise NbdTargetError(
            f"{output}: is the input itself, by this or another name: give another file"
        )


def _refuse_metadata(output: str) -> None:
    """Refuse to replace metadata by a dump: that would be a mistake of the user."""
    if os.path.isfile(output):
        with failing_at(output), open(output, "rb") as file:
            if file.read(len(SUPERBLOCK_MAGIC)) == SUPERBLOCK_MAGIC:
                raise NbdTargetError(
                    f"{output}: holds metadata: write the dump to another file"
                )


def _looks_like_dump(head: bytes) -> bool:
    text = head.lstrip()
    return (text.startswith(b"{") and b'"' in text) or text.startswith(b"<superblock")


def _is_empty_file(path: str) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False  # opening it says why
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
