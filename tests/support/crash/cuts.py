# SPDX-License-Identifier: Apache-2.0
"""Every power cut of one workload: all that it may leave, and what must be true of that.

Theory of operation. A run on crash devices is decided by its seed, so what a cut after its
operation number k leaves is known when operation k is carried out: there is no need to run it
again to cut it there. `Cuts` watches the devices at risk. Whenever a bio is submitted (it is under
way then, not yet carried out) and whenever one has been carried out (it has not ended yet)
is a **crash point**. At each it notes every image that the cut may leave, on all devices
together, and what the oracle allows at that moment:

    at most `SUBSETS_MAX` writes are at risk, on all devices   every subset of them
    more                                                       none, all, every prefix
    and always                                                 `samples` torn, reordered ones

A point after which nothing has changed on any device and in the oracle leaves nothing new. The same
images are booted once, however many points they stem from, and held against the
oracle of each. `Cuts.verify` boots them:

    the images        I1: what the metadata vouches for is there; the metadata's own check
    first life        starts; everything is read and held against each oracle
    second            background work runs to its end; the same is read again
    afterwards        it is stopped, started, and read once more
"""

import asyncio
import itertools

import uvloop

from nbdtarget.bio import OP_CACHE, OP_READ, Bio
from nbdtarget.targets.powercut.volatile_cache import SUBSETS_MAX
from tests.support.crash.machine import Rig
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR, DiskModel, Violation

__all__ = ["Cuts"]

BOOT_TURNS_MAX = 5000  # until background work is done, 50 ms of the rig's time each

Images = tuple[bytes, ...]
Oracle = tuple[DiskModel, object]  # and what the invariants had promised


class Cuts:
    """The crash points of one run of `rig`.

    Attributes:
        model: the oracle; the run must keep it up to date.
        nr_points: crash points so far.
        images: the different ones, and the numbers of the oracles that each must satisfy.
    """

    def __init__(self, rig: Rig, model: DiskModel, *, seed: int, samples: int) -> None:
        self.rig = rig
        self.model = model
        self.seed = seed
        self.samples = samples
        self.nr_points = 0
        self.images: dict[Images, set[int]] = {}
        self._known: dict[bytes, bytes] = {}  # one object for equal images
        self._oracles: list[Oracle] = []
        self._nr_changes = -1
        for device in rig.at_risk:
            device.watchers.append(self)

    def started(self, device: CrashDevice, bio: Bio) -> None:
        self._point(bio)

    def finished(self, device: CrashDevice, bio: Bio, errno: int) -> None:
        self._point(bio)

    def note(self) -> None:
        """The power may be cut now: note all that this may leave."""
        if self.model.nr_changes != self._nr_changes:
            self._nr_changes = self.model.nr_changes
            promised = self.rig.invariants.promised()
            self._oracles.append((self.model.copy(), promised))
        oracle = len(self._oracles) - 1
        devices = self.rig.at_risk
        nr_at_risk = sum(device.nr_at_risk for device in devices)
        subsets_max = SUBSETS_MAX if nr_at_risk <= SUBSETS_MAX else 0
        for images in itertools.product(
            *(
                device.crash_images(subsets_max=subsets_max, samples=0)
                for device in devices
            )
        ):
            self._add(images, oracle)
        if nr_at_risk:
            for _ in range(self.samples):
                self.seed += 1
                self._add(tuple(device.crash(self.seed) for device in devices), oracle)

    def verify(self) -> None:
        """Boot each image. Raises: AssertionError, whatever breaks."""
        loop = uvloop.new_event_loop()
        try:
            for images, oracles in self.images.items():
                chosen = [self._oracles[number] for number in sorted(oracles)]
                rig = self.rig.reboot(self.seed, images)
                loop.run_until_complete(_live_twice(rig, chosen))
        finally:
            loop.close()

    def _point(self, bio: Bio) -> None:
        self.nr_points += 1
        # A read leaves nothing that the next bio's start would not show.
        if bio.op not in (OP_READ, OP_CACHE):
            self.note()

    def _add(self, images: Images, oracle: int) -> None:
        known = tuple(self._known.setdefault(image, image) for image in images)
        self.images.setdefault(known, set()).add(oracle)


async def _live_twice(rig: Rig, oracles: list[Oracle]) -> None:
    for model, promised in oracles:
        rig.check_survivors(model, promised)
    await rig.check()
    await rig.start()
    content = await _content(rig, oracles[0][0].size)
    for model, _ in oracles:
        model.check_survivor(content)
    await rig.set_background(on=True)
    for _ in range(BOOT_TURNS_MAX):
        if rig.is_settled:
            break
        await asyncio.sleep(0)
        rig.clock.advance(0.05)
    assert rig.is_settled, "background work does not end"
    await _hold(rig, content, oracles, "when background work was done")
    await rig.stop()
    await rig.check()
    await rig.start()
    await _hold(rig, content, oracles, "after a clean restart")
    await rig.stop()
    rig.invariants.look()


async def _content(rig: Rig, size: int) -> bytes:
    try:
        return bytes(await rig.disk.read(0, size))
    finally:
        rig.invariants.look()  # first: it is the cause of what else went wrong


async def _hold(rig: Rig, content: bytes, oracles: list[Oracle], when: str) -> None:
    """Check that a second read returns the same, except for discarded sectors, of which there may be two copies."""
    found = await _content(rig, len(content))
    if found == content:
        return
    for at in range(0, len(content), SECTOR):
        if found[at : at + SECTOR] != content[at : at + SECTOR] and not any(
            model.discards_last and model.may_be_discarded(at // SECTOR)
            for model, _ in oracles
        ):
            raise Violation(f"{when}, sector {at // SECTOR} reads otherwise")
