# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of FileDevice: bios, and calls of fdatasync that are counted and held back."""

import os
import threading

import pytest

from nbdtarget.bio import (
    PENDING,
    Bio,
)
from nbdtarget.devices.file import sync
from tests.support.patience import until

__all__ = ["SIZE", "Syncs", "bio_of", "ended"]

SIZE = 1 << 20


def bio_of(op: int, offset: int, length: int, flags: int = 0) -> Bio:
    return Bio(op, offset, length, None, flags, lambda _: None)


async def ended(*bios: Bio) -> list[int]:
    await until(lambda: all(bio.status != PENDING for bio in bios))
    return [bio.status for bio in bios]


class Syncs:
    """Stands for fdatasync: counts, waits at a gate, fails on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.count = 0
        self.fail_with = 0
        monkeypatch.setattr(os, "fdatasync", self.fdatasync)
        # The thread in C calls the kernel and nothing else.
        monkeypatch.setattr(sync, "IS_COMPILED", False)

    def fdatasync(self, fd: int) -> None:
        self.count += 1
        self.gate.wait()
        if self.fail_with:
            raise OSError(self.fail_with, os.strerror(self.fail_with))
