# SPDX-License-Identifier: Apache-2.0
"""flakey: when it is down, and what it does to bios then."""

import errno as errnos
import random

import pytest

from nbdtarget.bio import (
    FUA,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.errors import ConstructorError
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.targets.flakey import FlakeyTarget
from tests.support.tables import Disks, content, submit

BASE = 1_000_000_000


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("/a 0 1", "Invalid argument count"),
        ("/a x 1 1", "Invalid device sector"),
        ("/a 0 x 1", "Invalid up interval"),
        ("/a 0 1 -1", "Invalid down interval"),
        ("/a 0 0 0", "Total (up + down) interval is zero"),
        ("/a 0 4294967295 1", "Interval overflow"),
        ("/a 0 1 1 x", "Invalid number of feature args"),
        ("/a 0 1 1 12", "Invalid number of feature args"),
        ("/a 0 1 1 2 drop_writes", "Invalid number of feature args"),
        ("/a 0 1 1 1 nonsense", "Unrecognised flakey feature requested"),
        ("/a 0 1 1 2 drop_writes drop_writes", "Feature drop_writes duplicated"),
        (
            "/a 0 1 1 2 drop_writes error_writes",
            "Feature error_writes conflicts with feature drop_writes",
        ),
        ("/a 0 1 1 2 error_reads error_reads", "Feature error_reads duplicated"),
        (
            "/a 0 1 1 4 corrupt_bio_byte 1 r 0",
            "Feature corrupt_bio_byte requires 4 parameters",
        ),
        ("/a 0 1 1 5 corrupt_bio_byte 0 r 0 0", "Invalid corrupt bio byte"),
        (
            "/a 0 1 1 5 corrupt_bio_byte 1 x 0 0",
            "Invalid corrupt bio direction (r or w)",
        ),
        (
            "/a 0 1 1 5 corrupt_bio_byte 1 r 256 0",
            "Invalid corrupt value to write into bio byte (0-255)",
        ),
        ("/a 0 1 1 5 corrupt_bio_byte 1 r 0 x", "Invalid corrupt bio flags mask"),
        (
            "/a 0 1 1 10 corrupt_bio_byte 1 r 0 0 corrupt_bio_byte 2 r 0 0",
            "Feature corrupt_bio_byte duplicated",
        ),
        (
            "/a 0 1 1 1 random_read_corrupt",
            "Feature random_read_corrupt requires a parameter",
        ),
        (
            "/a 0 1 1 2 random_read_corrupt 1000000001",
            "Invalid random corrupt argument",
        ),
        (
            "/a 0 1 1 4 random_write_corrupt 1 random_write_corrupt 1",
            "Feature random_write_corrupt duplicated",
        ),
        (
            "/a 0 1 1 6 drop_writes corrupt_bio_byte 1 w 0 0",
            "drop_writes is incompatible with random_write_corrupt or corrupt_bio_byte"
            " with the WRITE flag set",
        ),
        (
            "/a 0 1 1 3 error_writes random_write_corrupt 1",
            "error_writes is incompatible with random_write_corrupt or"
            " corrupt_bio_byte with the WRITE flag set",
        ),
        (
            "/a 0 1 1 3 random_read_corrupt 1 error_reads",
            "error_reads is incompatible with random_read_corrupt or corrupt_bio_byte"
            " with the READ flag set",
        ),
        ("/no 0 1 1", "Device lookup failed: /no: No such file"),
        ("/a 9 1 1", "/a too small for target: start=9"),
    ],
)
async def test_constructor_refuses(words: str, reason: str) -> None:
    disks = Disks(a=8192)
    with pytest.raises(ConstructorError) as caught:
        await disks.create(f"0 8 flakey {words}")
    assert str(caught.value).startswith(f"flakey: {reason}")
    assert disks["/a"].nr_closed == ("small" in reason)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("", "2 error_reads error_writes"),
        (" 0", "2 error_reads error_writes"),
        (" 2 random_read_corrupt 0", "2 error_reads error_writes"),
        (" 1 DROP_writes ignored words", "1 drop_writes"),
        (" 2 error_writes error_reads", "2 error_reads error_writes"),
        (
            " 7 random_read_corrupt 5 corrupt_bio_byte 32 R 1 0",
            "7 corrupt_bio_byte 32 r 1 0 random_read_corrupt 5",
        ),
        (
            " 5 corrupt_bio_byte 224 w 0 32",
            "5 corrupt_bio_byte 224 w 0 32",
        ),
        (" 2 random_write_corrupt 1000000000", "2 random_write_corrupt 1000000000"),
    ],
)
async def test_table_shows_what_is_in_force(given: str, shown: str) -> None:
    disks = Disks(a=8192)
    device = await disks.create(f"0 8 flakey /a 1 3 4{given}")
    assert device.table() == [(0, 8, "flakey", f"/a 1 3 4 {shown}")]
    assert await device.status() == [(0, 8, "flakey", "")]


async def make(features: str = "", *, up_s: int = 0) -> tuple[MappedDevice, Disks]:
    disks = Disks(a=65536)
    await disks.fill("/a", bytes(range(256)) * 32)
    device = await disks.create(f"0 16 flakey /a 1 {up_s} 4 {features}")
    assert device.active is not None
    (target,) = device.active.targets
    assert isinstance(target, FlakeyTarget)
    target._random = random.Random(7)
    return device, disks


