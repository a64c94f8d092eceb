# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget scratch`: many copies at once, each its own; and nothing is left of them."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.porcelain.scratch import (
    COPIES_MAX,
    MEMORY,
    ScratchJob,
    ScratchOptions,
    ScratchPlan,
    plan_scratch,
    scratch_table,
)
from tests.support.plain_client import PlainClient, PlainClientError

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "golden.img"
    path.write_bytes(b"g" * MIB)
    return path


@asynccontextmanager
async def serving(options: ScratchOptions) -> AsyncIterator[tuple[ScratchPlan, Path]]:
    told: list[tuple[ScratchPlan, list[str]]] = []
    is_serving = asyncio.Event()

    def serving(plan: ScratchPlan, uris: list[str]) -> None:
        told.append((plan, uris))
        is_serving.set()

    job = ScratchJob(options, serving)
    running = asyncio.create_task(job.run())
    running.add_done_callback(lambda _: is_serving.set())
    await is_serving.wait()
    if running.done():
        await running
    ((plan, uris),) = told
    yield plan, Path(uris[0].partition("socket=")[2])
    job._daemon.stop.set()
    assert await running == 0


@pytest.mark.parametrize("store", [None, MEMORY])
async def test_each_copy_is_its_own_and_nothing_is_left(
    image: Path, runtime: Path, tmp_path: Path, store: str | None
) -> None:
    stores = tmp_path / "stores"
    stores.mkdir()
    options = ScratchOptions(
        image=str(image), nr_copies=3, store=store or str(stores), size_max=8192
    )
    async with serving(options) as (plan, socket):
        assert plan.names == ("golden-1", "golden-2", "golden-3")
        assert os.listdir(stores) == []  # the files have no names

        def use() -> None:
            with PlainClient(socket, "golden-1") as one:
                one.write(0, b"w" * 8192)
                with pytest.raises(PlainClientError):
                    one.write(8192, b"w" * 512)
                assert one.read(0, 8192) == b"w" * 8192
            with PlainClient(socket, "golden-3") as three:
                assert three.read(0, MIB) == b"g" * MIB

        await asyncio.to_thread(use)
    assert os.listdir(stores) == []
    assert not socket.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"listen": ("tcp:127.0.0.1:99999",)}, "99999"),
        ({"name": "a/b"}, "Device name"),
    ],
)
async def test_failed_start_leaves_no_store(
    image: Path, runtime: Path, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    options = ScratchOptions(image=str(image), store=str(tmp_path))
    with pytest.raises(NbdTargetError, match=reason):
        async with serving(msgspec.structs.replace(options, **change)):
            pass
    assert os.listdir(tmp_path) == ["golden.img"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nr_copies": 0}, "0 copies: must be from 1 to"),
        ({"nr_copies": COPIES_MAX + 1}, "copies: must be from 1 to"),
        ({"store": "/no/such"}, "/no/such: No such file"),
        ({"store": "/dev/null"}, "/dev/null: is not a directory"),
        ({"image": "/no/image"}, "/no/image: no such file"),
    ],
)
async def test_plan_refuses(
    image: Path, change: dict[str, str | int], reason: str
) -> None:
    arguments: dict[str, str | int] = {"image": str(image), **change}
    with pytest.raises(NbdTargetError, match=reason):
        await plan_scratch(ScratchOptions(**arguments), "/")  # type: ignore[arg-type]


async def test_bound_is_never_more_than_the_image(image: Path) -> None:
    options = ScratchOptions(image=image.name, size_max=10 * MIB)
    plan = await plan_scratch(options, str(image.parent))
    assert (plan.image, plan.size, plan.size_max) == (str(image), MIB, MIB)
    assert plan.free
    assert scratch_table("/a b", MIB, "/s", MIB) == r"0 2048 scratch /a\ b 0 /s"
    bounded = scratch_table("/a", MIB, "/s", 1024)
    assert bounded == "0 2048 scratch /a 0 /s 2 max_sectors 2"
