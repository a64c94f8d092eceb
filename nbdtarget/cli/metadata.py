# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget metadata`: the offline tools for metadata files and devices.

Options are those of the tools for the kernel's caches (cache_check, cache_dump …), where these
have one.
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
    str, typer.Argument(metavar="FILE", help="A metadata file or block device.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing: the exit status tells.")
]
Output = Annotated[
    str, typer.Option("--output", "-o", metavar="FILE", help="Where the metadata goes.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Whatever the output holds may go.")
]


Offset = Annotated[
    str,
    typer.Option(metavar="N|SIZE", help="Where its data begin: sectors, or as in 1M."),
]
DeviceSize = Annotated[
    str | None,
    typer.Option(
        "--device-size", metavar="SIZE", help="Of the clone or the cache, as 10G."
    ),
]
RegionSize = Annotated[
    str | None,
    typer.Option("--region-size", metavar="SIZE", help="Of a clone: 4K to 1G."),
]
NrRegions = Annotated[
    int | None,
    typer.Option("--nr-regions", metavar="N", help="Instead of both sizes."),
]
BlockSize = Annotated[
    str | None,
    typer.Option("--block-size", metavar="SIZE", help="Of a cache: 32K to 1G."),
]
NrBlocks = Annotated[
    int | None,
    typer.Option("--nr-blocks", metavar="N", help="Instead of both sizes."),
]
Unit = Annotated[
    str,
    typer.Option(
        "--unit",
        "-u",
        help="bytes, sectors, kibibytes … tebibytes, kilobytes … terabytes, or"
        " b, s, k, m, g, t, K, M, G, T.",
    ),
]
NumericOnly = Annotated[
    bool, typer.Option("--numeric-only", "-n", help="Print the number alone.")
]
Smallest = Annotated[
    bool,
    typer.Option("--smallest", help="The least that works, which compacts more often."),
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
        help="Check, dump, restore and repair metadata that no server has open; write a"
        " cache back.",
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
            help="If there is no damage: rewrite superblock copies from their good"
            " siblings, clear needs_check.",
        ),
    ] = False,
    clear_needs_check: Annotated[
        bool,
        typer.Option(
            "--clear-needs-check",
            "--clear-needs-check-flag",
            help="Clear needs_check, if a full pass finds no damage.",
        ),
    ] = False,
    super_block_only: Annotated[
        bool, typer.Option("--super-block-only", help="Look at the superblocks only.")
    ] = False,
    skip_unused: Annotated[
        bool,
        typer.Option("--skip-unused", help="Look for no orphans and leaked blocks."),
    ] = False,
    ignore_non_fatal_errors: Annotated[
        bool, typer.Option("--ignore-non-fatal-errors", hidden=True)
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Read and verify everything that the metadata vouches for.

    Damage is what a server would refuse: exit 1. Superblock copies that the next
    commits heal, orphaned records and leaked blocks are harmless: exit 0.
    """
    # What --ignore-non-fatal-errors asks for is so in any case.

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
        typer.Option("--output", "-o", metavar="FILE", help="Write to FILE."),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", "-r", help="Dump what is left of damaged metadata; say what."
        ),
    ] = False,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="json|xml",
            help="xml: what cache_restore reads, of a cache only.",
        ),
    ] = "json",
) -> None:
    """Print the metadata as JSON, which `restore` makes metadata of again."""
    if form not in ("json", "xml"):
        raise typer.BadParameter(f"--format: json or xml, not {form!r}")
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
            help="The dump, also the XML of cache_dump; '-': stdin.",
        ),
    ],
    output: Output,
    overwrite: Overwrite = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Restore a dump that says that something is lost."
        ),
    ] = False,
    origin_size: Annotated[
        str | None,
        typer.Option(
            "--origin-size", metavar="SIZE", help="Of the origin: XML does not say it."
        ),
    ] = None,
    omit_clean_shutdown: Annotated[
        bool,
        typer.Option(
            "--omit-clean-shutdown",
            help="Believe no dirty bits: each mapped block of a cache counts as dirty.",
        ),
    ] = False,
    trust_dirty: Annotated[
        bool,
        typer.Option(
            "--trust-dirty",
            help="Believe the dirty bits and hints of XML. Without this option each mapped block counts as"
            " dirty, because cache_dump 0.9.0 (Debian 12) calls every block of metadata in format 2 clean.",
        ),
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Make metadata of a dump. A missing file is made at the right size.

    What the output holds is left alone unless told otherwise. Until all is written, the
    output is no metadata that anybody accepts. A cache or a clone of the kernel is moved
    here, with its devices, by `nbdtarget metadata import`, which needs no dump.
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
            help="The metadata file or device of dm-cache or dm-clone; it is only ever read.",
        ),
    ],
    output: Output,
    overwrite: Overwrite = False,
    origin_size: Annotated[
        str | None,
        typer.Option(
            "--origin-size",
            metavar="SIZE",
            help="The size of the origin: a cache's metadata does not say it.",
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Make metadata of the kernel's own, so that a cache or a clone can move in from there.

    Remove the kernel's device first, so that nothing writes any more. Then the same cache and
    origin devices (or source and destination) are used with the new metadata. After
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
        typer.Option("--input", "-i", metavar="FILE", help="Only ever read."),
    ],
    output: Output,
    unused: Annotated[str, typer.Argument(hidden=True)] = "",
    overwrite: Overwrite = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Go on though something is lost: regions of a clone read the source"
            " again, blocks of a cache the origin; what clients wrote there is gone.",
        ),
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Write what is left of damaged metadata to another file.

    Only what intact checksums vouch for is believed. If a hydrated region or a dirty block cannot be
    vouched for any more, nothing is written unless forced. Dirty bits that cannot be read are set.
    """
    if unused:
        raise typer.BadParameter(f"unexpected argument {unused!r}")

    def job() -> None:
        from nbdtarget.tools import metadata as metadata_tools

        answer = metadata_tools.repair(source, output, overwrite=overwrite, force=force)
        if not quiet:
            for line in answer.damage:
                print(f"nbdtarget: {source}: {line}", file=sys.stderr)
        _print(answer, quiet=quiet, json=json)

    return _run(job, quiet=quiet)


def info(file: File, json: Json = False) -> None:
    """Print what the newest superblock says; nothing else is read or verified."""
    from nbdtarget.tools import metadata as metadata_tools

    _print(metadata_tools.info(file), quiet=False, json=json)


def writeback(
    metadata: Annotated[str, typer.Argument(metavar="METADATA", help="Of the cache.")],
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="The fast device.")],
    origin: Annotated[str, typer.Argument(metavar="ORIGIN", help="The slow device.")],
    fast_device_offset: Offset = "0",
    origin_device_offset: Offset = "0",
    retry: Annotated[
        int,
        typer.Option(
            "--retry",
            "--retry-count",
            min=0,
            metavar="N",
            help="How often to try again what has failed twice.",
        ),
    ] = 0,
    list_failed: Annotated[
        bool,
        typer.Option(
            "--list-failed",
            "--list-failed-blocks",
            help="Print which blocks were not copied, and why.",
        ),
    ] = False,
    no_metadata_update: Annotated[
        bool,
        typer.Option(
            "--no-metadata-update", help="Copy only; what is dirty stays dirty."
        ),
    ] = False,
    moved: Moved = False,
    accept_other_disk: AcceptOtherDisk = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Write dirty blocks of a cache back to its origin, in the order of the origin.

    After an unclean stop: all mapped blocks, or with dirty_log all that may be dirty. What
    was copied is recorded clean, as by a clean shutdown, once the origin has it for good.
    Exit 1 if a block could not be copied: it stays dirty.
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
            raise _Lines((f"{len(answer.failed)} blocks were not copied",))

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
    """Print how large the metadata of a clone or a cache is: what is made when its file is missing."""
    is_cache = (block_size, nr_blocks) != (None, None)
    if is_cache and (region_size, nr_regions) != (None, None):
        raise typer.BadParameter("regions are a clone's, blocks a cache's: not both")
    if is_cache:
        _refuse_mixture(device_size, block_size, nr_blocks, "block")
    else:
        _refuse_mixture(device_size, region_size, nr_regions, "region")
    from nbdtarget.tools import metadata as metadata_tools
    from nbdtarget.tools.answers import UNIT_LETTERS, UNITS, SizeAnswer

    name = UNIT_LETTERS.get(unit, unit)
    if name not in UNITS:
        raise typer.BadParameter(f"--unit: unknown unit {unit!r}")
    answer: SizeAnswer
    if is_cache:
        answer = metadata_tools.cache_size(
            device_size=maybe_size_option("--device-size", device_size, size_min=0),
            block_size=maybe_size_option("--block-size", block_size, size_min=0),
            nr_blocks=nr_blocks,
        )
    else:
        answer = metadata_tools.clone_size(
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
            f"--nr-{unit}s, or --device-size and --{unit}-size, not both"
        )
    if number is None and None in (device_size, unit_size):
        raise typer.BadParameter(
            f"--device-size and --{unit}-size, or --nr-{unit}s"
            + (" (or --block-size, --nr-blocks of a cache)" if unit == "region" else "")
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
