# SPDX-License-Identifier: Apache-2.0
"""All rigs of the simulation, each with how often it is drawn."""

import random
from collections.abc import Callable
from typing import Final

from tests.sim.backend_rigs import (
    cache_over_backends,
    clone_over_backends,
    linear_over_backend,
)
from tests.sim.cache_rigs import (
    cache,
    cache_over_clone,
    cache_passthrough,
    cache_switching,
    cache_writethrough,
)
from tests.sim.rigs import (
    Rig,
    clone,
    clone_over_powercut,
    linear,
    one_disk,
    powercut_over_clone,
    sandwich,
    striped_over_clones,
    two_clones,
)

__all__ = ["RIGS"]

RIGS: Final[dict[str, tuple[Callable[[random.Random], Rig], int]]] = {
    "clone": (clone, 6),
    "two_clones": (two_clones, 2),
    "linear": (linear, 1),
    "clone_over_powercut": (clone_over_powercut, 3),
    "powercut_over_clone": (powercut_over_clone, 2),
    "one_disk": (one_disk, 2),
    "sandwich": (sandwich, 2),
    "striped_over_clones": (striped_over_clones, 2),
    "cache": (cache, 4),
    "cache_writethrough": (cache_writethrough, 2),
    "cache_passthrough": (cache_passthrough, 2),
    "cache_switching": (cache_switching, 3),
    "cache_over_clone": (cache_over_clone, 3),
    "linear_over_backend": (linear_over_backend, 2),
    "clone_over_backends": (clone_over_backends, 4),
    "cache_over_backends": (cache_over_backends, 4),
}
