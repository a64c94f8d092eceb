# SPDX-License-Identifier: Apache-2.0
"""Random walks with power cuts over clones that do what the kernel's do not.

`hydrate_on_read` and a rate make hydration start and stop in other places, CACHE copies
while clients write into the same regions, `then_linear` swaps the table under them. What must hold is
the same as ever.
"""

import errno as errnos
import os
import random
from collections import Counter

import pytest

from nbdtarget.bio import OP_CACHE, Bio
from nbdtarget.targets.clone import prefetch as cache_requests
from tests.support.crash.invariants import CloneInvariants
from tests.support.crash.machine import Driver
from tests.support.crash.rigs import DISK_SIZE, REGION_SIZE, CloneRig
from tests.support.crash.walks import KINDS, Step, draw_range, take
from tests.support.model import SECTOR

WALKS = int(os.environ.get("SIM_WALKS", "100")) // 2
STEPS = int(os.environ.get("SIM_STEPS", "60"))
SEED = int(os.environ.get("SIM_SEED", "0"))

WEIGHTS = {**KINDS, "read": 6, "message": 2, "cache_beside": 3, "fill": 2, "suspend": 4}


class FeatureRig(CloneRig):
    """A clone with all features at once."""

    words = (
        "2 hydrate_on_read then_linear 8 hydration_threshold 2 hydration_batch_size 2"
        f" hydration_rate {4 * REGION_SIZE} event_after_errors 0"
    )
    messages: tuple[tuple[str, ...], ...] = (
        ("enable_hydration",),
        ("disable_hydration",),
        ("enable_hydrate_on_read",),
        ("disable_hydrate_on_read",),
        ("hydration_rate", "0"),
        ("hydration_rate", "1"),
        ("hydration_rate", str(100 * REGION_SIZE)),
        ("hydration_threshold", "0"),
        ("hydration_threshold", "3"),
        ("then_linear",),
        ("disable_then_linear",),
    )

    def __init__(
        self,
        seed: int,
        inline: float,
        images: tuple[bytes, ...] | None = None,
        *,
        before: CloneInvariants | None = None,
    ) -> None:
        super().__init__(seed, inline, images, before=before)
        self.table = (
            f"0 {DISK_SIZE // SECTOR} clone /metadata /destination /source"
            f" {REGION_SIZE // SECTOR} {self.words}"
        )


class ReadRig(FeatureRig):
    """Copies only what is read, and never becomes linear."""

    words = "2 no_hydration hydrate_on_read 2 hydration_threshold 2"
    messages = (
        ("disable_hydrate_on_read",),
        ("enable_hydrate_on_read",),
        ("hydration_batch_size", "3"),
    )


class FeatureDriver(Driver):
    """Counts what has happened, or a walk would prove nothing."""

    counts: Counter[str]

    def cache_beside(self, offset: int, length: int) -> None:
        """Send a CACHE without waiting for it, so that later steps write into its range."""

        def ended(bio: Bio) -> None:
            if self.in_flight.pop(bio, None) is not None:
                assert bio.status in (0, errnos.ESHUTDOWN), bio
                self.counts[f"cache {errnos.errorcode.get(bio.status, 'done')}"] += 1

        self._submit(Bio(OP_CACHE, offset, length, None, 0, ended), -1, 0)

    def look(self) -> None:
        target = self.rig._maybe_target()  # type: ignore[attr-defined]
        self.counts["linear" if target is None else "clone"] += 1
        if target is not None:
            self.counts["reads queued"] += len(target._hydration._reads)


def take_feature(driver: FeatureDriver, step: Step) -> None:
    kind, offset, length, _ = step
    if kind == "cache_beside":
        driver.cache_beside(offset, length)
    elif kind == "fill":
        driver.cache_beside(0, DISK_SIZE)
    else:
        take(driver, step)
    driver.look()


def draw_feature_walk(seed: int) -> list[Step]:
    rng = random.Random(seed)
    kinds = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=STEPS)
    return [(kind, *draw_range(rng), rng.random() < 0.3) for kind in kinds]


def walk(make_rig: type[FeatureRig], seed: int) -> Counter[str]:
    driver = FeatureDriver(make_rig(seed, (0.0, 0.5, 1.0)[seed % 3]))
    driver.counts = Counter()
    try:
        for step in draw_feature_walk(seed):
            take_feature(driver, step)
        driver.verify()
        driver.restart()
        driver.verify()
    except Exception as error:
        raise AssertionError(f"SIM_SEED={seed}") from error
    finally:
        driver.discard_loop()
    return driver.counts


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_requests, "STEP_BYTES", REGION_SIZE)


@pytest.mark.long
@pytest.mark.slow
def test_no_acknowledged_flush_is_lost_with_all_features() -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEED, SEED + WALKS):
        counts += walk(FeatureRig, seed)
    for what in ("linear", "clone", "reads queued", "cache done"):
        assert counts[what] > 5, counts
    # A suspend gives it back to the mapped device: clients take this answer for the end of the server.
    assert counts["cache ESHUTDOWN"] == 0


@pytest.mark.slow
def test_no_acknowledged_flush_is_lost_when_only_reads_hydrate() -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEED, SEED + WALKS // 2):
        counts += walk(ReadRig, seed)
    assert counts["reads queued"] > 5, counts
