# SPDX-License-Identifier: Apache-2.0
"""The offline metadata tools: files in, one function of `metadata` run over them, an answer out.

Each opens and locks its file as the server does, so metadata in use is refused. What a tool only
looks at is opened read-only. What it makes it removes again if it fails; what it writes over is
unusable, not half-believed, until the last write (`metadata.restore`).

The damage itself, and what may be believed in spite of it, is explained in `metadata.check` and
`metadata.salvage`.
"""

import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO, Final, TypeVar

from metadata.arena import NR_REGIONS_MAX
from metadata.content import CloneContent
from metadata.dump import flag_names
from metadata.dump_parser import parse
from metadata.envelope import FORMAT_VERSION
from metadata.errors import MetadataError, NotOurs
from metadata.kinds import CLONE, Kind, find_kind
from metadata.operations import Steps
from metadata.salvage import Salvaged
from metadata.sizing import clone_sizes, nr_regions_of, region_size_fault
from metadata.superblock import (
    SUPERBLOCK_MAGIC,
    Found,
    choose_superblock,
    read_area,
)
from nbdtarget.devices import resolve
from nbdtarget.devices.file_open import create_fd, open_fd
from nbdtarget.errors import NbdTargetError
from nbdtarget.metadata_answers import (
    CheckAnswer,
    InfoAnswer,
    RestoreAnswer,
    SizeAnswer,
)
from nbdtarget.metadata_io import run_file

__all__ = [
    "check",
    "dump",
    "dump_to_file",
    "info",
    "repair",
    "restore",
    "size",
]

T = TypeVar("T")

PIECE_SIZE: Final = 1 << 16
HEAD_SIZE: Final = 512


class _File:
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
            raise NbdTargetError(f"{self.path}: {error}") from error
        except MetadataError as error:
            raise NbdTargetError(f"{self.path}: {error}") from error


@contextmanager
def _opened(path: str, *, read_only: bool = True) -> Iterator[_File]:
    fd, size = open_fd(path, read_only=read_only)
    try:
        yield _File(path, fd, size)
    finally:
        os.close(fd)


def _looks_like_dump(head: bytes) -> bool:
    text = head.lstrip()
    return text.startswith(b"{") and b'"' in text


# ---- info ----------------------------------------------------------------------------------


def info(path: str) -> InfoAnswer:
    """Tell what the newest superblock says; nothing else is read. Raises: NbdTargetError."""
    with _opened(path) as file:
        kind = file.run(find_kind(file.size))
        found = file.run(_choose(file.size))
        live = found.superblock
        return InfoAnswer(
            file=path,
            kind=kind.name,
            format_version=FORMAT_VERSION,
            uuid=live.uuid.hex(),
            generation=live.generation,
            flags=flag_names(live.flags),
            region_size=live.region_size,
            target_size=live.target_size,
            nr_regions=live.nr_regions,
            nr_hydrated=live.nr_hydrated,
            nr_commits=live.nr_commits,
            nr_compactions=live.nr_compactions,
            device_size=file.size,
            arena=live.arena,
            arena_blocks=live.arena_blocks,
            snapshot_blocks=live.snapshot_blocks,
            journal_blocks=live.journal_blocks,
            journal_blocks_max=live.arena_end - live.journal_block,
            degraded=list(found.notes),
        )


def _choose(device_size: int) -> Steps[Found]:
    area = yield from read_area(device_size)
    return choose_superblock(area, admit_needs_check=True)


# ---- check ---------------------------------------------------------------------------------


def check(
    path: str,
    *,
    auto_repair: bool = False,
    clear_needs_check: bool = False,
    super_block_only: bool = False,
    skip_unused: bool = False,
) -> CheckAnswer:
    """Look at everything; write only if there is something to write and it was asked for.

    Raises: NbdTargetError: it is no metadata, it cannot be read, it is in use. Damage is told
        in the answer.
    """
    with _opened(path) as file:
        kind = file.run(find_kind(file.size))
        examine = kind.examine(
            file.size,
            records=not super_block_only,
            unused=not super_block_only and not skip_unused,
        )
        findings = file.run(examine)
    done: tuple[str, ...] = ()
    heals = auto_repair and bool(findings.unhealed)
    clears = (auto_repair or clear_needs_check) and findings.needs_check
    if findings.complete and not findings.damage and (heals or clears):
        # Another lock: what was found may have changed, so `mend` looks at everything again.
        with _opened(path, read_only=False) as file:
            done = file.run(
                kind.mend(file.size, heal=auto_repair, clear_needs_check=clears)
            )
            findings = file.run(kind.examine(file.size))
    live = findings.superblock
    return CheckAnswer(
        file=path,
        kind=kind.name,
        uuid=live.uuid.hex() if live else None,
        generation=live.generation if live else None,
        nr_regions=live.nr_regions if live else None,
        nr_hydrated=live.nr_hydrated if live else None,
        needs_check=findings.needs_check,
        complete=findings.complete,
        damage=findings.damage,
        copies=findings.copies,
        orphans=findings.orphans,
        orphan_blocks=findings.orphan_blocks,
        leaked_blocks=findings.leaked_blocks,
        done=done,
    )


