# SPDX-License-Identifier: Apache-2.0
"""Does a disk that is taken for raw begin or end like a file in another format: an image, a compressed file, an archive?

Theory of operation. `nbdtarget clone image.qcow2 disk.img` would copy the container byte by byte, and no machine would
boot from the copy. So clone and cache look at the first bytes of their disks before anything is made, and refuse what
begins like a container. The user then says what it is: `raw:DISK` takes it as it is.

Two formats have their mark at the end: a VHD of a fixed size (that is how Azure keeps disks) is a raw disk with 512 bytes
more, and a DMG begins with data. A disk that was made as one is a multiple of a MiB long almost always, and such a file with 512 bytes more is
not. So only the end of disks of other sizes is looked at: of a remote disk this is a request more.

The result never decides how a disk is opened. A guest can write the header of an image to its own raw disk,
and would be given the files of this machine that such a header may name. So there is a refusal, and no other consequence.

A LUKS volume, a partition table or an ISO 9660 file system is no container: machines use all of them as raw disks.

Pure: the caller reads the bytes.
"""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["HEAD_BYTES", "ImageFormat", "maybe_image_format", "tail_start"]

HEAD_BYTES: Final = 64 << 10  # what is looked at; shorter disks are looked at whole
USUAL_MULTIPLE: Final = 1 << 20  # what the size of a raw disk is a multiple of
TRAILER_BYTES: Final = 512  # of a VHD and of a DMG
# The tail begins at a multiple of this, for disks that can only be read so; it holds the trailer, and what rounding added.
TAIL_ALIGNMENT: Final = 4096
VHD_FIXED: Final = 2

TAR_BLOCK: Final = 512
TAR_MEMBERS_MAX: Final = 64  # in 64 KiB there is room for twice as many


class ImageFormat(NamedTuple):
    """The format whose mark a disk has at its beginning or its end.

    Attributes:
        name: of the format, as qemu calls it, or as the program that unpacks it does.
        what: with an article, for a sentence.
        word: how the disk in it is called; `{what}` stands for the file. Empty: it has no name here.
        command: that unpacks it; `{path}` stands for its path.
        verb: where its mark was found: the disk "begins" or "ends" like it.
    """

    name: str
    what: str
    word: str = ""
    command: str = ""
    verb: str = "begins"

    def refusal(self, name: str, path: str | None) -> str:
        """Say why the disk called `name` is refused, and what helps.

        Args: path: of the file that it is, if it is one.
        """
        return (
            f"{self.verb} like {self.what}, and would be used as the raw disk that it is not:"
            f" {self.advice_for(name, path)}; raw:{name} if it is a raw disk all the same"
        )

    def advice_for(self, name: str, path: str | None) -> str:
        """Return the advice how to get at the disk inside."""
        is_encoded = self.word.startswith(("qemu:", "nbdkit:"))
        is_remote = name.startswith(_REMOTE) and not self.word.startswith("nbdkit:")
        if self.word and (path is not None or is_remote):
            # The options of an image stand in the name of the disk in it; those of a stream do not.
            what = name if is_encoded else name.partition("#")[0]
            what = what if path is None else path
            for mark in "%#&" if is_encoded else "":
                what = what.replace(mark, f"%{ord(mark):X}")
            return f"write {self.word.format(what=what)} for the disk in it"
        if self.command and path is not None:
            return f"`{self.command.format(path=path)}' unpacks it"
        return "give the disk in it"


_REMOTE: Final = ("http://", "https://", "s3://", "gs://", "az://")


def _image(name: str) -> ImageFormat:
    return ImageFormat(name, f"a {name} image", f"qemu:{name}:{{what}}")


def _packed(
    name: str, command: str, article: str = "a", *, word: str = ""
) -> ImageFormat:
    return ImageFormat(name, f"{article} {name} file", word, command)


# The offset of the bytes, the bytes, and what they mean. Sources: qemu's block drivers, and the formats' own documents.
_MAGICS: Final = (
    (0, b"QFI\xfb\0\0\0\1", _image("qcow")),
    (0, b"QFI\xfb", _image("qcow2")),
    (0, b"QED\0", _image("qed")),
    (0, b"KDMV", _image("vmdk")),
    (0, b"COWD", _image("vmdk")),
    (0, b"# Disk DescriptorFile", _image("vmdk")),
    (0, b"vhdxfile", _image("vhdx")),
    (0, b"conectix", _image("vpc")),
    (64, b"\x7f\x10\xda\xbe", _image("vdi")),
    (0, b"WithoutFreeSpace", _image("parallels")),
    (0, b"WithouFreSpacExt", _image("parallels")),
    (0, b"\xfd7zXZ\0", _packed("xz", "xz -dk {path}", "an", word="xz:{what}")),
    (
        0,
        b"\x1f\x8b\x08",
        _packed("gzip", "gzip -dk {path}", word="gzip:{what}#size=SIZE"),
    ),
    (0, b"\x28\xb5\x2f\xfd", _packed("zstd", "zstd -d {path}", word="zstd:{what}")),
    (0, b"PK\3\4", _packed("zip", "unzip {path}")),
)
_BZIP2: Final = re.compile(rb"BZh[1-9]\x31\x41\x59\x26\x53\x59")
_PAX_SPARSE_NAME: Final = re.compile(rb" GNU\.sparse\.name=([^\n]+)\n")
_USTAR: Final = 257, b"ustar"
_DISK_SUFFIXES: Final = (
    ".img",
    ".qcow2",
    ".raw",
    ".vdi",
    ".vhd",
    ".vhdx",
    ".vmdk",
)


