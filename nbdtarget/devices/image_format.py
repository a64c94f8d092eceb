# SPDX-License-Identifier: Apache-2.0
"""Does a disk that is taken for raw begin like a file in another format: an image, a compressed file, an archive?

Theory of operation. `nbdtarget clone image.qcow2 disk.img` would copy the container byte by byte, and no machine would
boot from the copy. So clone and cache look at the first bytes of their disks before anything is made, and refuse what
begins like a container. The user then says what it is: `raw:DISK` takes it as it is.

What is found here never decides how a disk is opened. A guest can write the header of an image to its own raw disk,
and would be given the files of this machine that such a header may name. So there is a refusal, and no other consequence.

A LUKS volume, a partition table or an ISO 9660 file system is no container: machines use all of them as raw disks.

Pure: the caller reads the bytes.
"""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["HEAD_BYTES", "ImageFormat", "maybe_image_format"]

HEAD_BYTES: Final = 64 << 10  # what is looked at; shorter disks are looked at whole

TAR_BLOCK: Final = 512
TAR_MEMBERS_MAX: Final = 64  # in 64 KiB there is room for twice as many


class ImageFormat(NamedTuple):
    """What a disk begins like.

    Attributes:
        name: of the format, as qemu calls it, or as the program that unpacks it does.
        what: with an article, for a sentence.
        word: how the disk in it is called; `{what}` stands for the file. Empty: it has no name here.
        command: that unpacks it; `{path}` stands for its path.
    """

    name: str
    what: str
    word: str = ""
    command: str = ""

    def refusal(self, name: str, path: str | None) -> str:
        """Say why the disk called `name` is refused, and what helps.

        Args: path: of the file that it is, if it is one.
        """
        return (
            f"begins like {self.what}, and would be used as the raw disk that it is not:"
            f" {self.advice_for(name, path)}; raw:{name} if it is a raw disk all the same"
        )

    def advice_for(self, name: str, path: str | None) -> str:
        """What to do to get at the disk inside."""
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


def maybe_image_format(head: bytes) -> ImageFormat | None:
    """Say what the disk begins like; None if it may well be a raw disk.

    Args: head: its first `HEAD_BYTES`, or all of it if it is shorter.
    """
    for offset, magic, image in _MAGICS:
        if head.startswith(magic, offset):
            return image
    if _BZIP2.match(head):
        return _packed("bzip2", "bzip2 -dk {path}")
    if head.startswith(_USTAR[1], _USTAR[0]):
        return _tar(head)
    return None


def _tar(head: bytes) -> ImageFormat:
    for member in _tar_members(head):
        if member.lower().endswith(_DISK_SUFFIXES) and member.isprintable():
            what = f"a tar archive with {member} in it"
            command = f"tar -xf {{path}} {member}"
            is_raw = member.lower().endswith((".img", ".raw"))
            word = f"nbdkit:file?file={{what}}&filter=tar&tar-entry={member}"
            return ImageFormat("tar", what, word if is_raw else "", command)
    return ImageFormat("tar", "a tar archive", command="tar -xf {path}")


def _tar_members(head: bytes) -> Iterator[str]:
    """The names of the first members, as far as their headers lie in `head`."""
    at = 0
    for _ in range(TAR_MEMBERS_MAX):
        header = head[at : at + TAR_BLOCK]
        if len(header) < TAR_BLOCK or not header.startswith(_USTAR[1], _USTAR[0]):
            return
        yield header[:100].rstrip(b"\0").decode("utf-8", "replace")
        digits = header[124:136].strip(b" \0")
        if not digits.isdigit() or digits.translate(None, b"01234567"):
            return  # a size in base 256: the next header is far behind the head
        at += TAR_BLOCK + -(-int(digits, 8) // TAR_BLOCK) * TAR_BLOCK
