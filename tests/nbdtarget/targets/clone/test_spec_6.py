# SPDX-License-Identifier: Apache-2.0
"""Checklist 6.1 and 6.2: messages and status, beside what the kernel was recorded to print."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_DISCARD, OP_WRITE
from nbdtarget.common.errors import TableError
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clock import settle
from tests.support.clone import REGION, Rig

# 32 MiB in regions of 4 KiB, as in the recordings.
SIZE = 65536 * 512


async def make(words: str = "8 1 no_hydration") -> Rig:
    return await Rig(size=SIZE, words=words, content=bytes(SIZE)).start()


async def words_of(rig: Rig) -> str:
    """The status without its metadata block counts, which are the format's own."""
    status = (await rig.target.status()).split()
    return " ".join((*status[:1], *status[2:]))


# 6.1


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("enable_hydration", "0 4 hydration_threshold 0 hydration_batch_size 1"),
        ("ENABLE_hydration extra word", "0 4 hydration_threshold 0 "),
        ("disable_hydration", "1 no_hydration 4 hydration_threshold 0 "),
        ("disable_hydration with extra words", "1 no_hydration 4 "),
        ("hydration_threshold 64", "4 hydration_threshold 64 hydration_batch_size 1"),
        ("HYDRATION_THRESHOLD 65", "4 hydration_threshold 65 hydration_batch_size 1"),
        ("hydration_threshold 0", "4 hydration_threshold 0 hydration_batch_size 1"),
        ("hydration_batch_size 16", "hydration_threshold 0 hydration_batch_size 16"),
        ("hydration_batch_size 0", "hydration_threshold 0 hydration_batch_size 0"),
        ("hydration_threshold 4294967295", "4 hydration_threshold 4294967295 "),
    ],
)
@pytest.mark.parametrize("mode", ["rw", "ro", "Fail"])
async def test_6_1_message_is_taken_in_every_mode(
    mode: str, line: str, status: str
) -> None:
    rig = await Rig(words="8 1 no_hydration 2 hydration_threshold 0").start()
    if mode != "rw":
        rig.bio(OP_WRITE, 0, REGION)
        rig.metadata.fails = lambda bio: (
            errnos.EIO if mode == "Fail" or bio.op == OP_WRITE else 0
        )
        await rig.target.status()
    assert (await rig.target.status()).endswith(mode)
    assert await rig.target.message(line.split()) is None
    if mode != "Fail":
        assert f" {status}" in await rig.target.status()
    rig.metadata.fails = lambda _: 0
    await rig.stop()


@pytest.mark.parametrize(
    "line",
    [
        "hydration_threshold",
        "hydration_threshold x",
        "hydration_threshold -1",
        "hydration_threshold 4294967296",
        "hydration_threshold 1 2",
        "hydration_batch_size",
        "hydration_batch_size x",
        "hydration_batch_size 1 2",
        "nonsense",
        "nonsense 1",
    ],
)
async def test_6_1_wrong_message_is_einval_and_changes_nothing(line: str) -> None:
    rig = await make()
    before = await rig.target.status()
    with pytest.raises(TableError) as caught:
        await rig.target.message(line.split())
    assert (caught.value.errno, caught.value.reason) == (
        errnos.EINVAL,
        "Invalid argument",
    )
    assert await rig.target.status() == before
    await rig.stop()


async def test_6_1_other_message_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    rig = await make()
    with pytest.raises(TableError):
        await rig.target.message(["nonsense"])
    assert "Unsupported message `nonsense'" in caplog.text
    await rig.stop()


async def test_6_1_messages_never_alter_the_table_line() -> None:
    rig = await make()
    for line in ("enable_hydration", "hydration_threshold 0", "hydration_batch_size 9"):
        await rig.target.message(line.split())
    assert rig.target.table_words() == "m d s 8 1 no_hydration"
    await rig.stop()


async def test_6_1_disable_lets_running_copies_finish() -> None:
    rig = await Rig(words="8 0 2 hydration_threshold 4").start()
    rig.source.hold = True
    await settle()
    await rig.target.message(["disable_hydration"])
    rig.source.let_go()
    await settle()
    assert await rig.hydrated() == "4/8"
    await rig.stop()


# 6.2: as recorded


async def test_6_2_status_field_by_field_as_the_kernel_printed_it() -> None:
    rig = await make()
    rest = "0 1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 rw"
    assert await words_of(rig) == f"8 8 0/8192 {rest}"
    await rig.disk.read(0, 4 * REGION)
    assert await words_of(rig) == f"8 8 0/8192 {rest}"
    await rig.disk.write(0, bytes(REGION))
    assert await words_of(rig) == f"8 8 1/8192 {rest}"
    await rig.disk.write(80 * 512, bytes(512))
    assert await words_of(rig) == f"8 8 2/8192 {rest}"
    await rig.disk.write(10 * 12288, bytes(12288))
    assert await words_of(rig) == f"8 8 5/8192 {rest}"
    for offset, length, hydrated in (
        (1048576, 65536, 21),
        (2099200, 2048, 21),
        (2101248, 8192, 23),
    ):
        await rig.disk.discard(offset, length)
        assert await words_of(rig) == f"8 8 {hydrated}/8192 {rest}"
    await rig.suspend()
    assert await words_of(rig) == f"8 8 23/8192 {rest}"
    await rig.target.dtr()