async def test_up_and_down_follow_each_other_from_the_load_on() -> None:
    device, disks = await make(up_s=3)
    states = []
    for _ in range(14):
        states.append(submit(device, OP_READ, 0, 512).status)
        disks.clock.advance(1.0)
    up, down = [0] * 3, [errnos.EIO] * 4
    assert states == up + down + up + down


async def test_a_suspend_does_not_start_the_intervals_anew() -> None:
    device, disks = await make(up_s=3)
    disks.clock.advance(2.0)
    await device.suspend()
    await device.resume()
    assert submit(device, OP_READ, 0, 512).status == 0
    disks.clock.advance(1.0)
    assert submit(device, OP_READ, 0, 512).status == errnos.EIO


WRITES = [OP_WRITE, OP_WRITE_ZEROES, OP_DISCARD, OP_FLUSH]


@pytest.mark.parametrize(
    ("features", "read", "write", "kept"),
    [
        ("", errnos.EIO, errnos.EIO, False),
        ("1 error_reads", errnos.EIO, 0, True),
        ("1 drop_writes", 0, 0, False),
        ("1 error_writes", 0, errnos.EIO, False),
        ("5 corrupt_bio_byte 1 r 9 0", 0, 0, True),
    ],
)
async def test_features_while_down(
    features: str, read: int, write: int, kept: bool
) -> None:
    device, disks = await make(features)
    disks.log.clear()
    assert submit(device, OP_READ, 0, 512).status == read
    assert bool(disks.log) == (read == 0)
    for op in WRITES:
        disks.log.clear()
        payload: bytes | int = b"n" * 512 if op == OP_WRITE else 512 * (op != OP_FLUSH)
        assert submit(device, op, 0, payload).status == write
        assert bool(disks.log) == kept
    image = await disks.image("/a")
    assert (image[512:1024] == bytes(range(256)) * 2) != kept


async def test_corrupted_read_is_right_on_the_disk() -> None:
    device, disks = await make("5 corrupt_bio_byte 32 r 1 0")
    expected = bytearray(bytes(range(256)) * 2)
    expected[31] = 1
    assert content(submit(device, OP_READ, 0, 512)) == expected
    assert content(submit(device, OP_READ, 0, 31)) == bytes(range(31))
    disks["/a"].hold = True  # the same for one that ends later
    bio = submit(device, OP_READ, 0, 512)
    disks["/a"].let_go()
    assert content(bio) == expected
    disks["/a"].fails = lambda _: errnos.EIO
    assert submit(device, OP_READ, 0, 512).status == errnos.EIO
    assert (await disks.image("/a"))[512 + 31] == 31


async def test_corrupted_write_leaves_the_clients_buffer_alone() -> None:
    device, disks = await make("5 corrupt_bio_byte 224 w 0 0")
    for borrowed in (True, False):
        buffer = bytearray(b"x" * 512)
        bio = Bio(
            OP_WRITE, 0, 512, memoryview(buffer), 0, lambda _: None, None, borrowed
        )
        device.submit(bio)
        assert bio.status == 0
        assert buffer == b"x" * 512
        image = await disks.image("/a")
        assert image[512:1024] == b"x" * 223 + b"\0" + b"x" * 288
    assert content(submit(device, OP_READ, 0, 3)) == b"xxx"


async def test_flags_select_the_bios() -> None:
    device, disks = await make(f"5 corrupt_bio_byte 1 w 0 {1 << 17}")
    for flags, first in ((0, b"x"), (FUA, b"\0")):
        assert submit(device, OP_WRITE, 0, b"xy", flags=flags).status == 0
        assert (await disks.image("/a"))[512:514] == first + b"y"


async def test_zeroing_is_corrupted_as_a_write() -> None:
    device, disks = await make("5 corrupt_bio_byte 2 w 7 0")
    assert submit(device, OP_WRITE_ZEROES, 0, 512).status == 0
    assert (await disks.image("/a"))[512:1024] == b"\0\7" + bytes(510)


@pytest.mark.parametrize("direction", ["read", "write"])
@pytest.mark.parametrize("probability", [0, BASE // 4, BASE])
async def test_random_corruption_comes_as_often_as_asked(
    direction: str, probability: int
) -> None:
    # A probability of 0 alone would mean no feature: a harmless one stands beside it.
    harmless = "corrupt_bio_byte 4096 r 0 0"
    device, disks = await make(f"7 {harmless} random_{direction}_corrupt {probability}")
    right = bytes(range(256)) * 2
    changed = 0
    for _ in range(200):
        submit(device, OP_WRITE, 0, right)
        now = content(submit(device, OP_READ, 0, 512))
        differ = sum(a != b for a, b in zip(right, now, strict=True))
        assert differ <= 1
        changed += differ
        on_disk = (await disks.image("/a"))[512:1024]
        assert on_disk == (now if direction == "write" else right)
    # One value in 256 is the one that was there.
    assert {0: changed == 0, BASE: changed >= 190}.get(probability, 25 <= changed <= 75)


async def test_empty_bios_are_not_corrupted() -> None:
    device, _ = await make(f"4 random_read_corrupt {BASE} random_write_corrupt {BASE}")
    assert submit(device, OP_READ, 0, 0).status == 0
    assert submit(device, OP_WRITE, 0, b"").status == 0
