# SPDX-License-Identifier: Apache-2.0
"""`Target`: what a table line becomes. The names and contracts are device-mapper's.

Life of a target, in order:

    ctr        construct from the table line's words; opens devices through the context
    resume     I/O may come from now on (preresume may refuse first)
    map        once per bio; synchronous; decides and returns, waits for nothing
    push_back  only if suspended with `noflush`: bios that are merely held back go to the queue
    presuspend new background work stops; bios in flight go on
    quiesce    no bio is in flight any more: wait until no background work is, either
    presuspend_undo  instead of all that follows: it takes too long, go on as before
    postsuspend stop everything, commit
    resume …
    dtr        release devices and metadata

A target decides; it knows no table, no socket, no NBD and no file. Devices come from
`TargetContext.open_device`, which the registry implements.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from nbdtarget.bio import Bio
from nbdtarget.common.clock import Clock
from nbdtarget.common.errors import TableError
from nbdtarget.common.permissions import Permission
from nbdtarget.common.redaction import redacted
from nbdtarget.common.words import printable
from nbdtarget.devices.base import Device, Extent, QueueLimits

if TYPE_CHECKING:
    from nbdtarget.fast.compiled import Route

__all__ = [
    "KILL",
    "REMAPPED",
    "SUBMITTED",
    "StatusFields",
    "Target",
    "TargetContext",
    "count",
]

# The status of a target by name; names end in their unit, where they have one.
StatusFields = dict[str, bool | int | float | str | None]


def count(fields: StatusFields, name: str) -> int:
    """Return the field `name`, which is a number."""
    value = fields[name]
    assert isinstance(value, int)
    return value


MESSAGE_SHOWN_MAX: Final = 80  # characters of a message that is refused

# The answers of `map`.
REMAPPED: Final = 0  # bio.device and bio.offset are set: the caller submits it there
SUBMITTED: Final = 1  # the target keeps the bio and ends it, or has already ended it
KILL: Final = 2  # the caller ends the bio with EIO


class TargetContext(Protocol):
    """The parts of a mapped device that a target may use, which is constructed for it.

    Attributes:
        begin, length: bytes; where the target stands in the table.
        name: the mapped device's name, for logs.
        read_only: the table is loaded read-only: a target that only passes bios on opens its
            device read-only too. Metadata is opened for writing all the same.
        permissions: words of `nbdtarget.common.permissions` that the command gave which loads the table.
        clock: the only source of time.
        replaces_unusable: the live table holds one of this target's disks by a device that is latched
            or lost, and this target got it opened anew. The state of that table in memory cannot
            become durable any more, so this target reads the state from the disk.
    """

    begin: int
    length: int
    name: str
    read_only: bool
    permissions: frozenset[Permission]
    clock: Clock

    @property
    def replaces_unusable(self) -> bool: ...

    async def open_device(
        self, name: str, *, read_only: bool = False, shared: bool = False
    ) -> Device:
        """Open (or share, inside this mapped device) the device called `name`.

        The target closes it with `close_device`, not `Device.close`.

        Args:
            shared: other mapped devices may write to it meanwhile. Without it, what is opened for
                writing is this mapped device's alone, and what is opened read-only does not change.
        Raises: ResolveError: missing, in use by another mapped device or process, ….
        """
        ...

    def full_name(self, name: str) -> str:
        """Return the name that a device has when it is opened as `name`: a path becomes absolute."""
        ...

    async def maybe_open_device(self, name: str) -> Device | None:
        """As `open_device` to write alone, but None if a file of that name could be created."""
        ...

    async def create_device(self, name: str, size: int) -> Device:
        """Create a missing file of `size` zero bytes, durably, its space included; open it."""
        ...

    async def close_device(self, device: Device) -> None:
        """Drop one reference; the last one closes the device."""
        ...

    def shared(self, device: Device) -> dict[str, object]:
        """A dictionary that lives as long as the open device does.

        The live and the inactive table of a mapped device hold one Device; here they find one
        metadata object.
        """
        ...

    def event(self) -> None:
        """Raise a device-mapper event: the event counter goes up by one, waiters wake."""
        ...

    def give_back(self, bio: Bio) -> None:
        """Give back a bio that `map` has taken and that has not ended, as `push_back` does; it is mapped anew.

        Between `presuspend` and the end of `quiesce` only. The bio may have been worked on, if doing all of
        it once more does no harm.
        """
        ...

    def request_replacement(
        self, type_name: str, args: Sequence[str], devices: Sequence[Device] = ()
    ) -> None:
        """Ask that a target `type_name args` take this one's place in the live table, soon.

        Args:
            devices: open here; if one of the `args` is the name of one of them, that open
                device is meant. If the name means another disk by now, nothing is replaced.

        Returns at once. Later this target is suspended, the new one resumed, this
        one destroyed, with clients' bios waiting meanwhile. Nothing happens if the device is
        suspended or has an inactive table by then, or the new target cannot be constructed. An
        event tells that it has been decided.
        """
        ...


class Target:
    """One line of a table. Subclasses override what they need.

    Attributes:
        type_name, version: as `targets` lists them.
        begin, length: bytes; where the target stands in the table. A bio's offset is relative
            to the mapped device: a target that does not begin at 0 subtracts `begin`.
        num_flush_bios: FLUSHes to `map` for each FLUSH of the mapped device (0: none).
        messages: the messages that this type takes: how each is written, and what it does. A message that
            is refused names them.
        volatile_state: what is in memory only, and would be lost if another process constructed the same target in
            our place; "": nothing.
    """

    type_name: ClassVar[str]
    version: ClassVar[tuple[int, int, int]]
    messages: ClassVar[Mapping[str, str]] = MappingProxyType({})

    num_flush_bios: int = 1
    can_discard: bool = False
    can_write_zeroes: bool = False
    can_fast_zero: bool = False
    volatile_state: str = ""

    def __init__(self, ctx: TargetContext) -> None:
        self.ctx = ctx
        self.begin = ctx.begin
        self.length = ctx.length

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "Target":
        """Construct from the words after the type name.

        On failure everything that was opened is closed again and no file has changed.
        Raises: ConstructorError, with the kernel's text.
        """
        raise NotImplementedError

    @classmethod
    def check_words(cls, args: Sequence[str]) -> None:
        """Refuse words that no device could make right. Opens nothing.

        `ctr` opens devices first, as the kernel does, and refuses the same words after that. A
        configuration file is read with this check, because the two kinds of refusal have different
        consequences: a word that can never be right is a mistake in the file, and ends the start. A device
        that cannot be opened keeps only its own line from being served.
        Raises: ConstructorError.
        """

    async def dtr(self) -> None:
        """Release devices and metadata. No bio is in flight and the target is suspended."""

    def map(self, bio: Bio) -> int:
        """Decide where `bio` goes: REMAPPED, SUBMITTED or KILL.

        The bio lies wholly inside the target (FLUSH: 0, 0). Never awaits, blocks or does I/O
        by itself; may submit bios to devices. A bio that is kept after this returns is owned.
        """
        raise NotImplementedError

    def push_back(self) -> list[Bio]:
        """Give back the bios that are held and not begun below, in the order they came.

        Each as `map` was given it, offset and hooks included, for it is mapped anew, by this
        target or another one. No FLUSH: it asks about what this target has written. Nothing is
        mapped any more when this is called; `presuspend` follows.
        """
        return []

    def presuspend(self) -> None:
        """Stop starting background work."""

    async def quiesce(self) -> None:
        """No bio is in flight: wait for background work. May be cancelled; changes nothing."""

    def presuspend_undo(self) -> None:
        """The suspend that `presuspend` began is given up: start background work again."""

    async def postsuspend(self) -> None:
        """No bio is in flight: wait for background work, commit, stop timers."""

    async def preresume(self) -> None:
        """Check, and refuse by raising TableError, before any I/O comes.

        If it raises, nothing that it has begun is under way any more.
        """

    def resume(self) -> None:
        """I/O may come; start background work."""

    async def status(self, *, noflush: bool = False) -> str:
        """The INFO words (after `start length type `). Commits first unless `noflush`."""
        return ""

    def status_fields(self) -> StatusFields:
        """Return the INFO words by name, and figures for which they have no place."""
        return {}

    def table_words(self) -> str:
        """The TABLE words: loadable again as they are."""
        return ""

    def measured_words(self) -> str:
        """Return what the kernel measures of such a target, as `target_attributes`; "" where it measures nothing."""
        return ""

    async def message(self, words: Sequence[str]) -> str | None:
        """Carry out a message; the answer to print, or None. Raises: TableError."""
        raise self.unknown_message(words)

    @classmethod
    def unknown_message(
        cls, words: Sequence[str], reason: str = "Invalid argument"
    ) -> TableError:
        """The refusal of a message that is none of this type's, or has the wrong number of words.

        Args: reason: the kernel's text where the kernel has one.
        """
        # First the secrets: what is cut in the middle of a URL is not known for one.
        given = printable(redacted(" ".join(words)), MESSAGE_SHOWN_MAX)
        known = "; ".join(cls.messages)
        return TableError(
            reason,
            hint=f"`{given}' is none of the messages of `{cls.type_name}': {known}"
            if known
            else f"targets of type `{cls.type_name}' take no messages",
        )

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As `Device.extents`, offset relative to the mapped device."""
        return [Extent(length, 0)]

    @property
    def contexts(self) -> tuple[str, ...]:
        """As `Device.contexts`. A target that only passes bios on has those of what lies below."""
        return ()

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        """As `Device.context_extents`, offset relative to the mapped device."""
        return [Extent(length, 0)]

    def maybe_route(self) -> "Route | None":
        """Return where READs and WRITEs may go on the compiled fast path, without `map`; None: nowhere.

        Asked for when the target has resumed. The target keeps the route up to date until then, and what
        goes that way must be just what `map` would have done. The mapped device closes the route.
        """
        return None

    def maybe_remap(self) -> tuple[Device, int] | None:
        """Return the device of every READ and WRITE, if it is always the same one, and the number that `map` adds to
        its offset; otherwise None. A mapped device may then leave `map` out."""
        return None

    def iterate_devices(self) -> Iterable[Device]:
        """Return the devices below."""
        return ()

    def data_devices(self) -> Iterable[Device]:
        """Return those of `iterate_devices` that hold data written by clients.

        The losses of the others are not told to clients: the target itself takes care of its metadata.
        """
        return self.iterate_devices()

    @property
    def is_rotational(self) -> bool:
        """Whether any device that holds data is: the kernel asks all but metadata devices."""
        return any(device.is_rotational for device in self.iterate_devices())

    def io_hints(self, limits: QueueLimits) -> QueueLimits:
        """Return the limits of this target; `limits` are those of the devices below, stacked."""
        return limits

    def has_lost_writes(self) -> bool:
        """Whether writes that ended with 0, and were never flushed, are gone.

        Then the next FLUSH must fail, also if another table has taken this one's place.
        """
        return False

    def exclusive_devices(self) -> Iterable[Device]:
        """Return the devices that no other target of the same table may have among its exclusive ones."""
        return ()
