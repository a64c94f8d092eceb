# SPDX-License-Identifier: Apache-2.0
"""The offline metadata tools: files in, one function of `metadata` run over them, an answer out.

Each opens and locks its file as the server does, so metadata in use is refused. What a tool only
looks at is opened read-only. What it makes it removes again if it fails; what it writes over is
unusable, not half-believed, until the last write (`nbdtarget_metadata.tools.clone_restore`).

The damage itself, and what may be believed in spite of it, is explained in `nbdtarget_metadata.tools.check` and
`nbdtarget_metadata.tools.clone_salvage`.
"""

import os
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, Final, TypeVar

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import SECTOR
from nbdtarget.devices import resolve
from nbdtarget.devices.file.open import create_fd, give_space, open_fd, sync_directory
from nbdtarget.targets.metadata_io import run_file
from nbdtarget.tools.answers import (
    CacheSizeAnswer,
    CheckAnswer,
    CloneSizeAnswer,
    ImportAnswer,
    InfoAnswer,
    RestoreAnswer,
    check_answer,
    import_answer,
    info_answer,
    loss_of,
    restore_answer,
)
from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.records import LOGGED, NR_CBLOCKS_MAX
from nbdtarget_metadata.cache.superblock import DIRTY_LOG, NO_POLICY
from nbdtarget_metadata.clone.superblock import NR_REGIONS_MAX
from nbdtarget_metadata.errors import MetadataError, NotOurs
from nbdtarget_metadata.log.foreign import KERNEL_CACHE, KERNEL_CLONE
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    SUPERBLOCK_MAGIC,
    Found,
    choose_superblock,
    read_area,
)
from nbdtarget_metadata.operations import Steps
from nbdtarget_metadata.tools.cache_xml import parse_xml, render_xml
from nbdtarget_metadata.tools.check import examine, mend
from nbdtarget_metadata.tools.kernel_import import (
    find_kernel_kind,
    import_cache,
    import_clone,
)
from nbdtarget_metadata.tools.kinds import (
    CACHE,
    CLONE,
    Content,
    Kind,
    find_kind,
    parse_dump,
)
from nbdtarget_metadata.tools.salvage import Salvaged
from nbdtarget_metadata.tools.sizing import (
    block_size_fault,
    cache_sizes,
    clone_sizes,
    nr_regions_of,
    region_size_fault,
)

