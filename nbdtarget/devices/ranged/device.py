# SPDX-License-Identifier: Apache-2.0
"""`RangedDevice`: a remote image as a disk that can only be read.

Theory of operation. For every protocol alike, the device has a `Store`, which reads a range of the image, and a `Pin`, which every answer
must show. A `Fetcher` tries again what fails. There are two ways in, which do not stand in each other's way:

    submit         a client waits: `Pieces`, with slots of its own, and a small cache
    submit_ahead   a background copy: `BulkReads`, large ranges, many at a time

*A source that is away.* Bios wait, up to `source_timeout`. The health stays OK, because nothing is wrong with what the device answers;
`last_error` and `traffic` tell that it is away, and watchers are told.

*A source that was replaced.* The image is another one than was pinned, or another state of it. From then on every read fails with EIO,
`changed` says why, and the health is LOST, for good: the device never reads anything but the image that it has opened. A table
that is loaded afterwards opens the source anew, and its target compares the new pin with the recorded one.

*Sizes.* An image whose size is no multiple of a sector is rounded up; what is behind its end reads as zeroes, as in QEMU.
"""

import errno as errnos
import logging
import random
from typing import Final

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.clock import sleep, timeout
from nbdtarget.common.errors import ResolveError
from nbdtarget.common.redaction import has_secrets, redacted
from nbdtarget.common.turns import Tasks
from nbdtarget.common.units import SECTOR, SIZE_MAX
from nbdtarget.devices.base import Device
from nbdtarget.devices.identity import URL
from nbdtarget.devices.ranged.bulk_reads import BulkReads
from nbdtarget.devices.ranged.fetcher import Fetcher
from nbdtarget.devices.ranged.options import SourceOptions
from nbdtarget.devices.ranged.pieces import CELL_BYTES, Pieces
from nbdtarget.devices.ranged.pin import Pin
from nbdtarget.devices.ranged.retry import delay_s
from nbdtarget.devices.ranged.store import (
    SourceAway,
    SourceDenied,
    SourceError,
    Store,
)
from nbdtarget.devices.ranged.traffic import Traffic
from nbdtarget_metadata.disks import Evidence

__all__ = ["RangedDevice", "open_ranged", "refuse_writing"]

log = logging.getLogger(__name__)

OPEN_S_MAX: Final = 20.0  # that a source which is away is tried when it is opened
NO_VALIDATOR: Final = (
    "the server tells neither an ETag nor a time of last modification: if the image was replaced by another one of the"
    " same size, parts of both would be mixed; add #pin=size if that cannot happen"
)


