# SPDX-License-Identifier: Apache-2.0
"""A disk that serves what it is sent in an order of its own."""

import asyncio
import logging
from collections.abc import Iterator
from functools import cached_property

import pytest

from nbdtarget.devices.base import EXTENT_DATA, EXTENT_ZERO, Extent
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR

__all__ = ["LazyDevice", "lazy_devices"]


class LazyDevice(CrashDevice):
    """Carries a deferred bio out some turns of the loop later, not on the next one.

    Only so does a FLUSH overtake a write, and one device's write another device's. Some
    are far lazier than others: then a commit's last step overtakes another's first. It
    also tells its zeroes.
    """

    @cached_property
    def _laziness(self) -> float:
        return self._random.choice([0.5, 0.8, 0.95])

    async def extents(self, offset: int, length: int) -> list[Extent]:
        image = self.image()[offset : offset + length]
        await asyncio.sleep(0)
        return [
            Extent(len(piece), EXTENT_DATA if piece.strip(b"\0") else EXTENT_ZERO)
            for piece in (image[at : at + SECTOR] for at in range(0, length, SECTOR))
        ]

    def _carry_out_one(self) -> None:
        if self._random.random() < self._laziness:
            asyncio.get_running_loop().call_soon(self._carry_out_one)
        else:
            super()._carry_out_one()


@pytest.fixture(autouse=True)
def lazy_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.support.crash.rigs.CrashDevice", LazyDevice)
    monkeypatch.setattr("nbdtarget.targets.clone.holes.HOLE_BYTES_MIN", SECTOR)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