# ---- dump ----------------------------------------------------------------------------------


def dump(
    path: str, write: Callable[[str], object], *, repair: bool = False
) -> tuple[str, ...]:
    """Write the metadata as JSON. Returns what was broken and lost, a line each.

    Args: repair: dump what is left, if there is damage.
    Raises: NbdTargetError; then nothing was written, unless it is `write` that fails.
    """
    with _opened(path) as file:
        if repair:
            kind, salvaged = _salvage(file)
        else:
            kind = file.run(find_kind(file.size))
            salvaged = Salvaged(file.run(kind.read_content(file.size)), ())
    for piece in kind.render(salvaged.content):
        write(piece)
    return _told(path, salvaged)


def dump_to_file(path: str, output: str, *, repair: bool = False) -> tuple[str, ...]:
    """As `dump`, into a file that appears, or is replaced, when it is complete."""
    _refuse_same(path, output)
    if os.path.exists(output) and not os.path.isfile(output):
        if os.path.isdir(output) or stat.S_ISBLK(os.stat(output).st_mode):
            raise NbdTargetError(f"{output}: is not a file")
        with _failing_at(output), open(output, "w", encoding="ascii") as pipe:
            return dump(path, pipe.write, repair=repair)
    _refuse_metadata(output)
    directory, name = os.path.split(os.path.realpath(output))
    with _failing_at(output):
        fd, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
        try:
            with open(fd, "w", encoding="ascii") as text:
                told = dump(path, text.write, repair=repair)
                text.flush()
                os.fchmod(fd, 0o666 & ~_umask())
                os.fsync(fd)
            os.replace(temporary, output)
        except BaseException:
            os.unlink(temporary)
            raise
    return told


def _told(path: str, salvaged: Salvaged) -> tuple[str, ...]:
    lines = [f"{path}: {each}" for each in salvaged.damage]
    loss = _loss(salvaged.content)
    if loss:
        lines.append(f"{path}: {loss}")
    return tuple(lines)


def _loss(content: CloneContent) -> str:
    """Say what is missing; empty if nothing is."""
    if content.nr_lost is None:
        return (
            f"generation {content.generation + 1} may have been acknowledged and is"
            f" lost: this is generation {content.generation}"
        )
    if content.nr_lost:
        return (
            f"{content.nr_lost} hydrated regions of generation {content.generation}"
            " are lost: nothing intact says which ones"
        )
    return ""


# ---- restore and repair --------------------------------------------------------------------


def restore(
    source: str, output: str, *, overwrite: bool = False, force: bool = False
) -> RestoreAnswer:
    """Make metadata of a dump ("-": stdin).

    Args:
        overwrite: whatever the output holds may go.
        force: the dump may say that something is lost.
    Raises: NbdTargetError; then the output is as it was, but for a failing write.
    """
    if source != "-":
        _refuse_same(source, output)
    with _failing_at(source), _dump_input(source) as text:
        try:
            content = parse(_pieces(source, text))
        except MetadataError as error:
            raise NbdTargetError(f"{source}: {error}") from error
    if not force:
        _refuse_loss(source, (), content)
    _write_out(CLONE, content, output, overwrite=overwrite)
    return _restored(CLONE, content, output, ())


def repair(
    path: str, output: str, *, overwrite: bool = False, force: bool = False
) -> RestoreAnswer:
    """Write what is left of damaged metadata to another file. The input is only ever read.

    Args:
        overwrite: whatever the output holds may go.
        force: go on though hydrated regions are lost.
    Raises: NbdTargetError; then the output is as it was, but for a failing write.
    """
    _refuse_same(path, output)
    with _opened(path) as file:
        kind, salvaged = _salvage(file)
        if not force:
            _refuse_loss(path, salvaged.damage, salvaged.content)
        _write_out(kind, salvaged.content, output, overwrite=overwrite)
    return _restored(kind, salvaged.content, output, salvaged.damage)