class RangedDevice(Device):
    """See the module head. Made by `open_ranged`.

    Attributes:
        traffic: what the image has cost so far.
    """

    io_min = CELL_BYTES
    may_be_container = True
    has_lanes = True
    hides_zeroes = True

    def __init__(
        self,
        name: str,
        place: str,
        store: Store,
        pin: Pin,
        options: SourceOptions,
        *,
        head: bytes | bytearray = b"",
        jitter: random.Random | None = None,
    ) -> None:
        """
        Args:
            name: as the user wrote it.
            place: without any secret, for metadata.
            head: the beginning of the image, as far as it is known.
        """
        super().__init__(
            redacted(name), -(-pin.size // SECTOR) * SECTOR, read_only=True
        )
        self.secret_name = name if has_secrets(name) else ""
        self.traffic: Traffic = Traffic()
        self._place = place
        self._pin = pin
        self._tasks = Tasks()
        self._fetcher = Fetcher(
            self.name,
            store,
            pin,
            self.health,
            self.traffic,
            source_timeout_s=options.source_timeout_s,
            changed=self._note_change,
            jitter=jitter,
        )
        self._pieces = Pieces(self._fetcher, pin.size, self._tasks)
        self._pieces.seed(head)
        self._bulk = BulkReads(
            self._fetcher, pin.size, self._tasks, connections=options.connections
        )

    @property
    def exact_size(self) -> int:
        return self._pin.size

    @property
    def store(self) -> Store:
        return self._fetcher.store

    def submit(self, bio: Bio) -> None:
        if self._may_read(bio):
            self._pieces.read(bio)

    def submit_ahead(self, bio: Bio) -> None:
        if not self._may_read(bio):
            return
        if self._pieces.has(bio.offset, bio.offset + bio.length):
            self._pieces.read(bio)
        else:
            self._bulk.take(bio)

    def _may_read(self, bio: Bio) -> bool:
        """Whether `bio` is a READ to be carried out; else it is ended."""
        status = self.check_bounds(bio)
        if not status and bio.op == OP_READ and self._fetcher.is_over:
            status = errnos.EIO
        if status or bio.op != OP_READ or not bio.length:
            bio.end(status)  # a FLUSH has nothing to do, and CACHE is only advice
            return False
        return True

    @property
    def nr_in_flight(self) -> int:
        return len(self._tasks) + self._bulk.nr_queued

    def give_up_reads(self) -> None:
        if nr := self.nr_in_flight:
            log.warning("%s: %d reads given up", self.name, nr)
        self._bulk.give_up()
        for task in self._tasks:
            task.cancel()

    async def use_name(self, name: str) -> None:
        store, place = self.store.elsewhere(name)
        try:
            found = await _first_answer(store, bytearray())
            if self._pin.is_size_only:
                found = found.only_size()
            if difference := self._pin.difference(found):
                raise SourceError(f"is another image: {difference}")
            if missing := self._pin.missing(found):
                raise SourceError(f"does not tell its {missing}, which is known")
        except SourceError as error:
            await store.close()
            raise ResolveError(name, error.reason) from error
        except (
            BaseException
        ):  # it may be cancelled, and then no connection is left open
            await store.close()
            raise
        before, self._fetcher.store = self.store, store
        self._place = place
        self.secret_name = name if has_secrets(name) else ""
        self.name = self.bare_name = self._fetcher.name = redacted(name)
        log.info("%s: is read from here now", self.name)
        await before.close()  # what is under way there is asked for again

    async def close(self) -> None:
        self._fetcher.is_over = True
        self._bulk.give_up()
        await self._tasks.cancel()
        await self.store.close()

    async def identify(self, role: str) -> Evidence:
        ids = self._pin.ids(self._place)
        is_pinned = self._pin.is_strong
        return Evidence(URL, self.name, self.size, ids, is_pinned=is_pinned)

    def _note_change(self, reason: str) -> None:
        self.changed = reason
        log.error("%s: %s; nothing more is read from it", self.name, reason)
        self._bulk.give_up()
        # Those that wait for an answer would learn of it later. The one that found the change ends by itself.
        for task in self._tasks:
            task.cancel()
        self.health.last_error = reason
        self.health.lose(errnos.EIO)


def refuse_writing(name: str, *, read_only: bool) -> None:
    """Raises: ResolveError: the disk is to be written to."""
    if not read_only:
        reason = (
            "is a remote image, which can only be read: use it as the source of a clone"
        )
        raise ResolveError(redacted(name), reason, errnos.EROFS)


async def open_ranged(
    name: str, place: str, store: Store, options: SourceOptions
) -> RangedDevice:
    """Open the image behind `store`, which is closed if that fails. See `RangedDevice`.

    Raises: ResolveError: no such image, no ranges, no access, no answer, ….
    """
    head = bytearray()
    try:
        pin = await _first_answer(store, head)
        if not 0 < pin.size <= SIZE_MAX - SECTOR:
            raise SourceError(f"a disk cannot have {pin.size} bytes")
        if options.is_pinned_by_size:
            pin = pin.only_size()
        elif pin.is_size_only:
            raise SourceError(NO_VALIDATOR)
    except SourceError as error:
        await store.close()
        raise ResolveError(redacted(name), error.reason) from error
    except BaseException:  # it may be cancelled, and then no connection is left open
        await store.close()
        raise
    if not pin.is_strong:
        log.warning(
            "%s: the server tells no strong ETag: only %s can tell that the image was replaced",
            redacted(name),
            "its size" if pin.is_size_only else "size and time of last modification",
        )
    return RangedDevice(name, place, store, pin, options, head=head)


async def _first_answer(store: Store, head: bytearray) -> Pin:
    """Raises: SourceError, when the store has refused, or was away for `OPEN_S_MAX`."""
    jitter = random.Random()
    nr_failures = 0
    is_renewed = False
    reason = "the server does not answer"
    try:
        async with timeout(OPEN_S_MAX):
            while True:
                head.clear()
                try:
                    return await store.open(head.extend)
                except SourceDenied:
                    if is_renewed or not await store.renew():
                        raise
                    is_renewed = True
                except SourceAway as error:
                    nr_failures += 1
                    reason = error.reason
                    await sleep(delay_s(nr_failures, jitter, error.retry_after_s))
    except TimeoutError:
        raise SourceError(reason) from None
