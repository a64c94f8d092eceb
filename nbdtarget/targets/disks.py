# SPDX-License-Identifier: Apache-2.0
"""Which disks belong together: asked when a table is opened, recorded at each start and stop.

Theory of operation. `nbdtarget_metadata.disks` defines what is recorded, and how it is compared; devices tell what they
are (`Device.identify`). Clone and cache ask this module, each with its roles.

    open    `look` compares what is recorded with what is there. The constructor decides what
            that means for it, and refuses by `refusal`, one line that names both disks
    start   `prepare` puts what is there into the metadata, and takes back what a stop has recorded
            about changes; the owner commits; `confirm` marks the disks. All of it before I/O may come
    stop    the owner commits all that has changed, so that devices are flushed; `note_stop` marks the
            disks, and puts sizes and times into the metadata; the owner commits the clean shutdown

Order of mark and record. After a crash between any two steps the next start is not refused. The generation in a
mark is durable in the metadata before it is written to the disk, and the metadata records it only after it is
durable on the disk. A time is recorded by the last commit before a stop, and taken back by a commit
before the first write. So wherever a crash comes, the metadata never claims what the disks do not show.

A disk that cannot be marked, or cannot be asked within `ANSWER_S_MAX`, is recorded with less evidence:
that is never an error.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import msgspec
from bitarray import bitarray

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.permissions import MOVED, OTHER_DISK, Permission, option_of
from nbdtarget.devices.base import Device
from nbdtarget.devices.identity import is_still_there
from nbdtarget_metadata.disks import (
    NOT_MARKED,
    SAMPLE_BYTES,
    Comparison,
    Disk,
    Evidence,
    Mark,
    Sample,
    Verdict,
    changed_since,
    compare,
    decode_disks,
    encode_disks,
    record_of,
    sample_of,
    spread_offsets,
)
from nbdtarget_metadata.errors import MetadataError

__all__ = [
    "CACHE_ROLE",
    "DESTINATION_ROLE",
    "NR_SPREAD",
    "ORIGIN_ROLE",
    "SOURCE_ROLE",
    "DiskRecords",
    "Finding",
    "Recorded",
    "Role",
    "cache_samples",
    "spread_ones",
]

# The roles of disks in a target; these words stand in the metadata and in the marks.
DESTINATION_ROLE: Final = "destination"
SOURCE_ROLE: Final = "source"
CACHE_ROLE: Final = "cache"
ORIGIN_ROLE: Final = "origin"

ANSWER_S_MAX: Final = 5.0  # for one question to one disk, and for all of a stop
NR_SPREAD: Final = 16  # blocks of a sample that is taken at each stop

log = logging.getLogger(__name__)


class Recorded(Protocol):
    """The place where they are recorded: the metadata of a target, or a tool's copy of it.

    Attributes:
        disks: the record as the next commit writes it; recorded_disks: the one that is durable.
    """

    @property
    def uuid(self) -> bytes: ...

    @property
    def generation(self) -> int: ...

    @property
    def disks(self) -> bytes: ...

    @property
    def recorded_disks(self) -> bytes: ...

    def record_disks(self, record: bytes) -> None: ...


class Role(NamedTuple):
    """One disk of a target.

    Attributes:
        is_ours: only this target writes to it, so it may carry a mark.
        sample_at_start: what is sampled there must never change; empty for what changes.
    """

    name: str
    device: Device
    is_ours: bool = True
    sample_at_start: tuple[int, ...] = ()


class Finding(NamedTuple):
    """The comparison of one recorded disk with the disk that was opened.

    Attributes:
        changed: what has changed on it since it was recorded; empty: nothing that is known.
    """

    role: str
    recorded: Disk
    found: Evidence
    comparison: Comparison
    changed: str

    @property
    def is_same(self) -> bool:
        return self.comparison.verdict is Verdict.SAME

    def is_allowed(self, permissions: frozenset[Permission]) -> bool:
        """Whether the disk may be taken for the recorded one."""
        match self.comparison.verdict:
            case Verdict.SAME:
                return True
            case Verdict.MOVED:
                return bool(permissions & {MOVED, OTHER_DISK})
            case _:
                return OTHER_DISK in permissions

    @property
    def allowed_by(self) -> Permission:
        """The least that a person has to say so that the disk is taken."""
        return MOVED if self.comparison.verdict is Verdict.MOVED else OTHER_DISK

    def refusal(self, metadata: str) -> str:
        """Say in one line why another disk is refused, and what helps."""
        name, recorded = self.found.name, self.recorded.name
        which = f"which is {recorded}" if recorded != name else "though it has its name"
        words = f"{option_of(OTHER_DISK)} if you answer for it"
        if self.allowed_by == MOVED:
            words = f"{option_of(MOVED)} if it is the same disk elsewhere, {words}"
        return (
            f"{name} is not the {self.role} that {metadata} belongs to, {which}:"
            f" {self.comparison.reason}; give the right disk, or {words}"
        )

    def refusal_of_change(self, metadata: str, why: str) -> str:
        """Say in one line why a changed disk is refused, and what helps."""
        return (
            f"{self.found.name} is not as {metadata} knows it: {self.changed} while it"
            f" was not in use, and {why}; {option_of(OTHER_DISK)} if you answer for it"
        )


class DiskRecords:
    """The disks that are recorded in one metadata object, and belong to it. See the module head.

    Args:
        name: the mapped device's, for logs.
        shared: what the tables on this metadata have in common. There stand the devices that have been
            taken into use: another table that has the same open device need not ask what it is.
    """

    def __init__(
        self,
        name: str,
        metadata: Recorded,
        roles: Sequence[Role],
        shared: dict[str, object],
    ) -> None:
        self._name = name
        self._metadata = metadata
        self._roles = roles
        self._shared = shared

    def recorded(self, role: str) -> Disk | None:
        """Return the record of one disk, if there is one."""
        disks = decode_disks(self._metadata.disks)
        return next((disk for disk in disks if disk.role == role), None)

    async def look(self, roles: Iterable[str]) -> list[Finding]:
        """Compare these disks with what is recorded; those of which nothing is are left out."""
        findings = []
        for role in self._roles:
            recorded = self.recorded(role.name)
            if role.name not in roles or recorded is None:
                continue
            if self._shared.get(_key(role)) is role.device:
                continue
            finding = await look_at(role, recorded, self._metadata)
            log.info(
                "%s: %s %s: %s, because %s",
                self._name,
                role.name,
                finding.found.name,
                finding.comparison.verdict.value,
                finding.comparison.reason,
            )
            findings.append(finding)
        return findings

    def known_roles(self, findings: Iterable[Finding], *, is_used: bool) -> set[str]:
        """The roles whose disks are the recorded ones, here or elsewhere, or are in use by the other table.

        All roles, if nothing is recorded of any disk, and the metadata has been used: it comes from a kernel,
        or its disks tell nothing of themselves.

        Args: findings: what `look` has returned.
        """
        if is_used and not self.are_known:
            return {role.name for role in self._roles}
        in_use = {
            role.name
            for role in self._roles
            if self._shared.get(_key(role)) is role.device
        }
        return in_use | {
            finding.role
            for finding in findings
            if finding.comparison.verdict is not Verdict.OTHER
        }

    async def may_have_changed(self, role: str) -> bool:
        """Whether a disk that has not changed, as far as can be told, may have done so all the same.

        A file tells when it was last written to. Of a block device or an export some blocks are
        compared. A disk that tells nothing of itself is taken at its word.
        """
        recorded = self.recorded(role)
        if recorded is not None and recorded.mtime_ns:
            return False
        for each in self._roles:
            if each.name == role:
                found = await evidence_of(each)
                return bool(found.kind) and not found.is_pinned
        return False

    async def prepare(self) -> None:
        """Have the next commit record what is there, and that it is in use."""
        disks = self._recorded_of_others()
        for role in self._roles:
            self._shared[_key(role)] = role.device
            found = await evidence_of(role)
            old = self.recorded(role.name)
            disk = record_of(role.name, found)
            sample = old.sample if old is not None else None
            if found.is_pinned:
                sample = None
            elif (
                role.sample_at_start
                and found.kind
                and (sample is None or not await _shows(role.device, sample))
            ):
                sample = await read_sample(role.device, role.sample_at_start)
            disks.append(
                msgspec.structs.replace(
                    disk,
                    mtime_ns=disk.mtime_ns if role.sample_at_start else 0,
                    is_stopped=bool(role.sample_at_start),
                    sample=sample if role.sample_at_start else None,
                    mark_generation=await self._marked_generation(role, found, old),
                )
            )
        if any(disk.kind for disk in disks) or self._metadata.disks:
            self._record(disks)

    @property
    def are_known(self) -> bool:
        """Whether anything is recorded; a disk that tells nothing is not."""
        return bool(self._metadata.disks)

    @property
    def is_recorded(self) -> bool:
        """Whether what was prepared is durable."""
        return self._metadata.disks == self._metadata.recorded_disks

    async def confirm(self) -> None:
        """Mark the disks with the generation that is durable now."""
        for role in self._roles:
            disk = self.recorded(role.name)
            if disk is not None and disk.mark_generation != NOT_MARKED:
                await self._mark(role)

    async def note_stop(self, samples: Mapping[str, Sequence[int]]) -> None:
        """Have the next commit record what the disks are like when nothing writes any more.

        Everything is committed and the devices are flushed. Args: samples: offsets, by role.
        """
        try:
            async with timeout(ANSWER_S_MAX):
                await self._note_stop(samples)
        except TimeoutError:
            log.warning(
                "%s: a disk does not answer: its state is not recorded", self._name
            )

    async def _note_stop(self, samples: Mapping[str, Sequence[int]]) -> None:
        disks = self._recorded_of_others()
        generation = self._metadata.generation
        for role in self._roles:
            disk = self.recorded(role.name)
            if disk is None:
                continue
            if not role.sample_at_start:
                is_synced = False
                if disk.mark_generation != NOT_MARKED and await self._mark(role):
                    disk = msgspec.structs.replace(disk, mark_generation=generation)
                    is_synced = True
                is_synced = is_synced or await role.device.sync_attributes()
                found = await evidence_of(role)
                sample = None
                offsets = samples.get(role.name)
                if offsets and not found.is_pinned:
                    sample = await read_sample(role.device, offsets)
                disk = msgspec.structs.replace(
                    disk,
                    is_stopped=True,
                    size=found.size,
                    # After a power cut the file may have an older time, unless that is durable.
                    mtime_ns=found.mtime_ns if is_synced else 0,
                    sample=sample,
                )
            disks.append(disk)
        if disks:
            self._record(disks)

    def _recorded_of_others(self) -> list[Disk]:
        """Return the records of disks that are not in this table."""
        ours = {role.name for role in self._roles}
        recorded = decode_disks(self._metadata.disks)
        return [disk for disk in recorded if disk.role not in ours]

    def _record(self, disks: Sequence[Disk]) -> None:
        try:
            self._metadata.record_disks(encode_disks(disks))
        except MetadataError as error:
            # A compaction may have failed meanwhile: then nothing is committed any more, and
            # the next opening of the metadata finds what was recorded before.
            log.warning(
                "%s: the identity of the disks is not recorded: %s", self._name, error
            )

    async def _marked_generation(
        self, role: Role, found: Evidence, old: Disk | None
    ) -> int:
        """Mark a disk that has no mark yet; return the generation that is known to be on it."""
        metadata = self._metadata
        if not (role.is_ours and found.can_be_marked):
            return NOT_MARKED
        mark = found.mark
        known = NOT_MARKED if old is None else old.mark_generation
        is_good = (
            mark is not None
            and mark.uuid == metadata.uuid
            and known <= mark.generation <= metadata.generation
        )
        if mark is not None and is_good:
            return mark.generation
        return metadata.generation if await self._mark(role) else NOT_MARKED

    async def _mark(self, role: Role) -> bool:
        mark = Mark(self._metadata.uuid, self._metadata.generation)
        try:
            async with timeout(ANSWER_S_MAX):
                return await role.device.mark(role.name, mark)
        except TimeoutError:
            return False


def _key(role: Role) -> str:
    return f"device in use as {role.name}"


async def look_at(role: Role, recorded: Disk, metadata: Recorded) -> Finding:
    """Compare one disk with what `metadata` has recorded of it."""
    found = await evidence_of(role)
    found = found._replace(is_elsewhere=await _is_elsewhere(recorded, found))
    is_sample_equal = None
    if recorded.sample is not None and recorded.is_stopped:
        is_sample_equal = await _maybe_shows(role.device, recorded.sample)
    comparison = compare(
        recorded,
        found,
        uuid=metadata.uuid,
        generation=metadata.generation,
        is_sample_equal=is_sample_equal,
    )
    changed = ""
    if comparison.verdict is Verdict.SAME:
        changed = changed_since(recorded, found, is_sample_equal=is_sample_equal)
    return Finding(role.name, recorded, found, comparison, changed)


async def evidence_of(role: Role) -> Evidence:
    """Ask the device what it is; one that does not answer tells its name only."""
    device = role.device
    try:
        async with timeout(ANSWER_S_MAX):
            return await device.identify(role.name)
    except TimeoutError:
        return Evidence("", device.name, device.size)


async def read_sample(device: Device, offsets: Sequence[int]) -> Sample | None:
    """Sample a device; None if it cannot be read, or not in time."""
    try:
        async with timeout(ANSWER_S_MAX):
            blocks = await asyncio.gather(
                *(device.read(offset, SAMPLE_BYTES) for offset in offsets),
                return_exceptions=True,
            )
    except TimeoutError:
        return None
    read = [block for block in blocks if isinstance(block, memoryview)]
    for block in blocks:
        if isinstance(block, BaseException) and not isinstance(block, DeviceError):
            raise block
    return sample_of(offsets, read) if len(read) == len(offsets) else None


def cache_samples(
    dirty: Iterable[int], block_size: int, origin: Device
) -> dict[str, Sequence[int]]:
    """Where the disks of a cache are sampled at a stop. Args: dirty: some dirty blocks."""
    return {
        CACHE_ROLE: [cblock * block_size for cblock in dirty],
        ORIGIN_ROLE: spread_offsets(origin.size, NR_SPREAD),
    }


def spread_ones(bits: bitarray, length: int, nr_max: int = NR_SPREAD) -> list[int]:
    """Choose at most `nr_max` of the bits that are set, evenly over the first `length`."""
    found = {bits.find(1, nr * length // nr_max, length) for nr in range(nr_max)}
    return sorted(found - {-1})


async def _maybe_shows(device: Device, sample: Sample) -> bool | None:
    """Whether the device still has the sampled content; None: it cannot be told."""
    if any(offset + SAMPLE_BYTES > device.size for offset in sample.offsets):
        return False
    found = await read_sample(device, sample.offsets)
    return None if found is None else found.digest == sample.digest


async def _shows(device: Device, sample: Sample) -> bool:
    return await _maybe_shows(device, sample) is not False


async def _is_elsewhere(recorded: Disk, found: Evidence) -> bool:
    """Whether the recorded file is still where it was, and is not the one that was found."""
    if found.place == recorded.place or not recorded.place[1]:
        return False
    try:
        async with timeout(ANSWER_S_MAX):
            return await asyncio.to_thread(is_still_there, recorded)
    except TimeoutError:
        return False
