# SPDX-License-Identifier: Apache-2.0
"""The errors of metadata.

    MetadataError
     +- NotFormatted         nothing but zeroes where the superblock goes: `format` may follow
     +- NotOurs              other content than metadata: never touched
     +- CorruptMetadata      metadata, but not what the superblock vouches for: never rolled back
     |   +- NeedsCheck       metadata, and readable, but marked: a tool must look at it first
     +- UnsupportedFormat    metadata of a newer version: never touched
     +- UnknownKind          metadata of a kind that this version does not know: never touched
     +- GeometryMismatch     metadata of a clone, but for another table line
     +- BlockSizeMismatch    metadata of a cache, but for another table line
     +- CannotShrink         a dirty block is in the way
     +- MetadataTooSmall     the device cannot hold it
     +- ReadOnlyMetadata     a change was asked for in mode RO
     +- FailedMetadata       anything was asked for in mode FAIL
     +- NotTheKernels        to be imported, but not metadata of dm-cache or dm-clone
     +- BadDump              a dump in JSON or XML cannot be read, or contradicts itself

Each `str()` is one line without the name of the device or file. The caller knows that, and puts it
in front. A programming error is an AssertionError instead; so is a size that the caller has
computed wrongly.
"""

__all__ = [
    "BadDump",
    "BlockSizeMismatch",
    "CannotShrink",
    "CorruptMetadata",
    "FailedMetadata",
    "GeometryMismatch",
    "MetadataError",
    "MetadataTooSmall",
    "NeedsCheck",
    "NotFormatted",
    "NotOurs",
    "NotTheKernels",
    "ReadOnlyMetadata",
    "UnknownKind",
    "UnsupportedFormat",
]


class MetadataError(Exception):
    """Base of all errors of metadata."""


class NotFormatted(MetadataError):
    """The superblock area holds no metadata yet, or only an interrupted format."""

    def __str__(self) -> str:
        return "metadata is not formatted"


class NotOurs(MetadataError):
    """The device holds something that is not our metadata, so it is left alone.

    Args:
        where: the block or byte at which that shows.
        found: what stands there.
    """

    def __init__(self, where: str, found: str) -> None:
        super().__init__(where, found)
        self.where = where
        self.found = found

    def __str__(self) -> str:
        return f"no nbdtarget metadata of this kind: {self.where} holds {self.found}"


class CorruptMetadata(MetadataError):
    """Something that the newest superblock vouches for is not as it was written.

    Args:
        where: the block and what it should hold.
        expected, found: the two values that should be equal.
    """

    def __init__(self, where: str, expected: object, found: object) -> None:
        super().__init__(where, expected, found)
        self.where = where
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return (
            f"corrupt metadata: {self.where}: expected {self.expected},"
            f" found {self.found}"
        )


class NeedsCheck(CorruptMetadata):
    """The superblock says that a tool must look at the metadata before it is used again."""

    def __init__(self) -> None:
        super().__init__("superblock flags", "no needs_check", "needs_check")

    def __str__(self) -> str:
        return "metadata is marked as needing a check (needs_check)"


class UnsupportedFormat(MetadataError):
    """The metadata was written by a newer version.

    Args:
        version: the envelope's format version.
        bits: the unknown incompatible feature bits.
    """

    def __init__(self, version: int, bits: int) -> None:
        super().__init__(version, bits)
        self.version = version
        self.bits = bits

    def __str__(self) -> str:
        if self.bits:
            return (
                f"metadata has unknown incompatible features {self.bits:#x}:"
                " use the newer version that has written it"
            )
        return (
            f"metadata format version {self.version} is not supported:"
            " use the newer version that has written it"
        )


class UnknownKind(MetadataError):
    """The superblock names a kind that this version does not know."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind

    def __str__(self) -> str:
        return (
            f"metadata of kind {self.kind!r} is not supported:"
            " use the newer version that has written it"
        )


class GeometryMismatch(MetadataError):
    """The metadata belongs to a device of another shape.

    Args:
        field: "region_size" or "target_size".
        stored, given: bytes.
    """

    def __init__(self, field: str, *, stored: int, given: int) -> None:
        super().__init__(field, stored, given)
        self.field = field
        self.stored = stored
        self.given = given

    def __str__(self) -> str:
        # The kernel's sentence first, so that a search for it finds the kernel's answers.
        return (
            "Region and/or target size don't match the ones in metadata"
            f" ({self.field}: {self.stored} bytes in metadata, {self.given} given)"
        )


class BlockSizeMismatch(MetadataError):
    """The metadata belongs to a cache of another block size. Both are bytes."""

    def __init__(self, *, stored: int, given: int) -> None:
        super().__init__(stored, given)
        self.stored = stored
        self.given = given

    def __str__(self) -> str:
        return (
            f"data block size ({self.given} bytes) different from that in metadata"
            f" ({self.stored} bytes)"
        )


class CannotShrink(MetadataError):
    """The part that would be cut off holds a dirty block. `what` is "cache" or "origin"."""

    def __init__(self, what: str, cblock: int) -> None:
        super().__init__(what, cblock)
        self.what = what
        self.cblock = cblock

    def __str__(self) -> str:
        return f"unable to shrink {self.what}; cache block {self.cblock} is dirty"


class MetadataTooSmall(MetadataError):
    """The metadata device is too small. `needed` and `given` are bytes."""

    def __init__(self, *, needed: int, given: int) -> None:
        super().__init__(needed, given)
        self.needed = needed
        self.given = given

    def __str__(self) -> str:
        return f"metadata needs {self.needed} bytes, the device has {self.given}"


class ReadOnlyMetadata(MetadataError):
    """A change was asked for in mode RO: for example, because a commit has failed before."""

    def __str__(self) -> str:
        return "metadata is read-only"


class FailedMetadata(MetadataError):
    """The metadata is in mode FAIL and will answer nothing until it is opened again."""

    def __str__(self) -> str:
        return "metadata has failed"


class NotTheKernels(MetadataError):
    """The input of an import is not metadata of the kernel's. `found`: what is there, in words."""

    def __init__(self, found: str) -> None:
        super().__init__(found)
        self.found = found

    def __str__(self) -> str:
        return (
            "this is not metadata of the kernel's dm-cache or dm-clone, or it has been wiped:"
            f" {self.found}"
        )


class BadDump(MetadataError):
    """A dump in JSON or XML cannot be restored. `line` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line = line
        self.reason = reason

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"
