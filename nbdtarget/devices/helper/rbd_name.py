# SPDX-License-Identifier: Apache-2.0
"""Names of RBD images of Ceph.

    rbd:[POOL/[NAMESPACE/]]IMAGE[@SNAPSHOT][#conf=FILE&id=USER]    a word of ours; the pool is `rbd` if none is given
    rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT][:conf=FILE][:id=USER]    QEMU's, behind `qemu:raw:`; a backslash stands before a colon of a name

Pure: nothing is opened. A key or a monitor's address never stands in a name: Ceph's own configuration file has them.
"""

import re
from dataclasses import dataclass
from typing import Final

from nbdtarget.common.errors import ResolveError

__all__ = ["RbdImage", "parse_rbd", "parse_rbd_of_qemu"]

POOL: Final = "rbd"  # Ceph's own default
# Ceph takes any option of its own behind the image, also ones that write files.
_OPTIONS: Final = ("id", "conf")
_COLON: Final = re.compile(r"(?<!\\):")


@dataclass(frozen=True, slots=True)
class RbdImage:
    """An RBD image, or a snapshot of one.

    Attributes:
        namespace, snapshot: empty: none.
        conf: path of Ceph's configuration file; empty: Ceph's default.
        user: without `client.`; empty: Ceph's default, which is `admin`.
    """

    pool: str
    namespace: str
    image: str
    snapshot: str
    conf: str = ""
    user: str = ""

    def __str__(self) -> str:
        place = "/".join(
            each for each in (self.pool, self.namespace, self.image) if each
        )
        return f"rbd:{place}" + (f"@{self.snapshot}" if self.snapshot else "")

    def qemu_options(self) -> dict[str, str]:
        """The options of QEMU's block driver."""
        told = {
            "pool": self.pool,
            "namespace": self.namespace,
            "image": self.image,
            "snapshot": self.snapshot,
            "conf": self.conf,
            "user": self.user,
        }
        return {key: value for key, value in told.items() if value}

    def rbd_words(self) -> tuple[str, ...]:
        """How the program `rbd` is told which image it is; without the snapshot."""
        words: tuple[str, ...] = ("--pool", self.pool, "--image", self.image)
        if self.namespace:
            words += ("--namespace", self.namespace)
        if self.conf:
            words += ("--conf", self.conf)
        if self.user:
            words += ("--id", self.user)
        return words


def parse_rbd(name: str, what: str, conf: str, user: str) -> RbdImage:
    """Take [POOL/[NAMESPACE/]]IMAGE[@SNAPSHOT] apart. Raises: ResolveError. Args: name: for the error."""
    place, at, snapshot = what.partition("@")
    words = place.split("/")
    if len(words) > 3 or not all(words) or (at and not snapshot) or "@" in snapshot:
        raise ResolveError(name, "write rbd:POOL/IMAGE[@SNAPSHOT][#conf=FILE&id=USER]")
    pool = POOL if len(words) == 1 else words[0]
    namespace = words[1] if len(words) == 3 else ""
    return RbdImage(pool, namespace, words[-1], snapshot, conf, user)


def parse_rbd_of_qemu(name: str, what: str) -> RbdImage:
    """Take rbd:POOL/IMAGE[@SNAPSHOT][:KEY=VALUE]… apart. Raises: ResolveError. Args: name: for the error."""
    _, place, *options = (_plain(each) for each in _COLON.split(what))
    told = dict(option.partition("=")[::2] for option in options)
    if len(told) < len(options):
        raise ResolveError(name, "an option stands twice")
    if "/" not in place or set(told) - {*_OPTIONS}:
        raise ResolveError(
            name, "write rbd:POOL/IMAGE[@SNAPSHOT][:id=USER][:conf=FILE]"
        )
    return parse_rbd(name, place, told.get("conf", ""), told.get("id", ""))


def _plain(text: str) -> str:
    """Without the backslashes that stand before marks."""
    return re.sub(r"\\(.)", r"\1", text)
