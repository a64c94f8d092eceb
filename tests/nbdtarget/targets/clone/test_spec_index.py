# SPDX-License-Identifier: Apache-2.0
"""Which test stands for which row of the kernel's checklist for a clone.

Keys are section and row: a number where the checklist has one, else words from the row. Rows
where we do otherwise than the kernel, on purpose, say so in their test. `WITHOUT_A_TEST` names
what there is nothing to test of.
"""

import ast
from pathlib import Path
from typing import Final

import pytest

TESTS = Path(__file__).parents[3]

FIRST = "test_1_1_first_failing_step_gives_the_error"
OPTIONS = "test_1_1_step_7_and_8_accepted_and_defaults"
TABLE = ("test_2_1_table_rw", "test_2_1_table_ro", "test_2_1_table_fail")
FAILED_COMMIT = "test_3_1_failed_commit_reverts_goes_read_only_and_fails_who_wait"
TAKEN = "test_6_1_message_is_taken_in_every_mode"
WRONG = "test_6_1_wrong_message_is_einval_and_changes_nothing"
PRINTED = "test_6_2_status_field_by_field_as_the_kernel_printed_it"

ROWS: Final[dict[str, tuple[str, ...]]] = {
    # 1.1 the table line, in the order of its checks
    "1.1 1": (FIRST,),
    "1.1 2": (
        FIRST,
        "test_1_1_step_2_and_9_missing_metadata_is_made_last",
        "test_1_1_step_2_excess_of_the_metadata_device_is_unused",
    ),
    "1.1 3": (FIRST, "test_1_1_step_3_and_4_excess_of_data_devices_is_never_touched"),
    "1.1 4": (FIRST, "test_1_1_step_4_source_is_opened_read_only"),
    "1.1 5": (
        FIRST,
        "test_1_1_step_5_region_sizes_from_4_kib_to_1_gib",
        "test_1_1_step_5_number_above_32_bits_is_refused",
        "test_bad_region_size_has_the_kernels_text",
    ),
    "1.1 6": (
        "test_1_1_step_6_region_count_is_rounded_up",
        "test_1_1_step_6_too_many_regions",
    ),
    "1.1 7": (FIRST, OPTIONS),
    "1.1 8": (FIRST, OPTIONS),
    "1.1 9": (
        FIRST,
        "test_1_1_step_9_metadata_that_does_not_fit_is_refused",
        "test_1_1_step_9_metadata_device_that_fails_gives_its_errno",
    ),
    "1.1 10": ("test_1_1_step_10_metadata_without_write_mode_is_eperm",),
    "1.1 defaults": (OPTIONS,),
    "1.1 no upper limit, 0 is legal": (OPTIONS,),
    # 2.0 before the target
    "2.0 cut at borders": (
        "test_2_0_request_over_region_borders_reads_as_if_it_were_cut",
        "test_2_0_requests_are_not_cut_where_their_regions_are_alike",
        "test_2_0_discard_is_not_cut",
    ),
    "2.0 PREFLUSH": ("test_2_0_flush_reaches_the_target_once",),
    "2.0 FUA": ("test_2_0_fua_stays_on_the_data_where_nothing_else_makes_it_durable",),
    "2.0 WRITE_ZEROES": (
        "test_2_0_write_zeroes_is_zeroes_and_never_a_discard",
        "test_fast_zero_of_a_part_fails_at_once_and_changes_nothing",
    ),
    # 2.1 mapping
    "2.1 table": TABLE,
    "2.1 in flight until it completes": (
        "test_2_0_suspend_waits_for_what_is_in_flight_and_keeps_what_comes",
    ),
    "2.1 reads do not hydrate": ("test_2_1_read_never_hydrates",),
    "2.1 short last region": (
        "test_2_1_copy_of_a_short_last_region_is_shortened",
        "test_short_last_region_written_to_its_end_is_an_overwrite",
    ),
    "2.1 queued writes in order": (
        "test_2_1_queued_writes_are_issued_in_order_and_fua_after_a_commit",
        "test_writes_queue_behind_the_copy_of_their_region",
    ),
    "2.1 copy or overwrite fails": (
        "test_2_1_failed_copy_fails_all_who_wait_and_is_tried_again",
        "test_2_1_copy_that_ends_after_the_mode_fell_fails_its_write",
        "test_failed_overwrite_says_why_and_leaves_the_region",
    ),
    "2.1 hydration_done": ("test_hydrated_and_committed_is_one_attribute_test",),
    "2.1 source never written": (
        "test_2_1_source_is_never_written_flushed_or_discarded",
    ),
    "2.1 discard 1": (
        "test_discard_of_no_whole_region_does_nothing",
        "test_discard_never_reaches_a_short_last_region",
    ),
    "2.1 discard 2": ("test_2_1_discard_2_hydrated_range_is_trimmed_and_passed_down",),
    "2.1 discard 3": ("test_2_1_table_ro",),
    "2.1 discard 4": (
        "test_2_1_discard_4_marks_at_once_and_the_commit_follows_by_time",
        "test_discard_hydrates_whole_regions_and_is_trimmed_to_them",
        "test_discard_stays_here_without_passdown",
    ),
    "2.1 discard 5": ("test_14_9_discard_that_is_not_recorded_is_an_error",),
    "2.1 hazard": ("test_14_6_write_after_a_discard_is_not_overtaken_by_a_copy",),
    "2.1 passdown switched off": (
        "test_passdown_is_off_when_the_destination_can_not_discard",
    ),
    # 3.1 commits
    "3.1 empty flush": (
        "test_3_1_flush_with_nothing_changed_is_one_destination_flush",
        "test_3_1_flush_with_changes_is_one_commit",
        "test_3_1_flushes_of_64_clients_ride_on_two_commits_at_most",
        "test_3_1_discard_is_covered_by_the_commit_that_follows",
    ),
    "3.1 FUA to a hydrated region": (
        "test_3_1_fua_write_to_a_hydrated_region_commits_only_if_changed",
    ),
    "3.1 FUA overwrite": ("test_3_1_fua_overwrite_always_commits",),
    "3.1 time": ("test_3_1_time_commits_a_second_after_the_change_and_never_idly",),
    "3.1 status": ("test_3_1_status_commits_unless",),
    "3.1 suspend": ("test_3_1_suspend_commits_after_all_hydrations_have_ended",),
    "3.1 step 1": ("test_3_1_step_1_nothing_changed_leaves_the_destination_unflushed",),
    "3.1 step 2": ("test_3_1_step_2_read_only_metadata_is_not_committed",),
    "3.1 step 3": (
        "test_3_1_step_3_what_is_hydrated_during_a_commit_belongs_to_the_next",
    ),
    "3.1 step 4": ("test_3_1_flushes_run_together_and_the_superblock_after_both",),
    "3.1 step 5": ("test_3_1_journal_flush_alone_does_not_let_the_superblock_go",),
    "3.1 step 6": ("test_3_1_step_6_completion_raises_one_event",),
    "3.1 failure": (FAILED_COMMIT, "test_3_1_unreadable_metadata_is_fail_and_stays_so"),
    "3.1 regions revert": (FAILED_COMMIT,),
    "3.1 who waits gets EIO": (FAILED_COMMIT,),
    "3.1 changed stays set": (FAILED_COMMIT,),
    "3.1 mode only falls": ("test_3_1_only_a_new_table_returns_to_rw",),
    "3.1 flush elided or passed down": (
        "test_3_1_flush_is_not_sent_again_after_the_commit_that_flushed",
        "test_3_1_flush_is_passed_down_after_a_commit_that_found_nothing",
    ),
    # 4.1 hydration
    "4.1 who wakes it": (
        "test_4_1_message_wakes_it",
        "test_4_1_end_of_client_io_wakes_it_soon",
    ),
    "4.1 start conditions": ("test_4_1_nothing_starts_when",),
    "4.1 loop 1": (
        "test_4_1_step_1_foreground_copies_count_against_the_threshold",
        "test_threshold_is_kept_as_the_kernel_counts",
    ),
    "4.1 loop 2": ("test_4_1_step_2_hydrated_and_busy_regions_are_skipped",),
    "4.1 loop 3": (
        "test_4_1_step_3_batch_is_adjacent_regions_only",
        "test_4_1_step_3_batch_of_at_most_one_is_issued_at_once",
        "test_4_1_step_3_batch_is_bounded_by_the_threshold",
    ),
    "4.1 loop 4": ("test_4_1_step_4_offset_begins_at_0_and_goes_round",),
    "4.1 copy job": ("test_4_1_copy_is_one_job_for_a_batch_shortened_at_the_tail",),
    "4.1 failure": (
        "test_14_8_bad_sector_costs_no_neighbour_of_its_batch",
        "test_14_8_broken_region_is_tried_again_ever_more_seldom",
    ),
    "4.1 success": (
        "test_4_1_success_sets_the_bits_then_issues_the_queued_writes",
        "test_4_1_last_hydration_wakes_suspend",
    ),
    "4.1 throttling": ("test_4_1_client_io_slows_it_and_does_not_stop_it",),
    "4.1 reads never promote": ("test_4_1_reads_never_promote_a_region",),
    "4.1 completion": (
        "test_4_1_completion_is_status_first_and_the_event_at_the_commit",
        "test_4_1_full_bitmap_is_done_when_opened",
    ),
    "4.1 recipe": ("test_4_1_users_recipe",),
    # 5.2 suspend and resume
    "5.2 ctor": ("test_5_2_constructor_loads_the_bitmap_and_starts_nothing",),
    "5.2 resume": ("test_5_2_resume_starts_hydration",),
    "5.2 postsuspend": (
        "test_5_2_postsuspend_waits_commits_and_stops_the_timer",
        "test_5_2_failed_commit_of_a_suspend_shows_only_in_the_mode",
    ),
    "5.2 metadata not shared": (
        "test_5_2_metadata_is_one_object_for_live_and_inactive_table",
    ),
    "5.2 sizes are fixed": (
        "test_5_2_region_size_is_fixed_for_the_life_of_the_metadata",
        "test_5_2_target_size_is_fixed_for_the_life_of_the_metadata",
    ),
    "5.2 new table": (
        "test_5_2_new_table_begins_at_offset_0_with_the_lines_values",
        "test_5_2_same_table_keeps_its_state_over_suspend_and_resume",
    ),
    # 6.1 messages
    "6.1 enable_hydration": (TAKEN, "test_4_1_message_wakes_it"),
    "6.1 disable_hydration": (TAKEN, "test_6_1_disable_lets_running_copies_finish"),
    "6.1 hydration_threshold": (TAKEN, WRONG),
    "6.1 hydration_batch_size": (TAKEN, WRONG),
    "6.1 other": (WRONG, "test_6_1_other_message_is_logged"),
    "6.1 case, every mode": (TAKEN, "test_6_1_messages_never_alter_the_table_line"),
    # 6.2 status
    "6.2 1": (PRINTED, "test_6_2_field_1_and_2_are_metadata_blocks_of_4_kib"),
    "6.2 2": ("test_6_2_field_1_and_2_are_metadata_blocks_of_4_kib",),
    "6.2 3": (PRINTED,),
    "6.2 4": (
        PRINTED,
        "test_6_2_field_4_is_the_count_in_core",
        "test_6_2_field_4_counts_a_short_last_region",
    ),
    "6.2 5": ("test_6_2_field_5_counts_background_and_foreground",),
    "6.2 6": ("test_6_2_field_6_and_7_features_in_order_as_they_are_now",),
    "6.2 7": (
        "test_6_2_field_6_and_7_features_in_order_as_they_are_now",
        "test_6_2_field_7_says_when_passdown_was_switched_off",
    ),
    "6.2 8": (PRINTED, TAKEN),
    "6.2 9": ("test_6_2_field_9_mode_ends_the_line",),
    "6.2 Fail, Error": (
        "test_6_2_fail_is_one_word_and_the_status_that_finds_out_says_error",
    ),
    "6.2 TABLE": ("test_6_2_table_is_the_devices_then_the_words_as_given",),
    # 11.1 the battery; its item 12 is throughput, which `make bench` measures
    "11.1 1": ("test_11_1_1_bring_up_clone_target",),
    "11.1 2": ("test_11_1_2_huge_region_size",),
    "11.1 3": (
        "test_11_1_3_non_power_of_2_region_size_fails",
        "test_11_1_3_too_small_region_size_fails",
        "test_11_1_3_too_large_region_size_fails",
    ),
    "11.1 4": ("test_11_1_4_largest_region_size_succeeds",),
    "11.1 5": ("test_11_1_5_too_small_metadata_dev_fails",),
    "11.1 6": (
        "test_11_1_6_opening_with_different_region_size_fails",
        "test_11_1_6_opening_with_different_target_size_fails",
    ),
    "11.1 7": ("test_11_1_7_data_devices_smaller_than_target_fails",),
    "11.1 8": ("test_11_1_8_commit_on_flush",),
    "11.1 9": ("test_11_1_9_commit_periodically",),
    "11.1 10": ("test_11_1_10_pattern_stomp_test",),
    "11.1 11": ("test_11_1_11_filesystem_test",),
    "11.1 add flush failure": ("test_11_1_add_flush_failure_at_commit",),
    "11.1 add short tail": (
        "test_11_1_add_short_tail_region_write_and_discard",
        "test_11_1_add_short_tail_written_whole_copies_nothing",
    ),
    "11.1 add overwrite with FUA": ("test_11_1_add_overwrite_with_fua",),
    "11.1 add discard vs copy": ("test_11_1_add_discard_vs_in_flight_copy",),
    "11.1 add second flush": (
        "test_11_1_add_second_flush_is_elided",
        "test_11_1_add_second_flush_is_not_elided",
    ),
    "11.1 add threshold": ("test_11_1_add_threshold_limits",),
    "11.1 add copy failure retry": ("test_11_1_add_copy_failure_is_tried_again",),
    "11.1 add crash at each boundary": (
        "test_no_promise_is_broken_whatever_fails",
        "test_no_power_cut_loses_what_was_promised",
    ),
    "11.1 add status while suspended": (
        "test_11_1_add_status_while_suspended_does_not_commit",
    ),
    # 14 weaknesses that concern a clone
    "14 6": (
        "test_14_6_write_after_a_discard_is_not_overtaken_by_a_copy",
        "test_14_6_copy_does_not_begin_while_a_discard_is_under_way",
    ),
    "14 7": (
        "test_14_7_live_and_inactive_table_have_one_metadata",
        "test_14_7_second_user_of_metadata_or_destination_is_refused",
        "test_14_7_one_device_in_two_roles_is_refused",
    ),
    "14 8": (
        "test_14_8_bad_sector_costs_no_neighbour_of_its_batch",
        "test_14_8_failure_is_told_by_one_line_and_one_event",
        "test_14_8_broken_region_is_tried_again_ever_more_seldom",
        "test_14_8_part_write_that_covers_the_bad_sector_needs_nothing_of_it",
    ),
    "14 9": (
        "test_14_9_discard_that_is_not_recorded_is_an_error",
        "test_14_9_discard_with_fua_is_an_error_when_its_commit_fails",
    ),
    "14 16": (
        "test_14_16_completion_is_told_when_the_last_bits_are_durable",
        "test_14_16_commit_that_fails_after_that_reverts_to_the_source",
    ),
    "2.1 I/O hints": (
        "test_limits_of_targets",
        "test_clients_are_told_the_region_size_of_a_clone",
    ),
}

