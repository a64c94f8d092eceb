# SPDX-License-Identifier: Apache-2.0
"""Copies: right, bounded, and over when they say so."""

import asyncio
import errno as errnos
import random

import pytest

from nbdtarget.bio import OP_NAMES, OP_READ, OP_WRITE, OP_WRITE_ZEROES, Bio
from nbdtarget.targets.copier import Copier, CopyError
from tests.support.clock import SimClock, settle
from tests.support.devices import CrashDevice, FaultDevice, SlowDevice

SIZE = 1 << 18
CONTENT = random.Random(3).randbytes(SIZE)


def make_source() -> CrashDevice:
    return CrashDevice(SIZE, content=CONTENT, name="source")


@pytest.mark.parametrize("inline", [0.0, 1.0])
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (513, 70_001), (8, 512)])
async def test_copy_is_exact(inline: float, offset: int, length: int) -> None:
    destination = CrashDevice(SIZE, inline_chance=inline)
    copier = Copier(
        make_source(), destination, copy_bytes_max=1 << 15, chunk_bytes=4096
    )
    await copier.copy(offset, length)
    want = bytearray(SIZE)
    want[offset : offset + length] = CONTENT[offset : offset + length]
    assert destination.image() == want


async def test_bytes_in_flight_are_bounded() -> None:
    clock = SimClock()
    source = SlowDevice(make_source(), clock, 1.0)
    copier = Copier(
        source, CrashDevice(SIZE), copy_bytes_max=4 * 4096, chunk_bytes=4096
    )
    copies = [asyncio.create_task(copier.copy(at << 14, 1 << 14)) for at in range(8)]
    while not all(copy.done() for copy in copies):
        await asyncio.sleep(0)
        assert source.in_flight <= 4
        clock.advance(0.3)


async def test_reads_of_one_copy_overlap_writes_of_another() -> None:
    clock = SimClock()
    source = SlowDevice(make_source(), clock, 1.0)
    destination = SlowDevice(CrashDevice(SIZE), clock, 1.0)
    copier = Copier(source, destination, copy_bytes_max=1 << 15, chunk_bytes=1 << 14)
    first = asyncio.create_task(copier.copy(0, 1 << 14))
    await settle()
    clock.advance(1.1)
    second = asyncio.create_task(copier.copy(1 << 14, 1 << 14))
    await settle()
    assert (source.in_flight, destination.in_flight) == (1, 1)
    for _ in range(3):
        clock.advance(1.1)
        await settle()
    assert first.done()
    assert second.done()


