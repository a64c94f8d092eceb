# SPDX-License-Identifier: Apache-2.0
"""Checklist 9: dmsetup's verbs and the rules of tables, row by row.

`ROWS` says which test stands for which row; what no other file tests is tested here. What does
not apply to a server without a kernel below it:

    --addnodeoncreate, mknodes, mangle,     there are no device nodes and no udev: the export's
    udev*, --readahead                      name is the device's, any printable one
    setgeometry, measure, splitname         nothing here has a geometry, IMA or LVM's names
    stats, @stats_*                         not offered: `metrics` of the control socket
    table --showkeys                        no target has keys: secrets never stand in a table
    info: Read Ahead                        the client's affair
    ioctl's "no live table, no error"       a message to no table is ENXIO, as advised
    create with an empty table              refused, where dmsetup leaves a device without one
"""

from typing import Final

import pytest

from nbdtarget.bio import OP_READ
from nbdtarget.common.errors import ConstructorError, NbdTargetError, TableError
from nbdtarget.dm.registry import NAME_LENGTH_MAX, UUID_LENGTH_MAX
from tests.support.checklist import written_tests
from tests.support.dm import make, make_registry, submit

ERRORS = "test_refused_with_the_words_that_dmsetup_has"
INFO = "test_info_as_recorded"
CONCISE = "test_concise_devices_are_created_and_printed"

ROWS: Final[dict[str, tuple[str, ...]]] = {
    "name of 127, uuid of 128 characters": ("test_9_lengths_of_names_and_uuids",),
    "one live and one inactive slot; state; counters": (INFO,),
    "targets are contiguous from sector 0": ("test_parse_refuses", ERRORS),
    "length above 0, known type": ("test_parse_refuses", ERRORS),
    "the device must exist and be large enough": (
        ERRORS,
        "test_9_device_must_be_large_enough",
    ),
    "blank lines and comments": (
        "test_parse_several_lines_with_blank_lines_and_comments",
    ),
    "one line per target on stdin": ("test_three_line_table_as_recorded",),
    "create": ("test_create_that_fails_leaves_nothing", ERRORS),
    "create --notable": ("test_device_without_a_table_fails_all_io",),
    "create --concise": (CONCISE, "test_round_trip"),
    "create: duplicate name or uuid": (
        "test_create_refuses_a_name_or_uuid_that_is_taken",
    ),
    "create: failing resume": (
        "test_create_that_is_refused_at_preresume_leaves_nothing",
    ),
    "load": ("test_load_that_fails_leaves_both_tables_as_they_were",),
    "clear": ("test_9_clear_drops_the_inactive_table_only",),
    "suspend, resume": ("test_verbs_that_print_nothing",),
    "remove: open": ("test_remove_refuses_a_device_that_is_open", ERRORS),
    "remove --force": ("test_9_remove_force_fails_io_before_it_is_refused",),
    "remove --deferred, --retry": (
        "test_setuuid_deferred_remove_and_retry",
        "test_deferred_remove_waits_for_the_last_opener",
        "test_deferred_remove_can_be_cancelled_until_it_happens",
    ),
    "remove_all": ("test_remove_all_names_what_it_leaves", "test_tables_stack"),
    "rename": ("test_rename", ERRORS),
    "rename --setuuid": ("test_uuid_is_set_once",),
    "status": (
        "test_several_devices_have_their_names_before_each_line",
        "test_status_does_not_flush_when_suspended_or_asked_not_to",
    ),
    "table": (
        "test_table_can_be_loaded_again_as_it_is",
        "test_table_can_be_loaded_again_after_what_is_below_was_renamed",
        CONCISE,
    ),
    "message": ("test_message", "test_message_reaches_the_target_at_the_sector"),
    "wait": ("test_wait_returns_when_an_event_comes",),
    "info": (INFO, "test_info_of_other_states", "test_the_default_report"),
    "deps, ls": ("test_tree_and_deps", "test_ls_exec_runs_a_command_for_each_device"),
    "targets": ("test_targets_as_recorded",),
    "version": ("test_version_tells_of_the_server",),
    "wipe_table": ("test_9_wipe_table_keeps_the_size_and_fails_all_io",),
    "exit code": (ERRORS, "test_usage_is_exit_status_2"),
    "concise format": ("test_the_example_of_the_manual", "test_specials_are_escaped"),
    "what counts as an event": ("test_9_what_counts_as_an_event",),
    "message without a live table": ("test_message_to_a_device_without_a_table",),
    "identity of devices": ("test_linear_as_recorded",),
}


async def test_9_lengths_of_names_and_uuids() -> None:
    registry, _ = make_registry()
    name, uuid = "n" * NAME_LENGTH_MAX, "u" * UUID_LENGTH_MAX
    assert (len(name), len(uuid)) == (127, 128)
    await registry.create(name, "0 8 zero", uuid=uuid)
    for long_name, long_uuid in ((name + "n", ""), ("x", uuid + "u")):
        with pytest.raises(TableError, match="is longer than"):
            await registry.create(long_name, "0 8 zero", uuid=long_uuid)
    with pytest.raises(TableError, match="is longer than"):
        registry.rename(name, name + "n")


async def test_9_device_must_be_large_enough() -> None:
    registry, opener = make_registry(a=4096)
    with pytest.raises(ConstructorError, match="/a too small for target: start=1"):
        await registry.create("x", "0 8 linear /a 1")
    assert opener.still_open == []


async def test_9_clear_drops_the_inactive_table_only() -> None:
    device, registry, opener = await make("0 8 linear /a 0", a=4096, b=4096)
    await registry.load("x", "0 8 linear /b 0")
    for _ in range(2):
        await registry.clear("x")
        assert device.table(inactive=True) == []
        assert opener.still_open == ["/a"]
    assert device.table() == [(0, 8, "linear", "/a 0")]


async def test_9_remove_force_fails_io_before_it_is_refused() -> None:
    device, registry, _ = await make("0 8 linear /a 0", a=4096)
    registry.acquire("x")
    with pytest.raises(TableError, match="busy"):
        await registry.remove("x", force=True)
    assert device.table() == [(0, 8, "error", "")]
    registry.release(device)
    await registry.remove("x", force=True)
    assert registry.devices() == []


async def test_9_wipe_table_keeps_the_size_and_fails_all_io() -> None:
    device, registry, opener = await make("0 16 linear /a 0\n16 8 zero", a=8192)
    await registry.wipe_table("x")
    assert device.table() == [(0, 24, "error", "")]
    assert submit(device, OP_READ, 0, 512).status == 5  # EIO
    assert opener.still_open == []


async def test_9_what_counts_as_an_event() -> None:
    device, registry, _ = await make("0 8 probe /a /b", a=4096, b=4096)
    assert device.event_nr == 0
    await registry.load("x", "0 8 probe /a /b")
    await device.suspend()
    await device.resume()
    assert device.event_nr == 0
    await device.message(0, ["event"])
    assert device.event_nr == 1
    registry.rename("x", "y")
    assert device.event_nr == 2
    registry.set_uuid("y", "U")
    assert device.event_nr == 3
    with pytest.raises(NbdTargetError):
        registry.set_uuid("y", "V")
    assert device.event_nr == 3
    await registry.remove("y")
    assert device.event_nr == 4


def test_every_row_names_tests_that_exist() -> None:
    named = {name for tests in ROWS.values() for name in tests}
    assert named <= written_tests(), named - written_tests()