__all__ = [
    "cache_size",
    "check",
    "clone_size",
    "dump",
    "dump_to_file",
    "import_kernel",
    "info",
    "repair",
    "restore",
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
            hint = ""
            if error.found in (KERNEL_CACHE, KERNEL_CLONE):
                hint = (
                    ": `nbdtarget metadata import` makes metadata of this program of it"
                )
            raise NbdTargetError(f"{self.path}: {error}{hint}") from error
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
    return (text.startswith(b"{") and b'"' in text) or text.startswith(b"<superblock")


# ---- info ----


def info(path: str) -> InfoAnswer:
    """Tell what the newest superblock says; nothing else is read. Raises: NbdTargetError."""
    with _opened(path) as file:
        kind = file.run(find_kind(file.size))
        found = file.run(_choose(kind, file.size))
        return info_answer(path, kind.name, found, file.size)


def _choose(kind: Kind, device_size: int) -> Steps[Found[Any]]:
    area = yield from read_area(device_size)
    return choose_superblock(kind.superblock, area, admit_needs_check=True)


# ---- check ----


def check(
    path: str,
    *,
    auto_repair: bool = False,
    clear_needs_check: bool = False,
    super_block_only: bool = False,
    skip_unused: bool = False,
) -> CheckAnswer:
    """Look at everything; write only if there is something to write and it was asked for.

    Raises: NbdTargetError: it is not metadata, it cannot be read, or it is in use. The answer
        names damage.
    """
    with _opened(path) as file:
        kind = file.run(find_kind(file.size))
        examining = examine(
            kind.checks,
            file.size,
            records=not super_block_only,
            unused=not super_block_only and not skip_unused,
        )
        findings = file.run(examining)
    done: tuple[str, ...] = ()
    heals = auto_repair and bool(findings.unhealed)
    clears = (auto_repair or clear_needs_check) and findings.needs_check
    if findings.complete and not findings.damage and (heals or clears):
        # Another lock: what was found may have changed, so `mend` looks at everything again.
        with _opened(path, read_only=False) as file:
            done = file.run(
                mend(
                    kind.checks,
                    file.size,
                    heal=auto_repair,
                    clear_needs_check=clears,
                )
            )
            findings = file.run(examine(kind.checks, file.size))
    return check_answer(path, kind.name, findings, done)


# ---- dump ----


def dump(
    path: str,
    write: Callable[[str], object],
    *,
    repair: bool = False,
    xml: bool = False,
) -> tuple[str, ...]:
    """Write the metadata as text. Returns what was broken and lost, a line each.

    Args:
        repair: dump what is left, if there is damage.
        xml: as the tools for the kernel's caches; else as JSON.

    Raises: NbdTargetError; then nothing was written, unless it is `write` that fails.
    """
    with _opened(path) as file:
        if repair:
            kind, salvaged = _salvage(file)
        else:
            kind = file.run(find_kind(file.size))
            salvaged = Salvaged(file.run(kind.read_content(file.size)), ())
    render = _xml_renderer(path, salvaged.content) if xml else kind.render
    for piece in render(salvaged.content):
        write(piece)
    return _told(path, salvaged)


def _xml_renderer(
    path: str, content: Content
) -> Callable[[CacheContent], Iterator[str]]:
    if not isinstance(content, CacheContent):
        raise NbdTargetError(f"{path}: only the metadata of a cache goes into XML")
    loss = loss_of(content)
    if loss:
        raise NbdTargetError(
            f"{path}: {loss}: XML cannot express this: dump it as JSON"
        )
    return render_xml


def dump_to_file(
    path: str, output: str, *, repair: bool = False, xml: bool = False
) -> tuple[str, ...]:
    """As `dump`, into a file that appears, or is replaced, when it is complete.

    Durable: the file and its name, unless it is a pipe.
    """
    _refuse_same(path, output)
    if os.path.exists(output) and not os.path.isfile(output):
        if os.path.isdir(output) or stat.S_ISBLK(os.stat(output).st_mode):
            raise NbdTargetError(f"{output}: is not a file")
        with _failing_at(output), open(output, "w", encoding="ascii") as pipe:
            return dump(path, pipe.write, repair=repair, xml=xml)
    _refuse_metadata(output)
    directory, name = os.path.split(os.path.realpath(output))
    with _failing_at(output):
        fd, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
        try:
            with open(fd, "w", encoding="ascii") as text:
                told = dump(path, text.write, repair=repair, xml=xml)
                text.flush()
                os.fchmod(fd, 0o666 & ~_umask())
                os.fsync(fd)
            os.replace(temporary, output)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_directory(directory)
    return told


def _told(path: str, salvaged: Salvaged[Any]) -> tuple[str, ...]:
    lines = [f"{path}: {each}" for each in salvaged.damage]
    loss = loss_of(salvaged.content)
    if loss:
        lines.append(f"{path}: {loss}")
    return tuple(lines)


# ---- restore and repair ----


def restore(
    source: str,
    output: str,
    *,
    overwrite: bool = False,
    force: bool = False,
    origin_size: int | None = None,
    omit_clean_shutdown: bool = False,
    trust_dirty: bool = False,
) -> RestoreAnswer:
    """Make metadata of a dump ("-": stdin), in JSON or XML.

    Args:
        overwrite: whatever the output holds may go.
        force: the dump may say that something is lost.
        origin_size: bytes; XML does not say it.
        omit_clean_shutdown: as if there had been none: every mapped block counts as dirty.
        trust_dirty: believe the dirty bits of XML, which cannot say which tool wrote it: some write
            "false" for each block of a cache that they cannot read in full.
    Raises: NbdTargetError; then the output is as it was, but for a failing write.
    """
    if source != "-":
        _refuse_same(source, output)
    with _failing_at(source), _dump_input(source) as text:
        try:
            kind, content = _parse(
                source,
                text,
                origin_size=origin_size,
                omit_clean_shutdown=omit_clean_shutdown,
                trust_dirty=trust_dirty,
            )
        except MetadataError as error:
            raise NbdTargetError(f"{source}: {error}") from error
    if not force:
        _refuse_loss(source, (), content)
    _write_out(kind, content, output, overwrite=overwrite)
    return restore_answer(output, content, ())


def _parse(
    source: str,
    text: BinaryIO,
    *,
    origin_size: int | None,
    omit_clean_shutdown: bool,
    trust_dirty: bool,
) -> tuple[Kind, Content]:
    pieces = _pieces(source, text)
    first = next(pieces, b"")
    rest: Iterable[bytes] = chain([first], pieces)
    if not first.lstrip().startswith(b"<"):
        if origin_size is not None:
            raise NbdTargetError(
                f"{source}: is not XML: it contains the size of the origin, so omit --origin-size"
            )
        if trust_dirty:
            raise NbdTargetError(
                f"{source}: is not XML: its dirty bits are always believed, so omit --trust-dirty"
            )
        kind, content = parse_dump(rest)
        return kind, _unclean(content) if omit_clean_shutdown else content
    if origin_size is None:
        raise NbdTargetError(
            f"{source}: is XML, which does not contain the size of the origin: give --origin-size"
        )
    _check_origin_size(origin_size)
    content = parse_xml(
        rest,
        origin_size=origin_size,
        uuid=uuid.uuid4().bytes,
        clean=trust_dirty and not omit_clean_shutdown,
    )
    return CACHE, content


def _check_origin_size(origin_size: int) -> None:
    if origin_size < 1 or origin_size % SECTOR:
        raise NbdTargetError(
            f"--origin-size must be a multiple of 512 and more than 0, not {origin_size}"
        )


def import_kernel(
    path: str,
    output: str,
    *,
    origin_size: int | None = None,
    overwrite: bool = False,
) -> ImportAnswer:
    """Make metadata of the kernel's own, of dm-cache or dm-clone. The input is only ever read.

    Args:
        origin_size: bytes; the kernel's metadata of a cache does not say it.
        overwrite: what the output holds may go.
    Raises: NbdTargetError; then the output is as it was, but for a failing write.
    """
    _refuse_same(path, output)
    with _opened(path) as file:
        name = file.run(find_kernel_kind(file.size))
        new_uuid = uuid.uuid4().bytes
        if name == "clone":
            if origin_size is not None:
                raise NbdTargetError(
                    f"{path}: is the metadata of a clone, which has no origin: leave"
                    " --origin-size out"
                )
            imported = file.run(import_clone(file.size, uuid=new_uuid))
        else:
            if origin_size is None:
                raise NbdTargetError(
                    f"{path}: is the metadata of a cache, and does not say how large the"
                    " origin is: give --origin-size"
                )
            _check_origin_size(origin_size)
            steps = import_cache(file.size, uuid=new_uuid, origin_size=origin_size)
            imported = file.run(steps)
    kind = CLONE if name == "clone" else CACHE
    _write_out(kind, imported.content, output, overwrite=overwrite)
    return import_answer(path, output, imported)


def _unclean(content: Content) -> Content:
    """Return what is to be believed of `content` without its clean shutdown."""
    flags = content.flags & ~CLEAN_SHUTDOWN
    if not isinstance(content, CacheContent) or content.gives_up_mappings:
        return content._replace(flags=flags)
    flag = LOGGED if content.incompat & DIRTY_LOG else -1
    dirty = content.dirty.copy()
    for cblock, value in enumerate(content.values):
        dirty[cblock] = bool(value & flag)
    return content._replace(
        flags=flags, dirty=dirty, policy=NO_POLICY, hints=None, discarded=None
    )


def repair(
    path: str, output: str, *, overwrite: bool = False, force: bool = False
) -> RestoreAnswer:
    """Write what is left of damaged metadata to another file. The input is only ever read.

    Args:
        overwrite: whatever the output holds may go.
        force: go on though something is lost or doubtful.
    Raises: NbdTargetError; then the output is as it was, but for a failing write.
    """
    _refuse_same(path, output)
    with _opened(path) as file:
        kind, salvaged = _salvage(file)
        if not force:
            _refuse_loss(path, salvaged.damage, salvaged.content)
        _write_out(kind, salvaged.content, output, overwrite=overwrite)
    return restore_answer(output, salvaged.content, salvaged.damage)


def _salvage(file: _File) -> tuple[Kind, Salvaged[Any]]:
    """Read what is left, around blocks that cannot be read."""
    unreadable: list[int] = []
    kind = file.run(find_kind(file.size), unreadable=unreadable)
    salvaged = file.run(kind.salvage(file.size), unreadable=unreadable)
    if unreadable:
        blocks = sorted({*unreadable})
        line = f"{len(blocks)} blocks cannot be read, the first at byte {blocks[0]}"
        salvaged = salvaged._replace(damage=(line, *salvaged.damage))
    return kind, salvaged


_LOSSES: Final = {
    "clone": "Lost regions would be read from the source again, and hydration would copy"
    " the source over what clients wrote there",
    "cache": "Lost blocks would be read from the origin, which is older where they were"
    " dirty, and doubtful ones may be written back to where they do not belong",
}


def _refuse_loss(path: str, damage: tuple[str, ...], content: Content) -> None:
    loss = loss_of(content)
    if loss:
        kind = "cache" if isinstance(content, CacheContent) else "clone"
        reasons = "; ".join((*damage, loss))
        raise NbdTargetError(
            f"{path}: {reasons}. {_LOSSES[kind]}; --force accepts that"
        )


def _write_out(kind: Kind, content: Content, output: str, *, overwrite: bool) -> None:
    """Restore to `output`; a missing or empty file is given the preferred size."""
    preferred = kind.preferred_size(content)
    undo: Callable[[], None] | None = None
    if not os.path.lexists(output):
        fd, size = create_fd(output, preferred), preferred
        file = _File(output, fd, size)
        undo = partial(os.unlink, output)
    else:
        if _is_empty_file(output):
            with _failing_at(output):
                give_space(output, preferred)
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
        raise NbdTargetError(
            f"{output}: is the input itself, by this or another name: give another file"
        )


def _refuse_metadata(output: str) -> None:
    """A dump replaces files; metadata under that name is a slip of the hand."""
    if os.path.isfile(output):
        with _failing_at(output), open(output, "rb") as file:
            if file.read(len(SUPERBLOCK_MAGIC)) == SUPERBLOCK_MAGIC:
                raise NbdTargetError(
                    f"{output}: holds metadata: write the dump to another file"
                )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- size ----


def clone_size(
    *, device_size: int | None, region_size: int | None, nr_regions: int | None
) -> CloneSizeAnswer:
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
        raise NbdTargetError("a clone has at least one region")
    if nr_regions > NR_REGIONS_MAX:
        raise NbdTargetError(
            f"{nr_regions} regions: Too many regions. Consider increasing the region size"
        )
    sizes = clone_sizes(nr_regions)
    return CloneSizeAnswer(
        nr_regions=sizes.nr_regions,
        smallest=sizes.smallest,
        preferred=sizes.preferred,
    )


def cache_size(
    *, device_size: int | None, block_size: int | None, nr_blocks: int | None
) -> CacheSizeAnswer:
    """Tell how large the metadata of a cache is: of a cache device, or of so many cache blocks.

    Raises: NbdTargetError: there can be no such cache.
    """
    if nr_blocks is None:
        assert device_size is not None
        assert block_size is not None
        fault = block_size_fault(block_size)
        if fault:
            raise NbdTargetError(f"block size {block_size}: {fault}")
        nr_blocks = device_size // block_size
    if nr_blocks < 1:
        raise NbdTargetError("a cache has at least one block")
    if nr_blocks > NR_CBLOCKS_MAX:
        raise NbdTargetError(
            f"{nr_blocks} cache blocks: at most {NR_CBLOCKS_MAX} are possible; larger"
            " blocks are fewer"
        )
    sizes = cache_sizes(nr_blocks)
    return CacheSizeAnswer(
        nr_cblocks=sizes.nr_cblocks,
        smallest=sizes.smallest,
        preferred=sizes.preferred,
    )