@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.parametrize("length", [4096, 1 << 16])
async def test_failure_names_its_side_and_leaves_nothing_in_flight(
    side: str, length: int
) -> None:
    source = FaultDevice(make_source(), ops=frozenset({OP_READ}), sticky=False)
    destination = FaultDevice(
        CrashDevice(SIZE), ops=frozenset({OP_WRITE}), sticky=False, errno=errnos.ENOSPC
    )
    (source if side == "read" else destination).fail_at = 0
    copier = Copier(source, destination, copy_bytes_max=1 << 15, chunk_bytes=4096)
    with pytest.raises(CopyError) as caught:
        await copier.copy(0, length)
    assert caught.value.is_read == (side == "read")
    assert caught.value.error.errno == (errnos.EIO if side == "read" else errnos.ENOSPC)
    await copier.copy(0, length)  # every buffer is back
    assert destination.count < 2 * (length // 4096) + 1


async def test_idle_buffers_are_given_back() -> None:
    copier = Copier(
        make_source(), CrashDevice(SIZE), copy_bytes_max=1 << 15, chunk_bytes=4096
    )
    await copier.copy(0, SIZE)
    copier.drop_buffers()
    await copier.copy(0, SIZE)


class MovingDevice(FaultDevice):
    """Changes a bio's offset on its way, as a mapped device does."""

    def submit(self, bio: Bio) -> None:
        bio.offset += 4096
        super().submit(bio)


async def test_copy_from_a_device_that_moves_bios_is_exact() -> None:
    destination = CrashDevice(SIZE)
    copier = Copier(
        MovingDevice(make_source()), destination, copy_bytes_max=8192, chunk_bytes=4096
    )
    await copier.copy(0, SIZE - 4096)
    assert destination.image()[: SIZE - 4096] == CONTENT[4096:]


async def test_cancelled_copy_keeps_its_buffers_until_its_bios_end() -> None:
    clock = SimClock()
    source = SlowDevice(make_source(), clock, 1.0)
    destination = CrashDevice(SIZE)
    copier = Copier(source, destination, copy_bytes_max=4096, chunk_bytes=4096)
    first = asyncio.create_task(copier.copy(0, 4096))
    await settle()
    first.cancel()
    second = asyncio.create_task(copier.copy(8192, 4096))
    await settle()
    assert source.in_flight == 1  # the one buffer is still the first copy's
    for _ in range(2):
        clock.advance(1.1)
        await settle()
    await second
    assert destination.image()[8192:12288] == CONTENT[8192:12288]


@pytest.mark.parametrize("seed", range(20))
async def test_many_copies_over_few_buffers_all_end(seed: int) -> None:
    rng = random.Random(seed)
    clock = SimClock()
    fast = CrashDevice(SIZE, content=CONTENT, inline_chance=0.5, seed=seed)
    source = FaultDevice(
        SlowDevice(fast, clock, 0.01) if seed % 2 else fast,
        rng.choice([None, rng.randrange(60)]),
        sticky=False,
    )
    destination = CrashDevice(SIZE, inline_chance=0.5, seed=seed)
    nr_buffers = rng.randrange(1, 6)
    copier = Copier(
        source, destination, copy_bytes_max=nr_buffers * 4096, chunk_bytes=4096
    )
    copies = [
        asyncio.create_task(copier.copy(at << 14, rng.randrange(1, 16385)))
        for at in range(16)
    ]
    for _ in range(5000):
        if all(copy.done() for copy in copies):
            break
        clock.advance(0.01)
        await asyncio.sleep(0)
    assert all(copy.done() for copy in copies)
    failed = sum(copy.exception() is not None for copy in copies)
    assert failed == source.failed


async def test_destination_is_told_to_write_back_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbdtarget.targets.copier.WRITEBACK_BYTES", SIZE // 4)
    told: list[int] = []
    destination = CrashDevice(SIZE)
    monkeypatch.setattr(destination, "start_writeback", lambda: told.append(1))
    copier = Copier(
        make_source(), destination, copy_bytes_max=1 << 15, chunk_bytes=4096
    )
    await copier.copy(0, SIZE)
    assert len(told) == 4


class LengthsDevice(FaultDevice):
    """Notes how long each bio is."""

    def __init__(self) -> None:
        super().__init__(make_source())
        self.lengths: list[int] = []

    def submit(self, bio: Bio) -> None:
        self.lengths.append(bio.length)
        super().submit(bio)


async def lengths_of(
    copy_bytes_max: int, copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """How long the chunks are that copies of these lengths start before one has ended."""
    monkeypatch.setattr("nbdtarget.targets.copier.SMALL_BYTES", 4096)
    clock = SimClock()
    source = LengthsDevice()
    destination = CrashDevice(SIZE)
    copier = Copier(
        SlowDevice(source, clock, 1.0),
        destination,
        copy_bytes_max=copy_bytes_max,
        chunk_bytes=1 << 14,
    )
    begun = [
        asyncio.create_task(copier.copy(at << 15, length))
        for at, length in enumerate(copies)
    ]
    await settle()
    clock.advance(1.1)
    lengths = list(source.lengths)
    while not all(copy.done() for copy in begun):
        clock.advance(1.1)
        await settle()
    assert destination.image() == b"".join(
        CONTENT[at << 15 : (at << 15) + length].ljust(1 << 15, b"\0")
        for at, length in enumerate(copies)
    ).ljust(SIZE, b"\0")
    return lengths


async def test_long_copies_have_large_chunks_and_short_ones_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = await lengths_of(1 << 16, [(1 << 14) + 512, 4096, 100], monkeypatch)
    assert lengths == [1 << 14, 512, 4096, 100]


async def test_bound_is_of_bytes_and_a_copy_takes_what_size_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Room for a large and two small ones: the second long copy makes do with those.
    lengths = await lengths_of((1 << 14) + 8192, [1 << 14] * 2, monkeypatch)
    assert lengths == [1 << 14, 4096, 4096]


async def test_idle_buffers_of_either_size_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbdtarget.targets.copier.SMALL_BYTES", 4096)
    source = LengthsDevice()
    destination = CrashDevice(SIZE)
    copier = Copier(source, destination, copy_bytes_max=1 << 14, chunk_bytes=1 << 14)
    await copier.copy(0, 1 << 14)
    await copier.copy(1 << 14, 512)  # in the idle large one
    copier.drop_buffers()
    await asyncio.gather(*(copier.copy((2 + nr) << 14, 4096) for nr in range(4)))
    await copier.copy(6 << 14, 1 << 14)  # in the four idle small ones
    assert source.lengths[:2] == [1 << 14, 512]
    assert sorted(source.lengths[2:]) == [4096] * 8
    assert destination.image()[6 << 14 : 7 << 14] == CONTENT[6 << 14 : 7 << 14]


@pytest.mark.parametrize("background", [False, True])
async def test_copy_to_another_offset_is_exact(background: bool) -> None:
    destination = CrashDevice(SIZE)
    copier = Copier(make_source(), destination, chunk_bytes=4096, background=background)
    await copier.copy(70_000, 10_000, 512)
    want = bytearray(SIZE)
    want[512:10_512] = CONTENT[70_000:80_000]
    assert destination.image() == want


async def test_failed_write_names_the_place_on_the_destination() -> None:
    destination = FaultDevice(CrashDevice(SIZE), ops=frozenset({OP_WRITE}))
    destination.fail_at = 0
    with pytest.raises(CopyError) as caught:
        await Copier(make_source(), destination).copy(8192, 512, 1024)
    assert (caught.value.error.offset, caught.value.error.length) == (1024, 512)


@pytest.mark.parametrize(
    ("length", "background"), [(64 << 10, 0), ((64 << 10) + 512, 1)]
)
async def test_only_long_chunks_in_the_background_leave_the_loop(
    length: int, background: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = make_source(), CrashDevice(SIZE)
    sent: list[Bio] = []

    def submit_background(device: CrashDevice, bio: Bio) -> None:
        sent.append(bio)
        device.submit(bio)

    monkeypatch.setattr(CrashDevice, "submit_background", submit_background)
    await Copier(source, destination, background=True).copy(0, length)
    assert len(sent) == 2 * background
    assert destination.image()[:length] == CONTENT[:length]


# ---- zeroes ----

PIECE = 64 << 10


def make_sparse_source() -> CrashDevice:
    """Pieces of data and of zeroes in turns, then a rest that is no whole piece of zeroes."""
    content = bytearray(CONTENT)
    content[PIECE : 2 * PIECE] = bytes(PIECE)
    content[3 * PIECE :] = bytes(SIZE - 3 * PIECE)
    source = CrashDevice(SIZE, content=bytes(content), name="source")
    source.hides_zeroes = True
    return source


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("can_write_zeroes", [False, True])
async def test_zeroes_that_the_source_hides_are_written_as_zeroes(
    behind: bool, can_write_zeroes: bool
) -> None:
    source = make_sparse_source()
    below = CrashDevice(SIZE, content=b"\xaa" * SIZE)  # an older disk
    below.can_write_zeroes = can_write_zeroes
    copier = Copier(source, below, behind=behind)
    await copier.copy(0, SIZE - 512)
    assert below.image()[: SIZE - 512] == source.image()[: SIZE - 512]
    assert below.image()[SIZE - 512 :] == b"\xaa" * 512
    zeroed = [each[1:3] for each in below.trace if each[0] == OP_NAMES[OP_WRITE_ZEROES]]
    assert zeroed == ([(PIECE, PIECE)] if can_write_zeroes else [])
    await copier.copy(0, SIZE)
    assert below.image() == source.image()


async def test_source_that_tells_its_zeroes_is_not_looked_through() -> None:
    source = make_sparse_source()
    source.hides_zeroes = False
    destination = CrashDevice(SIZE)
    await Copier(source, destination).copy(0, SIZE)
    assert {op for op, *_ in destination.trace} == {OP_NAMES[OP_WRITE]}


@pytest.mark.parametrize("op", [OP_WRITE, OP_WRITE_ZEROES])
async def test_part_of_a_chunk_that_cannot_be_written_fails_the_copy(op: int) -> None:
    destination = FaultDevice(
        CrashDevice(SIZE), 0, ops=frozenset({op}), sticky=False, errno=errnos.ENOSPC
    )
    copier = Copier(make_sparse_source(), destination, chunk_bytes=SIZE)
    with pytest.raises(CopyError) as caught:
        await copier.copy(0, SIZE)
    assert not caught.value.is_read
    assert caught.value.error.errno == errnos.ENOSPC
    await copier.copy(0, SIZE)  # every buffer is back


async def test_chunk_has_ended_when_its_last_part_has() -> None:
    clock = SimClock()
    destination = SlowDevice(CrashDevice(SIZE), clock, 1.0)
    copier = Copier(make_sparse_source(), destination, chunk_bytes=SIZE)
    copying = asyncio.create_task(copier.copy(0, SIZE))
    await settle()
    assert destination.in_flight == 4
    assert not copying.done()
    clock.advance(1.1)
    await settle()
    assert copying.done()
