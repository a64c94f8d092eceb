# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget metadata`: the offline tools for metadata files and devices.

Options have the names that they have in the tools for the kernel's caches (cache_check, cache_dump and so on).
"""

import sys
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
import typer

from nbdtarget.cli.common import AcceptOtherDisk, Json, Moved
from nbdtarget.cli.sizes import maybe_size_option, offset_option
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.permissions import permissions

__all__ = ["register"]

T = TypeVar("T")

File = Annotated[
    str, typer.Argument(metavar="FILE", help="Metadata file or block device.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print nothing; the exit status says how it went."
    ),
]
Output = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="File or device to write the metadata to; a missing file is made.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Write even though the output holds something. It is lost."
    ),
]


Offset = Annotated[
    str,
    typer.Option(
        metavar="N|SIZE",
        help="Offset at which its data begins: a number of sectors, or a size, for example 1M.",
    ),
]
DeviceSize = Annotated[
    str | None,
    typer.Option(
        "--device-size",
        metavar="SIZE",
        help="Size of the cloned disk, or of the cache device, for example 10G.",
    ),
]
RegionSize = Annotated[
    str | None,
    typer.Option(
        "--region-size", metavar="SIZE", help="Region size of a clone: 4K to 1G."
    ),
]
NrRegions = Annotated[
    int | None,
    typer.Option(
        "--nr-regions",
        metavar="N",
        help="Number of regions, instead of --device-size and --region-size.",
    ),
]
BlockSize = Annotated[
    str | None,
    typer.Option(
        "--block-size", metavar="SIZE", help="Block size of a cache: 32K to 1G."
    ),
]
NrBlocks = Annotated[
    int | None,
    typer.Option(
        "--nr-blocks",
        metavar="N",
        help="Number of cache blocks, instead of --device-size and --block-size.",
    ),
]
Unit = Annotated[
    str,
    typer.Option(
        "--unit",
        "-u",
        help="Unit to print: bytes, sectors, kibibytes to tebibytes, kilobytes to terabytes, or one of"
        " the letters b, s, k, m, g, t, K, M, G, T.",
    ),
]
NumericOnly = Annotated[
    bool, typer.Option("--numeric-only", "-n", help="Print the number without unit.")
]
Smallest = Annotated[
    bool,
    typer.Option(
        "--smallest",
        help="Print the smallest usable size. It is compacted more often than the preferred one.",
    ),
]
CacheMetadata = Annotated[
    str, typer.Argument(metavar="METADATA", help="Metadata of the cache.")
]
CacheDisk = Annotated[
    str, typer.Argument(metavar="CACHE", help="The fast disk, which has the data.")
]
OriginDisk = Annotated[
    str, typer.Argument(metavar="ORIGIN", help="The slow disk, to write to.")
]
Retry = Annotated[
    int,
    typer.Option(
        "--retry",
        "--retry-count",
        min=0,
        metavar="N",
        help="Number of further tries for each block that has failed twice.",
    ),
]
ListFailed = Annotated[
    bool,
    typer.Option(
        "--list-failed",
        "--list-failed-blocks",
        help="Print which blocks were not copied, and why.",
    ),
]
NoMetadataUpdate = Annotated[
    bool,
    typer.Option(
        "--no-metadata-update",
        help="Copy only; do not record the blocks as clean.",
    ),
]


class _Lines(NbdTargetError):
    """Several reasons, a line each."""

    def __init__(self, lines: tuple[str, ...]) -> None:
        super().__init__(lines)
        self._lines = lines

    def lines(self) -> list[str]:
        return list(self._lines)


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        help="Check, dump, restore and repair metadata offline.",
        rich_markup_mode=None,
    )
    group.command()(check)
    group.command()(dump)
    group.command()(restore)
    group.command(name="import")(import_)
    group.command()(repair)
    group.command()(writeback)
    group.command()(info)
    group.command()(size)
    app.add_typer(group, name="metadata")


def check(
    file: File,
    auto_repair: Annotated[
        bool,
        typer.Option(
            "--auto-repair",
            help="If there is no damage, rewrite bad copies of superblocks from the good ones, and"
            " clear needs_check.",
        ),
    ] = False,
    clear_needs_check: Annotated[
        bool,
        typer.Option(
            "--clear-needs-check",
            "--clear-needs-check-flag",
            help="Clear needs_check if a full pass finds no damage.",
        ),
    ] = False,
    super_block_only: Annotated[
        bool, typer.Option("--super-block-only", help="Check the superblocks only.")
    ] = False,
    skip_unused: Annotated[
        bool,
        typer.Option(
            "--skip-unused", help="Do not look for orphaned records and leaked blocks."
        ),
    ] = False,
    ignore_non_fatal_errors: Annotated[
        bool, typer.Option("--ignore-non-fatal-errors", hidden=True)
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Read and verify all metadata that is in use.

    Damage that a server would refuse ends with exit status 1; `repair' saves what is left. Bad copies of
    superblocks, which the next commits rewrite, orphaned records and leaked blocks do no harm, and end
    with exit status 0.
    """
    # --ignore-non-fatal-errors changes nothing: such errors never count here.

    def job() -> None:
        from nbdtarget.tools import metadata as metadata_tools

        answer = metadata_tools.check(
            file,
            auto_repair=auto_repair,
            clear_needs_check=clear_needs_check,
            super_block_only=super_block_only,
            skip_unused=skip_unused,
        )
        _print(answer, quiet=quiet, json=json)
        if answer.damage:
            raise _Lines(tuple(f"{file}: {each}" for each in answer.damage))

    return _run(job, quiet=quiet)


