# SPDX-License-Identifier: Apache-2.0
"""The bio: one I/O request on its way from a client to a device, and its end.

Theory of operation. A bio is submitted to a `Device`. The code that finishes it calls
`bio.end(status)` exactly once, and that calls the submitter's `endio`. Both may happen
before `submit` returns: most bios are served inline from the page cache, and for them
no task, future or thread exists.

Payload. READ and WRITE carry a memoryview: for READ it is where the data goes, for WRITE
it is the data. While `bio.borrowed` is true, that memory belongs to the submitter and is
valid **only until `submit` returns** (it lies in a connection's receive buffer or reply
arena, which the next request reuses). Code that keeps a bio longer calls `bio.own()` first:
a WRITE then has its own copy of the bytes, a READ gets a fresh buffer. So a submitter must
always look at `bio.payload` of the ended bio, never at the buffer it passed in. A WRITE that
is kept only for its end, because its bytes went on in other bios, has `bio.give_away()` called.

Owner. An ended bio belongs to the submitter again, which may use the object for its next request at
once, so layers keep no reference to it. The targets on its way have changed
its `offset` and `device` by then.

Hooks. A layer that must know when a bio ends (to count in-flight I/O, to drop a region
lock) pushes a callable with `bio.on_end(hook)`; hooks run last in, first out, before
`endio`. Layers push one only for bios that do not end inside `submit`, so the inline
path pays nothing for them.

Rescue. Before a bio ends with an error, and before any hook runs, each hook that has a method
`rescue(bio, status)` is asked. If it answers True, it has submitted the bio to another device, which will
end it, and no layer above notices anything. It may answer True only once for one bio. For example, a cache
reads from the origin what its cache device cannot read.

Offsets and lengths are bytes, never sectors.
"""

from collections.abc import Callable
from typing import Final, Protocol

__all__ = [
    "FAST_ZERO",
    "FUA",
    "NO_UNMAP",
    "OP_CACHE",
    "OP_DISCARD",
    "OP_FLUSH",
    "OP_NAMES",
    "OP_READ",
    "OP_WRITE",
    "OP_WRITE_ZEROES",
    "PENDING",
    "UNASKED",
    "Bio",
    "Submits",
    "split_bio",
]

# Plain ints, not enums: comparing them costs 30 ns on the hot path, an IntEnum 555 ns.
OP_READ: Final = 0
OP_WRITE: Final = 1
OP_FLUSH: Final = 2
OP_DISCARD: Final = 3
OP_WRITE_ZEROES: Final = 4
OP_CACHE: Final = 5  # advice: the range will be read soon

OP_NAMES: Final = ("read", "write", "flush", "discard", "write_zeroes", "cache")

FUA: Final = 1  # on stable storage before the bio ends
NO_UNMAP: Final = 2  # WRITE_ZEROES: the space must stay allocated
FAST_ZERO: Final = 4  # WRITE_ZEROES: ENOTSUP at once unless faster than writing
UNASKED: Final = (
    8  # FLUSH: sent by a suspend and not by a client; the kernel sends none
)

PENDING: Final = -1  # bio.status before `end`


class Submits(Protocol):
    """A receiver of bios: a `Device`, or a part of one that passes bios on."""

    def submit(self, bio: "Bio") -> None: ...


class Bio:
    """One I/O request. See the module head for what belongs to whom, and until when.

    Attributes:
        op: one of OP_*.
        offset, length: bytes, relative to the device that it is submitted to. FLUSH has 0, 0.
        flags: FUA, NO_UNMAP, FAST_ZERO, UNASKED, or'ed.
        payload: READ, WRITE: a memoryview of `length` bytes (format B); else None.
        borrowed: the payload's memory is valid only until `submit` returns.
        endio: called once with the bio, when it has ended. Must not raise.
        status: PENDING, then 0 or an errno.
        device: unset until a target answers REMAPPED: where the bio goes next.
        private: the submitter's own.
    """

    __slots__ = (
        "borrowed",
        "device",
        "endio",
        "flags",
        "hooks",
        "length",
        "offset",
        "op",
        "payload",
        "private",
        "status",
    )

    device: Submits

    def __init__(
        self,
        op: int,
        offset: int,
        length: int,
        payload: memoryview | None,
        flags: int,
        endio: Callable[["Bio"], None],
        private: object = None,
        borrowed: bool = False,
    ) -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.payload = payload
        self.flags = flags
        self.endio = endio
        self.private = private
        self.borrowed = borrowed
        self.status = PENDING
        self.hooks: list[Callable[[Bio], None]] | None = None

    def own(self) -> None:
        """Give the bio a payload of its own, so that it may outlive `submit`. Idempotent."""
        if not self.borrowed:
            return
        self.borrowed = False
        if self.payload is not None:
            if self.op == OP_WRITE:
                self.payload = memoryview(bytes(self.payload))
            else:
                self.payload = memoryview(bytearray(self.length))

    def give_away(self) -> None:
        """Drop the payload of a WRITE: child bios carry it now, and this bio is kept only for its end."""
        assert self.op != OP_READ
        self.payload = None
        self.borrowed = False

    def on_end(self, hook: Callable[["Bio"], None]) -> None:
        """Call `hook(bio)` when the bio ends, before hooks that were pushed earlier."""
        assert self.status == PENDING
        if self.hooks is None:
            self.hooks = [hook]
        else:
            self.hooks.append(hook)

    def end(self, status: int) -> None:
        """End the bio with 0 or a positive errno."""
        assert self.status == PENDING, "a bio ends once"
        hooks = self.hooks
        if status and hooks is not None and self._is_rescued(hooks, status):
            return
        self.status = status
        if hooks is not None:
            while hooks:
                hooks.pop()(self)
        self.endio(self)

    def _is_rescued(self, hooks: list[Callable[["Bio"], None]], status: int) -> bool:
        """Whether a hook has submitted the failed bio to another device: then it has not ended."""
        for hook in reversed(hooks):
            rescue = getattr(hook, "rescue", None)
            if rescue is not None and rescue(self, status):
                return True
        return False

    def __repr__(self) -> str:
        return (
            f"<Bio {OP_NAMES[self.op]} {self.offset}+{self.length} flags={self.flags}"
            f" status={self.status}>"
        )


class _Split:
    """The children still to come of a split bio, and the first error among them."""

    __slots__ = ("error", "left", "parent")

    def __init__(self, parent: Bio, left: int) -> None:
        self.parent = parent
        self.left = left
        self.error = 0

    def child_ended(self, child: Bio) -> None:
        if child.status and not self.error:
            self.error = child.status
        self.left -= 1
        if self.left == 0:
            self.parent.end(self.error)


def split_bio(bio: Bio, lengths: list[int]) -> list[Bio]:
    """Cut `bio` into consecutive children of the given lengths, whose sum is its length.

    The parent ends by itself, after the last child, with the error of the first child that
    failed. A READ is owned first: its children fill slices of one buffer that outlives
    `submit`, wherever each of them is served.
    """
    assert sum(lengths) == bio.length
    assert all(lengths)
    if bio.op == OP_READ:
        bio.own()
    split = _Split(bio, len(lengths))
    children = []
    at = 0
    for length in lengths:
        payload = None if bio.payload is None else bio.payload[at : at + length]
        children.append(
            Bio(
                bio.op,
                bio.offset + at,
                length,
                payload,
                bio.flags,
                split.child_ended,
                bio.private,
                bio.borrowed,
            )
        )
        at += length
    if bio.op != OP_READ:
        bio.give_away()
    return children