def _salvage(file: _File) -> tuple[Kind, Salvaged]:
    """Read what is left, around blocks that cannot be read."""
    unreadable: list[int] = []
    kind = file.run(find_kind(file.size), unreadable=unreadable)
    salvaged = file.run(kind.salvage(file.size), unreadable=unreadable)
    if unreadable:
        blocks = sorted({*unreadable})
        line = f"{len(blocks)} blocks cannot be read, the first at byte {blocks[0]}"
        salvaged = salvaged._replace(damage=(line, *salvaged.damage))
    return kind, salvaged


def _refuse_loss(path: str, damage: tuple[str, ...], content: CloneContent) -> None:
    loss = _loss(content)
    if loss:
        reasons = "; ".join((*damage, loss))
        raise NbdTargetError(
            f"{path}: {reasons}. Lost regions would be read from the source again, and"
            " hydration would copy the source over what clients wrote there; --force"
            " accepts that"
        )


def _restored(
    kind: Kind, content: CloneContent, output: str, damage: tuple[str, ...]
) -> RestoreAnswer:
    return RestoreAnswer(
        file=output,
        kind=kind.name,
        uuid=content.uuid.hex(),
        generation=content.generation,
        nr_regions=len(content.hydrated),
        nr_hydrated=content.hydrated.count(),
        nr_lost=content.nr_lost,
        damage=damage,
    )


def _write_out(
    kind: Kind, content: CloneContent, output: str, *, overwrite: bool
) -> None:
    """Restore to `output`; a missing or empty file is given the preferred size."""
    preferred = clone_sizes(len(content.hydrated)).preferred
    undo: Callable[[], None] | None = None
    if not os.path.lexists(output):
        fd, size = create_fd(output, preferred), preferred
        file = _File(output, fd, size)
        undo = partial(os.unlink, output)
    else:
        if _is_empty_file(output):
            with _failing_at(output):
                os.truncate(output, preferred)
            undo = partial(os.truncate, output, 0)
        try:
            file = _File(output, *open_fd(output, read_only=False))
        except NbdTargetError:
            if undo is not None:
                undo()
            raise
    try:
        steps = kind.restore(content, device_size=file.size, overwrite=overwrite)
        file.run(steps)
    except BaseException:
        if undo is not None:
            undo()
        raise
    finally:
        os.close(file.fd)


def _is_empty_file(path: str) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False  # opening it says why
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


@contextmanager
def _dump_input(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield sys.stdin.buffer
    else:
        with open(source, "rb") as file:
            yield file


def _pieces(source: str, text: BinaryIO) -> Iterator[bytes]:
    first = True
    while piece := text.read(PIECE_SIZE):
        if first and piece.startswith(SUPERBLOCK_MAGIC):
            raise NbdTargetError(f"{source}: is metadata, not a dump of it")
        first = False
        yield piece


@contextmanager
def _failing_at(path: str) -> Iterator[None]:
    """Name the file in what the system refuses."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise NbdTargetError(f"{path}: {reason}") from error


def _refuse_same(path: str, output: str) -> None:
    if resolve.identity(path) == resolve.identity(output):
        raise NbdTargetError(f"{output}: is the input, by this or another name")


def _refuse_metadata(output: str) -> None:
    """A dump replaces files; metadata under that name is a slip of the hand."""
    if os.path.isfile(output):
        with _failing_at(output), open(output, "rb") as file:
            if file.read(len(SUPERBLOCK_MAGIC)) == SUPERBLOCK_MAGIC:
                raise NbdTargetError(f"{output}: holds metadata; a dump goes elsewhere")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- size ----------------------------------------------------------------------------------


def size(
    *, device_size: int | None, region_size: int | None, nr_regions: int | None
) -> SizeAnswer:
    """Tell how large the metadata of a clone is: of a device, or of so many regions.

    Raises: NbdTargetError: there can be no such clone.
    """
    if nr_regions is None:
        assert device_size is not None
        assert region_size is not None
        fault = region_size_fault(region_size)
        if fault:
            raise NbdTargetError(f"region size {region_size}: {fault}")
        nr_regions = nr_regions_of(device_size, region_size)
    if nr_regions < 1:
        raise NbdTargetError("a clone has one region at least")
    if nr_regions > NR_REGIONS_MAX:
        raise NbdTargetError(
            f"{nr_regions} regions: Too many regions. Consider increasing the region size"
        )
    sizes = clone_sizes(nr_regions)
    return SizeAnswer(
        nr_regions=sizes.nr_regions,
        smallest=sizes.smallest,
        preferred=sizes.preferred,
    )
