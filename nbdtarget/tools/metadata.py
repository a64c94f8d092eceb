# SPDX-License-Identifier: Apache-2.0
"""The offline metadata tools: each runs functions of `nbdtarget_metadata` over files, and returns an answer.

files.py opens and locks the files. A file that a tool only looks at is opened read-only. A file that it makes is removed
again if it fails. A file that it writes over cannot be opened as metadata until the last write
(`nbdtarget_metadata.tools.restore`).

`nbdtarget_metadata.tools.check` explains what damage is, and `nbdtarget_metadata.tools.salvage` what may be
believed in spite of it.
"""

import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO, Final, TypeVar

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import SECTOR
from nbdtarget.tools.answers import (
    CheckAnswer,
    ImportAnswer,
    InfoAnswer,
    RestoreAnswer,
    check_answer,
    import_answer,
    info_answer,
    loss_of,
    restore_answer,
)
from nbdtarget.tools.files import (
    MetadataFile,
    dump_input,
    dump_output,
    failing_at,
    opened,
    output_of,
    pieces_of,
    refuse_same,
)
from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.records import LOGGED
from nbdtarget_metadata.cache.superblock import DIRTY_LOG, NO_POLICY
from nbdtarget_metadata.errors import MetadataError
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
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

__all__ = [
    "check",
    "dump",
    "dump_to_file",
    "import_kernel",
    "info",
    "repair",
    "restore",
]

T = TypeVar("T")

# ---- info ----


def info(path: str) -> InfoAnswer:
    """Tell what the newest superblock says; nothing else is read. Raises: NbdTargetError."""
    with opened(path) as file:
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
    with opened(path) as file:
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
        with opened(path, read_only=False) as file:
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
    with opened(path) as file:
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
    refuse_same(path, output)
    with dump_output(output) as text:
        return dump(path, text.write, repair=repair, xml=xml)


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
        overwrite: the content of the output may be lost.
        force: the dump may say that something is lost.
        origin_size: bytes; XML does not say it.
        omit_clean_shutdown: as if there had been none: every mapped block counts as dirty.
        trust_dirty: believe the dirty bits of XML, which cannot say which tool wrote it: some write
            "false" for each block of a cache that they cannot read in full.
    Raises: NbdTargetError; then the output is as it was, unless a write failed.
    """
    if source != "-":
        refuse_same(source, output)
    with failing_at(source), dump_input(source) as text:
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
    pieces = pieces_of(source, text)
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
        overwrite: the content of the output may be lost.
    Raises: NbdTargetError; then the output is as it was, unless a write failed.
    """
    refuse_same(path, output)
    with opened(path) as file:
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
        overwrite: the content of the output may be lost.
        force: go on though something is lost or doubtful.
    Raises: NbdTargetError; then the output is as it was, unless a write failed.
    """
    refuse_same(path, output)
    with opened(path) as file:
        kind, salvaged = _salvage(file)
        if not force:
            _refuse_loss(path, salvaged.damage, salvaged.content)
        _write_out(kind, salvaged.content, output, overwrite=overwrite)
    return restore_answer(output, salvaged.content, salvaged.damage)


def _salvage(file: MetadataFile) -> tuple[Kind, Salvaged[Any]]:
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
    with output_of(output, kind.preferred_size(content)) as file:
        steps = kind.restore(content, device_size=file.size, overwrite=overwrite)
        file.run(steps)
