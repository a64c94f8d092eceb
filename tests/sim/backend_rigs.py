# SPDX-License-Identifier: Apache-2.0
"""Simulated machines some of whose disks are behind NBD servers of other machines (`tests.sim.backend`)."""

import random
from dataclasses import replace

from tests.sim.cache_rigs import cache_switching, cache_writethrough
from tests.sim.rigs import BACKEND, Rig, clone, linear

__all__ = ["cache_over_backends", "clone_over_backends", "linear_over_backend"]


def _behind(rng: random.Random, rig: Rig, name: str) -> Rig:
    """The same rig, with some of its disks behind servers: at least one."""
    disks = [disk.name for disk in rig.disks]
    chosen = [disk for disk in disks if rng.random() < 0.5] or [rng.choice(disks)]

    def renamed(table: str) -> str:
        words = table.split(" ")
        return " ".join(
            f"{BACKEND}{word[1:]}/" if word in chosen else word for word in words
        )

    return replace(
        rig,
        name=name,
        table=renamed(rig.table),
        others=tuple(map(renamed, rig.others)),
        backends=tuple(chosen),
    )


def linear_over_backend(rng: random.Random) -> Rig:
    """Nothing but the NBD client between two servers."""
    return _behind(rng, linear(rng), "linear_over_backend")


def clone_over_backends(rng: random.Random) -> Rig:
    """A clone: source, destination and metadata may each be far away."""
    return _behind(rng, clone(rng), "clone_over_backends")


def cache_over_backends(rng: random.Random) -> Rig:
    """A cache, in any mode: origin, cache and metadata may each be far away."""
    make = rng.choice((cache_switching, cache_switching, cache_writethrough))
    return _behind(rng, make(rng), "cache_over_backends")