def tail_start(size: int) -> int | None:
    """Where the tail begins, which `maybe_image_format` needs for a disk of `size` bytes; None: it needs none."""
    if not size % USUAL_MULTIPLE:
        return None
    return max(size - 2 * TRAILER_BYTES, 0) // TAIL_ALIGNMENT * TAIL_ALIGNMENT


def maybe_image_format(head: bytes, tail: bytes = b"") -> ImageFormat | None:
    """Say what the disk begins or ends like; None if it may well be a raw disk.

    Args:
        head: its first `HEAD_BYTES`, or all of it if it is shorter.
        tail: its bytes from `tail_start` on, if there is one.
    """
    for offset, magic, image in _MAGICS:
        if head.startswith(magic, offset):
            return image
    if _BZIP2.match(head):
        return _packed("bzip2", "bzip2 -dk {path}")
    if head.startswith(_USTAR[1], _USTAR[0]):
        return _tar(head)
    return _of_trailer(tail)


def _of_trailer(tail: bytes) -> ImageFormat | None:
    """Look at the last 512 bytes; fewer than 512 zeroes may come behind them, which a rounded size added."""
    for magic, is_trailer, image in _TRAILERS:
        at = tail.rfind(magic)
        if at < 0 or any(tail[at + TRAILER_BYTES :]):
            continue
        # The oldest footers have 511 bytes; the last one is zero.
        trailer = tail[at : at + TRAILER_BYTES].ljust(TRAILER_BYTES, b"\0")
        if len(tail) - at < 2 * TRAILER_BYTES and is_trailer(trailer):
            return image._replace(verb="ends")
    return None


def _is_vhd_footer(trailer: bytes) -> bool:
    """Whether it is the footer of a fixed disk, by its type and its checksum: what is raw hardly has it by chance."""
    type_ = int.from_bytes(trailer[60:64], "big")
    checksum = int.from_bytes(trailer[64:68], "big")
    others = sum(trailer) - sum(trailer[64:68])
    return type_ == VHD_FIXED and checksum == ~others & 0xFFFF_FFFF


def _is_dmg_trailer(trailer: bytes) -> bool:
    """Whether it says the length that it has: 512 bytes."""
    return int.from_bytes(trailer[8:12], "big") == TRAILER_BYTES


# The first bytes, what else must be so, and what it means. Sources: Microsoft's "Virtual Hard Disk Image Format Specification", and qemu.
_TRAILERS: Final = (
    (
        b"conectix",
        _is_vhd_footer,
        ImageFormat("vpc", "a vpc image (a VHD of a fixed size)", "qemu:vpc:{what}"),
    ),
    (b"koly", _is_dmg_trailer, _image("dmg")),
)


def _tar(head: bytes) -> ImageFormat:
    for member, is_plain in _tar_members(head):
        if member.lower().endswith(_DISK_SUFFIXES) and member.isprintable():
            what = f"a tar archive with {member} in it"
            command = f"tar -xf {{path}} {member}"
            is_raw = is_plain and member.lower().endswith((".img", ".raw"))
            word = f"nbdkit:file?file={{what}}&filter=tar&tar-entry={member}"
            return ImageFormat("tar", what, word if is_raw else "", command)
    return ImageFormat("tar", "a tar archive", command="tar -xf {path}")


def _tar_members(head: bytes) -> Iterator[tuple[str, bool]]:
    """The first members, as far as their headers lie in `head`: the name, and whether it lies there as it is.

    What tar has stored as a sparse file does not, in either of its formats.
    """
    at = 0
    pax = b""
    for _ in range(TAR_MEMBERS_MAX):
        header = head[at : at + TAR_BLOCK]
        if len(header) < TAR_BLOCK or not header.startswith(_USTAR[1], _USTAR[0]):
            return
        digits = header[124:136].strip(b" \0")
        is_known = digits.isdigit() and not digits.translate(None, b"01234567")
        size = int(digits, 8) if is_known else 0
        begin = at + TAR_BLOCK
        if header[156:157] == b"x":  # it is about the next member
            pax = head[begin : begin + size]
        else:
            own_name = _PAX_SPARSE_NAME.search(pax)
            name = own_name[1] if own_name else header[:100].rstrip(b"\0")
            is_plain = header[156:157] in (b"0", b"\0") and b" GNU.sparse." not in pax
            yield name.decode("utf-8", "replace"), is_plain
            pax = b""
        if not is_known:
            return  # a size in base 256: the next header is far behind the head
        at = begin + -(-size // TAR_BLOCK) * TAR_BLOCK
