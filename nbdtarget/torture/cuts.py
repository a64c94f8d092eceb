# SPDX-License-Identifier: Apache-2.0
"""Power cuts: at which flush, and what of the writes at risk survives.

A `Cut` says of each sector that was written in its epoch which of the writes it holds afterwards, so that it needs neither the
generator of chance nor the code that has made it to be carried out again. Which writes may survive is decided as in the target `powercut`
(`nbdtarget.targets.powercut.volatile_cache.survivors`).
"""

import random
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from nbdtarget.common.units import SECTOR
from nbdtarget.targets.powercut.volatile_cache import Fate, PendingWrite, survivors
from nbdtarget.torture.recording import Epoch

__all__ = ["Cut", "choose_cuts", "keep_all", "prefix"]

SEED_BITS: Final = 32

# Sector -> number of the write that it holds. A sector that is not there is as before the epoch.
State = dict[int, int]


class Cut(msgspec.Struct, frozen=True):
    """One power cut.

    Attributes:
        flush: the number of the epoch: the power goes before this flush has ended.
        how: how it was chosen, in words.
        holds: what survives: (first sector, number of sectors, number of the write).
    """

    flush: int
    how: str
    holds: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, flush: int, how: str, state: State) -> "Cut":
        runs: list[list[int]] = []
        for sector in sorted(state):
            if (
                runs
                and runs[-1][0] + runs[-1][1] == sector
                and runs[-1][2] == state[sector]
            ):
                runs[-1][1] += 1
            else:
                runs.append([sector, 1, state[sector]])
        return cls(flush, how, tuple((first, nr, write) for first, nr, write in runs))

    @property
    def state(self) -> State:
        return {
            sector: write
            for first, nr, write in self.holds
            for sector in range(first, first + nr)
        }


def keep_all(epoch: Epoch) -> State:
    """Return the content of the disk if nothing is lost."""
    return _state(epoch, Fate.KEEP)


def prefix(epoch: Epoch, nr_writes: int) -> State:
    """Return the content of the disk if the first writes survive, and no other."""
    shorter = Epoch(epoch.nr, epoch.writes[:nr_writes], epoch.nr_lines)
    return {**_durable(epoch), **_state(shorter, Fate.KEEP)}


def choose_cuts(
    epochs: Sequence[Epoch],
    nr_cuts: int,
    seed: int,
    *,
    every: int = 0,
    tear_size: int = 4096,
) -> list[Cut]:
    """Choose power cuts, in the order of the log; the same arguments choose the same ones.

    Half of them lose all writes at risk at a flush; if there are more flushes, some are left out, evenly. The others, at flushes
    that chance chooses, lose or tear some of the writes.

    Args:
        nr_cuts: how many; less if there are not so many.
        tear_size: bytes, 512 or 4096: a torn write is cut at multiples of this.
        every: besides, after each so many writes of an epoch the rest is lost; 0: not.
    """
    rng = random.Random(seed)
    cuts = [
        Cut.of(epoch.nr, "all writes at risk are lost", _durable(epoch))
        for epoch in _evenly(epochs, -(-nr_cuts // 2))
    ]
    at_risk = [epoch for epoch in epochs if epoch.writes]
    for _ in range(nr_cuts // 2 if at_risk else 0):
        epoch = rng.choice(at_risk)
        fate = rng.choice((Fate.MIXED, Fate.TEAR))
        state = _state(epoch, fate, rng.getrandbits(SEED_BITS), tear_size)
        words = "torn" if fate is Fate.TEAR else "lost, torn or kept, each by chance"
        cuts.append(Cut.of(epoch.nr, f"the writes at risk are {words}", state))
    if every:
        cuts += [
            Cut.of(
                epoch.nr,
                f"the first {nr} of the writes at risk survive",
                prefix(epoch, nr),
            )
            for epoch in epochs
            for nr in range(every, len(epoch.writes), every)
        ]
    unique = {(cut.flush, cut.holds): cut for cut in reversed(cuts)}
    return sorted(unique.values(), key=lambda cut: (cut.flush, len(cut.holds)))


def _evenly(epochs: Sequence[Epoch], nr: int) -> Iterator[Epoch]:
    """At most `nr` epochs, the last one among them."""
    step = max(1.0, len(epochs) / max(1, nr))
    at = float(len(epochs))
    while at >= 1:
        yield epochs[int(at) - 1]
        at -= step


def _durable(epoch: Epoch) -> State:
    """Return the writes that no cut loses: those with FUA."""
    return {
        sector: write.nr
        for write in epoch.writes
        if write.is_durable
        for sector in range(write.sector, write.sector + write.nr_sectors)
    }


def _state(epoch: Epoch, fate: Fate, seed: int = 0, border: int = SECTOR) -> State:
    # Instead of its data, each sector of a write carries the write's number.
    pending = [
        PendingWrite(
            write.nr,
            dict.fromkeys(
                range(write.sector, write.sector + write.nr_sectors), b"%d" % write.nr
            ),
        )
        for write in epoch.writes
        if not write.is_durable or fate is Fate.KEEP
    ]
    found = survivors(pending, fate, seed, border=border)
    return {**_durable(epoch), **{sector: int(tag) for sector, tag in found.items()}}
