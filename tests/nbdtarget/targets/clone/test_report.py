# SPDX-License-Identifier: Apache-2.0
"""Status: the kernel's line while nothing else is set, and everything by name."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE
from nbdtarget_metadata.mode import Mode
from tests.support.clock import settle
from tests.support.clone import REGION, Rig


async def tail(rig: Rig) -> str:
    """The status line from the number of features on."""
    return " ".join((await rig.target.status(noflush=True)).split()[5:])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "1 no_hydration",
            "1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 rw",
        ),
        (
            "4 then_linear hydrate_on_read no_discard_passdown no_hydration",
            "4 no_hydration no_discard_passdown hydrate_on_read then_linear"
            " 4 hydration_threshold 1 hydration_batch_size 1 rw",
        ),
        (
            "1 no_hydration 8 event_after_errors 3 hydration_rate 5"
            " hydration_batch_size 7 hydration_threshold 9",
            "1 no_hydration 8 hydration_threshold 9 hydration_batch_size 7"
            " hydration_rate 5 event_after_errors 3 rw",
        ),
        (
            "1 no_hydration 4 event_after_errors 1 hydration_rate 0",
            "1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 rw",
        ),
    ],
)
async def test_our_words_show_only_when_set(words: str, line: str) -> None:
    rig = await Rig(words=f"8 {words}").start()
    assert await tail(rig) == line
    # The words that the status prints can be given to the constructor again.
    again = await Rig(words=f"8 {line.removesuffix(' rw')}").start()
    assert await tail(again) == line
    assert rig.target.table_words() == f"m d s 8 {words}"


async def test_fields_say_what_is_set_and_where_it_stands() -> None:
    rig = await Rig(words="8 2 no_hydration then_linear 2 hydration_rate 99").start()
    rig.bio(OP_WRITE, 0, 3 * REGION)
    rig.source.hold = True
    rig.bio(OP_WRITE, 4 * REGION + 512, 512)
    fields = rig.target.status_fields()
    used, total = (await rig.target.status(noflush=True)).split()[1].split("/")
    assert fields == {
        "mode": "rw",
        "metadata_block_size_sectors": 8,
        "metadata_blocks_used": int(used),
        "metadata_blocks_total": int(total),
        "region_size_bytes": 4096,
        "regions_total": 8,
        "regions_hydrated": 3,
        "regions_hydrating": 1,
        "hydrated_durably": False,
        "hydration": False,
        "hydration_threshold": 1,
        "hydration_batch_size": 1,
        "hydration_rate_bytes_per_s": 99,
        "hydrate_on_read": False,
        "discard_passdown": True,
        "then_linear": True,
        "event_after_errors": 1,
        "errors": 0,
        "last_error": None,
        "regions_failed": 0,
        "retry_in_s": None,
        "source_open": True,
        "source_changed": None,
        "source_requests": None,
        "source_retries": None,
        "source_bytes": None,
        "source_away_since_s": None,
        "source_away_s": None,
        "commits": 0,
        "commit_time_s": 0.0,
    }
    rig.source.let_go()
    await rig.stop()


async def test_hydrated_is_told_when_it_is_durable() -> None:
    rig = await Rig().start()
    rig.bio(OP_WRITE, 0, rig.size)
    assert rig.target.status_fields()["hydrated_durably"] is False
    await rig.disk.flush()
    assert rig.target.status_fields()["hydrated_durably"] is True


async def test_fields_are_there_when_the_line_says_fail() -> None:
    rig = await Rig().start()
    rig.bio(OP_WRITE, 0, REGION)
    rig.target._metadata.fail()
    rig.target._look_at_mode()
    assert await rig.target.status() == "Fail"
    assert rig.target.status_fields()["mode"] == Mode.FAIL.value


async def test_status_counts_errors_and_says_when_they_are_tried_again() -> None:
    rig = Rig(size=16 * REGION, words="8 0 2 hydration_threshold 4")
    rig.source.fails = lambda bio: (
        errnos.EIO if 5 <= bio.offset // REGION < 9 and bio.op == OP_READ else 0
    )
    await rig.start()
    await settle(300)
    fields = rig.target.status_fields()
    assert (fields["errors"], fields["regions_failed"]) == (4, 4)
    last_error = str(fields["last_error"])
    assert last_error.startswith("hydration: ")
    assert last_error.endswith("Input/output error")
    retry_in_s = fields["retry_in_s"]
    assert isinstance(retry_in_s, float)
    assert 0 < retry_in_s <= 1
    assert rig.bio(OP_WRITE, 6 * REGION, 512).status == errnos.EIO
    rig.bio(OP_WRITE, 7 * REGION, REGION)  # heals it
    fields = rig.target.status_fields()
    assert str(fields["last_error"]).startswith("copy for a client's write: ")
    assert (fields["errors"], fields["regions_failed"]) == (5, 3)
    rig.source.fails = lambda _: 0
    for _ in range(40):
        rig.clock.advance(0.1)
        await settle(30)
    fields = rig.target.status_fields()
    assert fields["regions_hydrated"] == 16
    assert (fields["errors"], fields["regions_failed"]) == (5, 0)
    assert fields["retry_in_s"] is None
    await rig.stop()


async def test_status_says_when_a_dead_source_is_tried_again() -> None:
    rig = Rig(size=64 * REGION, words="8")
    rig.source.fails = lambda bio: errnos.EIO
    await rig.start()
    for _ in range(150):  # 15 s: all that have failed are due, and hydration rests
        rig.clock.advance(0.1)
        await settle(30)
    retry_in_s = rig.target.status_fields()["retry_in_s"]
    assert isinstance(retry_in_s, float)
    nr_errors = rig.target.status_fields()["errors"]
    assert isinstance(nr_errors, int)
    rig.clock.advance(retry_in_s * 0.9)
    await settle(30)
    assert rig.target.status_fields()["errors"] == nr_errors
    rig.clock.advance(retry_in_s * 0.2)
    await settle(30)
    assert rig.target.status_fields()["errors"] == nr_errors + 1
    await rig.stop()


async def failures(rig: Rig, seconds: float) -> None:
    for _ in range(round(seconds / 0.1)):
        rig.clock.advance(0.1)
        await settle(30)


async def test_event_is_raised_at_the_set_number_of_errors_and_for_new_ones() -> None:
    rig = Rig(size=16 * REGION, words="8 0 2 event_after_errors 3")
    bad = {5}
    rig.source.fails = lambda bio: errnos.EIO if bio.offset // REGION in bad else 0
    await rig.start()
    await settle(300)
    await failures(rig, 2)
    assert rig.target.status_fields()["errors"] == 2
    assert rig.ctx.nr_events == 0
    await failures(rig, 5)  # the same region, for the third and fourth time
    assert rig.target.status_fields()["errors"] in (3, 4)
    assert rig.ctx.nr_events == 1
    await failures(rig, 60)
    assert rig.ctx.nr_events == 1
    await rig.stop()


async def test_event_comes_for_each_region_that_fails_anew_after_that() -> None:
    rig = Rig(size=16 * REGION, words="8 0 2 event_after_errors 2")
    bad = {5, 7, 11}
    rig.source.fails = lambda bio: errnos.EIO if bio.offset // REGION in bad else 0
    await rig.start()
    await settle(300)
    assert rig.target.status_fields()["errors"] == 3
    assert rig.ctx.nr_events == 2
    await rig.stop()


async def test_event_after_errors_0_raises_no_event() -> None:
    rig = Rig(size=16 * REGION, words="8 1 no_hydration")
    rig.source.fails = lambda bio: errnos.EIO
    await rig.start()
    await rig.target.message(["event_after_errors", "0"])
    await rig.target.message(["enable_hydration"])
    await settle(300)
    await failures(rig, 5)
    assert rig.target.status_fields()["errors"] > 10  # type: ignore[operator]
    assert rig.ctx.nr_events == 0
    await rig.stop()


async def test_clients_copies_that_fail_are_counted_and_may_be_an_event() -> None:
    rig = Rig(words="8 1 no_hydration 2 event_after_errors 2")
    rig.source.fails = lambda bio: errnos.EIO
    await rig.start()
    for nr in range(3):
        assert rig.bio(OP_WRITE, nr * REGION + 512, 512).status == errnos.EIO
    fields = rig.target.status_fields()
    assert (fields["errors"], fields["regions_failed"]) == (3, 0)
    assert rig.ctx.nr_events == 1