WITHOUT_A_TEST: Final = {
    "1.1 9 the errno of a wrong block number or version": "another format: EILSEQ or EINVAL",
    "2.0 WRITE_SAME, secure erase": "NBD has no such request",
    "2.1 advertised discard limits": "NBD has no word for them",
    "2.1 passdown off when the largest discard is small": "devices here take any length",
    "4.1 clone_hydration_throttle": "a parameter of the kernel's module",
}

# How far each section counts.
NUMBERED: Final = {
    "1.1": range(1, 11),
    "2.1 discard": range(1, 6),
    "3.1 step": range(1, 7),
    "4.1 loop": range(1, 5),
    "6.2": range(1, 10),
    "11.1": range(1, 12),
    "14": (6, 7, 8, 9, 16),
}


def functions(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    }


def test_every_row_names_tests_that_exist() -> None:
    written = {name for path in TESTS.rglob("test_*.py") for name in functions(path)}
    named = {name for tests in ROWS.values() for name in tests}
    assert all(ROWS.values())
    assert named <= written


@pytest.mark.parametrize("section", NUMBERED)
def test_no_number_is_left_out(section: str) -> None:
    missing = [nr for nr in NUMBERED[section] if f"{section} {nr}" not in ROWS]
    assert missing == []


def test_every_test_of_the_checklist_stands_in_a_row() -> None:
    ours = [*Path(__file__).parent.glob("test_spec_*.py")]
    ours += (TESTS / "clone_battery").glob("test_*.py")
    ours.remove(Path(__file__))
    written = {name for path in ours for name in functions(path)}
    named = {name for tests in ROWS.values() for name in tests}
    assert written - named == set()