def dump(
    file: File,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write the dump to; default: stdout.",
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            "-r",
            help="Dump what is left of damaged metadata, and say what is lost.",
        ),
    ] = False,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="json|xml",
            help="Format of the dump. xml is what cache_restore reads; it is for caches only.",
        ),
    ] = "json",
) -> None:
    """Print the metadata as JSON. `restore' turns it back into metadata."""
    if form not in ("json", "xml"):
        raise typer.BadParameter(f"--format must be json or xml, not {form!r}")
    from nbdtarget.tools import metadata as metadata_tools

    xml = form == "xml"
    if output is None:
        told = metadata_tools.dump(file, sys.stdout.write, repair=repair, xml=xml)
        sys.stdout.flush()
    else:
        told = metadata_tools.dump_to_file(file, output, repair=repair, xml=xml)
    for line in told:
        print("nbdtarget:", line, file=sys.stderr)


def restore(
    source: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            metavar="DUMP",
            help="The dump: what `dump' printed, or the XML of cache_dump; '-' is stdin.",
        ),
    ],
    output: Output,
    overwrite: Overwrite = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Restore even though the dump says that something is lost."
        ),
    ] = False,
    origin_size: Annotated[
        str | None,
        typer.Option(
            "--origin-size",
            metavar="SIZE",
            help="Size of the origin, for example 100G; XML does not contain it.",
        ),
    ] = None,
    omit_clean_shutdown: Annotated[
        bool,
        typer.Option(
            "--omit-clean-shutdown",
            help="Count each mapped block of a cache as dirty, also where the dump says that it is clean.",
        ),
    ] = False,
    trust_dirty: Annotated[
        bool,
        typer.Option(
            "--trust-dirty",
            help="Believe the dirty bits and hints of XML. Without this option each mapped block counts as"
            " dirty, because cache_dump 0.9.0 (Debian 12) prints every block of metadata in format 2 as"
            " clean.",
        ),
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Turn a dump back into metadata.

    The content is the same; the layout may differ.
    A missing file is made at the right size. An output that holds something is refused unless --overwrite
    is given. Until all is written, no server accepts the output. To move a cache or a clone
    of the kernel here, use `nbdtarget metadata import', which needs no dump.
    """
    origin_bytes = maybe_size_option("--origin-size", origin_size, size_min=0)

    def job() -> None:
        from nbdtarget.tools import metadata as metadata_tools

        answer = metadata_tools.restore(
            source,
            output,
            overwrite=overwrite,
            force=force,
            origin_size=origin_bytes,
            omit_clean_shutdown=omit_clean_shutdown,
            trust_dirty=trust_dirty,
        )
        _print(answer, quiet=quiet, json=json)

    return _run(job, quiet=quiet)


def import_(
    file: Annotated[
        str,
        typer.Argument(
            metavar="KERNEL_METADATA",
            help="Metadata file or device of dm-cache or dm-clone. It is only read.",
        ),
    ],
    output: Output,
    overwrite: Overwrite = False,
    origin_size: Annotated[
        str | None,
        typer.Option(
            "--origin-size",
            metavar="SIZE",
            help="Size of the origin of a cache, for example 100G; the kernel's metadata does not"
            " contain it.",
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Make metadata from that of the kernel.

    So a cache or a clone of the kernel can go on here.
    First remove the kernel's device, so that nothing writes any more. Then use the same cache and
    origin (or source and destination) with the new metadata. After
    an unclean stop of the kernel each mapped block of a cache counts as dirty, as it does for the
    kernel. Nothing on the devices is changed.

    Example: nbdtarget metadata import /dev/vg/meta -o /srv/disk.meta --origin-size 100G
    """
    origin_bytes = maybe_size_option("--origin-size", origin_size, size_min=0)

    def job() -> None:
        from nbdtarget.tools import metadata as metadata_tools

        answer = metadata_tools.import_kernel(
            file, output, origin_size=origin_bytes, overwrite=overwrite
        )
        _print(answer, quiet=quiet, json=json)

    return _run(job, quiet=quiet)


def repair(
    source: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help="The damaged metadata. It is only read.",
        ),
    ],
    output: Output,
    unused: Annotated[str, typer.Argument(hidden=True)] = "",
    overwrite: Overwrite = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Repair even though something is lost. Lost regions of a clone are read from the"
            " source again, and lost blocks of a cache from the origin; what clients wrote there is"
            " gone.",
        ),
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Save what is left of damaged metadata in another file.

    Lost regions and blocks are named.
    Only records with an intact checksum are used. If the record of a hydrated region or of a dirty block
    is lost, nothing is written unless --force is given. Blocks whose dirty bit cannot be read count
    as dirty. Afterwards, use the new file in place of the damaged one.

    Example: nbdtarget metadata repair -i disk.nbdtarget -o fixed.nbdtarget
    """
    if unused:
        raise typer.BadParameter(
            f"unexpected argument {unused!r}: the files are given with -i and -o"
        )

    def job() -> None:
        from nbdtarget.tools import metadata as metadata_tools

        answer = metadata_tools.repair(source, output, overwrite=overwrite, force=force)
        if not quiet:
            for line in answer.damage:
                print(f"nbdtarget: {source}: {line}", file=sys.stderr)
        _print(answer, quiet=quiet, json=json)
        if answer.damage and not quiet and not json:
            print(f"Now use {output} in place of {source}.")

    return _run(job, quiet=quiet)


def info(file: File, json: Json = False) -> None:
    """Print the newest superblock. Nothing else is read or verified."""
    from nbdtarget.tools import metadata as metadata_tools

    _print(metadata_tools.info(file), quiet=False, json=json)


def writeback(
    metadata: CacheMetadata,
    cache: CacheDisk,
    origin: OriginDisk,
    fast_device_offset: Offset = "0",
    origin_device_offset: Offset = "0",
    retry: Retry = 0,
    list_failed: ListFailed = False,
    no_metadata_update: NoMetadataUpdate = False,
    moved: Moved = False,
    accept_other_disk: AcceptOtherDisk = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Write a cache back while no server runs.

    The dirty blocks are written in the order of the origin. After an unclean stop these are all mapped blocks, or
    with dirty_log all that may be dirty. When the origin has them durably, they are recorded as clean, as
    after a clean shutdown. If the command is interrupted, run it again: it repeats at most the last
    1 GiB. The exit status is 1 if a block could not be copied; that block stays dirty.
    """
    from nbdtarget.tools.writeback import WritebackJob

    writeback_job = WritebackJob(
        metadata=metadata,
        cache=cache,
        origin=origin,
        cache_offset=offset_option("--fast-device-offset", fast_device_offset),
        origin_offset=offset_option("--origin-device-offset", origin_device_offset),
        retry=retry,
        update_metadata=not no_metadata_update,
        permissions=permissions(moved=moved, accept_other_disk=accept_other_disk),
    )

    def job() -> None:
        import asyncio

        from nbdtarget.cli.progress.writeback import make_progress
        from nbdtarget.tools.writeback import write_back

        with make_progress(quiet=quiet or json) as progress:
            answer = asyncio.run(write_back(writeback_job, progress))
        _print(answer, quiet=quiet, json=json)
        if list_failed and not quiet and not json:
            sys.stdout.writelines(f"{each}\n" for each in answer.failed)
        if answer.failed:
            raise _Lines(
                (
                    f"{origin}: {len(answer.failed)} blocks could not be written back and are"
                    " still dirty (--list-failed names them)",
                )
            )

    return _run(job, quiet=quiet)


def size(
    device_size: DeviceSize = None,
    region_size: RegionSize = None,
    nr_regions: NrRegions = None,
    block_size: BlockSize = None,
    nr_blocks: NrBlocks = None,
    max_hint_width: Annotated[
        int, typer.Option("--max-hint-width", min=0, max=4, hidden=True)
    ] = 4,
    unit: Unit = "sectors",
    numeric_only: NumericOnly = False,
    smallest: Smallest = False,
    json: Json = False,
) -> None:
    """Print the size of the metadata of a clone or a cache.

    A metadata file that is missing is made at this size. A block device for metadata needs to be as large.

    Example: nbdtarget metadata size --device-size 1T --region-size 64K -u bytes
    """
    is_cache = (block_size, nr_blocks) != (None, None)
    if is_cache and (region_size, nr_regions) != (None, None):
        raise typer.BadParameter(
            "Give either regions, for a clone, or blocks, for a cache, not both"
        )
    if is_cache:
        _refuse_mixture(device_size, block_size, nr_blocks, "block")
    else:
        _refuse_mixture(device_size, region_size, nr_regions, "region")
    from nbdtarget.tools.sizes import (
        UNIT_LETTERS,
        UNITS,
        SizeAnswer,
        cache_size,
        clone_size,
    )

    name = UNIT_LETTERS.get(unit, unit)
    if name not in UNITS:
        known = ", ".join(UNITS)
        raise typer.BadParameter(f"--unit: unknown unit {unit!r} (there are: {known})")
    answer: SizeAnswer
    if is_cache:
        answer = cache_size(
            device_size=maybe_size_option("--device-size", device_size, size_min=0),
            block_size=maybe_size_option("--block-size", block_size, size_min=0),
            nr_blocks=nr_blocks,
        )
    else:
        answer = clone_size(
            device_size=maybe_size_option("--device-size", device_size, size_min=0),
            region_size=maybe_size_option("--region-size", region_size, size_min=0),
            nr_regions=nr_regions,
        )
    if json:
        _print(answer, quiet=False, json=True)
        return
    number = answer.smallest if smallest else answer.preferred
    # Rounded up: what is printed is enough.
    count = -(-number // UNITS[name])
    sys.stdout.write(f"{count}\n" if numeric_only else f"{count} {name}\n")


def _refuse_mixture(
    device_size: str | None, unit_size: str | None, number: int | None, unit: str
) -> None:
    """Take both sizes, or the number of units."""
    if number is not None and (device_size, unit_size) != (None, None):
        raise typer.BadParameter(
            f"Give either --nr-{unit}s, or --device-size and --{unit}-size, not both"
        )
    if number is None and None in (device_size, unit_size):
        raise typer.BadParameter(
            f"Give --device-size and --{unit}-size, or --nr-{unit}s"
            + (
                "; for a cache --device-size and --block-size, or --nr-blocks"
                if unit == "region"
                else ""
            )
        )


def _print(answer: msgspec.Struct, *, quiet: bool, json: bool) -> None:
    if not quiet:
        text = msgspec.json.encode(answer).decode() if json else str(answer)
        sys.stdout.write(text + "\n")


def _run(job: Callable[[], None], *, quiet: bool) -> int:
    """Do the job. Returns the exit status."""
    try:
        job()
    except NbdTargetError:
        if quiet:
            return 1
        raise
    return 0