async def test_6_2_field_1_and_2_are_metadata_blocks_of_4_kib() -> None:
    rig = await make()
    block, used_total = (await rig.target.status()).split()[:2]
    used, total = map(int, used_total.split("/"))
    assert block == "8"
    assert total == CloneMetadata.device_size_for(8192) // 4096
    assert 0 < used < total
    await rig.stop()


async def test_6_2_field_4_is_the_count_in_core() -> None:
    rig = await make()
    rig.bio(OP_WRITE, 0, REGION)
    assert (await rig.target.status(noflush=True)).split()[3] == "1/8192"
    assert rig.target._metadata.changed
    await rig.stop()


async def test_6_2_field_4_counts_a_short_last_region() -> None:
    # 65530 sectors in regions of 128: a discard of the tail does not count, a write does.
    rig = await Rig(
        size=65530 * 512, words="128 1 no_hydration", content=bytes(65530 * 512)
    ).start()
    assert await rig.hydrated() == "0/512"
    rig.bio(OP_DISCARD, 33488896, 62464)
    assert await rig.hydrated() == "0/512"
    await rig.disk.write(65529 * 512, bytes(512))
    assert await rig.hydrated() == "1/512"
    await rig.stop()


async def test_6_2_field_5_counts_background_and_foreground() -> None:
    rig = await Rig(words="8 1 no_hydration 2 hydration_threshold 2").start()
    rig.source.hold = True
    rig.bio(OP_WRITE, 7 * REGION + 512, 512)
    await rig.target.message(["enable_hydration"])
    await settle()
    assert (await rig.target.status(noflush=True)).split()[4] == "2"
    rig.source.let_go()
    for _ in range(20):
        await settle()
        rig.clock.advance(0.1)
    assert (await rig.target.status()).split()[3:5] == ["8/8", "0"]
    await rig.stop()


@pytest.mark.parametrize(
    ("words", "messages", "features"),
    [
        ("8", [], "0"),
        ("8 1 NO_discard_passdown", [], "1 no_discard_passdown"),
        (
            "8 2 no_discard_passdown no_hydration",
            [],
            "2 no_hydration no_discard_passdown",
        ),
        ("8 1 no_hydration", ["enable_hydration"], "0"),
        (
            "8 1 no_discard_passdown",
            ["disable_hydration"],
            "2 no_hydration no_discard_passdown",
        ),
    ],
)
async def test_6_2_field_6_and_7_features_in_order_as_they_are_now(
    words: str, messages: list[str], features: str
) -> None:
    rig = await make(words)
    for message in messages:
        await rig.target.message([message])
    status = await rig.target.status(noflush=True)
    assert f" {features} 4 hydration_threshold 1 hydration_batch_size 1 rw" in status
    await rig.stop()


async def test_6_2_field_7_says_when_passdown_was_switched_off() -> None:
    rig = Rig(size=SIZE, words="8 1 no_hydration", content=bytes(SIZE))
    rig.destination.can_discard = False
    await rig.start()
    assert " 2 no_hydration no_discard_passdown 4 " in await rig.target.status()
    assert rig.target.table_words() == "m d s 8 1 no_hydration"
    await rig.stop()


async def test_6_2_field_9_mode_ends_the_line() -> None:
    rig = await make()
    await rig.disk.write(0, bytes(REGION))
    assert (await rig.target.status()).endswith("hydration_batch_size 1 rw")
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    await rig.disk.write(9 * REGION, bytes(REGION))
    flush = rig.flush()
    await settle()
    assert flush.status == errnos.EIO
    await rig.target.message(["enable_hydration"])
    assert await words_of(rig) == (
        "8 8 1/8192 0 0 4 hydration_threshold 1 hydration_batch_size 1 ro"
    )
    assert rig.target.table_words() == "m d s 8 1 no_hydration"
    await rig.stop()


async def test_6_2_fail_is_one_word_and_the_status_that_finds_out_says_error() -> None:
    rig = await make()
    await rig.disk.write(0, bytes(REGION))
    rig.metadata.fails = lambda _: errnos.EIO
    assert await rig.target.status() == "Error"
    assert await rig.target.status() == "Fail"
    assert await rig.target.status(noflush=True) == "Fail"
    assert rig.target.table_words() == "m d s 8 1 no_hydration"
    await rig.stop()


@pytest.mark.parametrize(
    "words",
    [
        "8",
        "8 1 no_hydration",
        "8 2 NO_HYDRATION no_hydration",
        "8 0 4 hydration_threshold 2 Hydration_Threshold 3",
        "8 0 0 and what follows",
    ],
)
async def test_6_2_table_is_the_devices_then_the_words_as_given(words: str) -> None:
    rig = await Rig(words=words).start()
    assert rig.target.table_words() == f"m d s {words}"
    await rig.stop()
