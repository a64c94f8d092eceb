# SPDX-License-Identifier: Apache-2.0
"""A start looks for garbage less often than a server."""

import gc
from collections.abc import Iterator

import pytest

from nbdtarget.common.collector import look_as_usual, look_no_more, look_rarely
from nbdtarget.daemon.process import run


@pytest.fixture
def usual() -> Iterator[tuple[int, int, int]]:
    look_as_usual()  # another test of this process may have run the console script
    yield gc.get_threshold()
    look_as_usual()


def test_a_server_looks_as_often_as_before_the_start(
    usual: tuple[int, int, int],
) -> None:
    look_rarely()
    assert gc.get_threshold()[0] > usual[0]
    look_as_usual()
    assert gc.get_threshold() == usual


def test_at_the_end_nothing_is_looked_through() -> None:
    try:
        look_no_more()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_running_a_loop_ends_the_start(usual: tuple[int, int, int]) -> None:
    look_rarely()

    async def threshold() -> tuple[int, int, int]:
        return gc.get_threshold()

    assert run(threshold) == usual
