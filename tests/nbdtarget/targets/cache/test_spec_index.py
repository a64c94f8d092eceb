# SPDX-License-Identifier: Apache-2.0
"""Which test stands for which row of the kernel's checklist for a cache.

Keys are section and row: a number where the checklist has one, else words from the row. Rows
where we do otherwise than the kernel, on purpose, say so in their test. `WITHOUT_A_TEST` names
what there is nothing to test of.
"""

import ast
from pathlib import Path
from typing import Final

import pytest

TESTS = Path(__file__).parents[3]
BATTERY = TESTS / "cache_battery"

REFUSALS = "test_refusal_touches_nothing"
OPTIONS = ("test_options", "test_bad_options_have_the_kernels_text")
WORDS = "test_words_are_shown_as_the_constructor_understood_them"
RECORDED = "test_passthrough_and_its_messages"
LINE = "test_line_of_a_used_cache_has_every_count_in_its_place"
FRESH = "test_fresh_line_is_as_recorded"
EINVAL = "test_6_3_other_words_are_einval_and_change_nothing"
RANGES = ("test_ranges", "test_bad_range_has_the_kernels_text")
FAILED = (
    "test_3_2_failed_commit_is_ro_and_the_disk_has_the_commit_before",
    "test_3_2_metadata_device_that_fails_all_writes_is_ro_and_serves_reads",
)
FUA = "test_2_2_3_fua_waits_for_the_commit_of_its_mapping_then_goes_with_fua"
OVERWRITE = "test_2_2_3_writeback_whole_block_is_promoted_without_a_copy"
FREED = "test_4_2_demotion_frees_the_cblock_after_the_commit"
SYNC = "test_3_2_full_sync_records_all_after_both_flushes"
# The same steps with real processes: `make passthrough-bugs`.
UNCLEAN = "test_5_3_step_2_passthrough_after_an_unclean_shutdown"
PRELOADED = "test_passthrough_is_loaded_early_and_refused_late"

TABLE: Final[dict[str, tuple[str, ...]]] = {
    # the table line, in the order of its checks
    "1.2 1": (REFUSALS,),
    "1.2 2": (
        REFUSALS,
        "test_1_2_step_2_all_three_are_opened_for_writing",
        "test_missing_metadata_is_created_at_the_right_size",
    ),
    "1.2 3": (
        REFUSALS,
        "test_1_2_step_3_origin_shorter_than_the_table",
        "test_1_2_step_3_excess_of_the_origin_is_not_touched",
    ),
    "1.2 4": (
        REFUSALS,
        "test_block_size_is_in_sectors_and_a_multiple_of_64",
        "test_bad_block_size_has_the_kernels_text",
        "test_block_must_fit_on_the_cache_device",
        "test_1_2_block_size_need_not_be_a_power_of_two",
    ),
    "1.2 5": (REFUSALS, *OPTIONS, WORDS),
    "1.2 6": (
        REFUSALS,
        *OPTIONS,
        "test_policy_takes_as_many_arguments_as_the_kernels",
    ),
    "1.2 7": (
        "test_1_2_step_7_sizes_are_rounded_down",
        "test_block_size_may_be_no_power_of_two_and_the_origin_smaller_than_it",
        "test_many_cache_blocks_are_a_warning",
    ),
    "1.2 8": (REFUSALS, "test_unknown_policy_is_refused_by_name"),
    "1.2 9": (
        REFUSALS,
        *OPTIONS,
        "test_old_keys_of_mq_are_taken_with_a_warning",
        "test_smq_and_cleaner_take_no_keys",
        "test_mq_refuses_other_keys_and_what_is_no_number",
    ),
    "1.2 10": (
        REFUSALS,
        "test_other_block_size_is_refused",
        "test_unreadable_metadata_are_refused_with_the_devices_errno",
        "test_unknown_incompatible_feature_is_refused",
        "test_construction_leaves_the_clean_shutdown_on_disk",
    ),
    "1.2 11": ("test_metadata_that_need_a_check_are_refused",),
    "1.2 12": (
        "test_passthrough_promotes_nothing",
        "test_5_3_loading_a_passthrough_table_always_succeeds",
    ),
    "1.2 defaults": ("test_1_2_defaults",),
    "1.2 metadata2": ("test_1_2_metadata2_is_shown_as_the_table_has_it",),
    "1.2 policies": (
        "test_1_2_policies_and_the_names_they_report",
        "test_table_names_the_kernels_policies",
        "test_all_are_version_2_with_hints_of_4_bytes",
        "test_mq_shows_its_old_keys_as_0",
        "test_cleaner_never_promotes_whoever_asks",
        "test_cleaner_gets_done_however_often_its_blocks_are_hit",
    ),
    "1.2 at most 128 migrations": ("test_1_2_migrations_under_way_are_bounded",),
    "1.2 two flushes": ("test_3_2_flush_without_a_change_flushes_both_devices_only",),
    "1.2 begins at 0": ("test_1_2_cache_need_not_begin_at_sector_0",),
}

MAPPING: Final[dict[str, tuple[str, ...]]] = {
    "2.2.1 two levels": (
        "test_2_2_1_read_passes_a_block_that_is_copied_a_write_waits",
        "test_2_2_1_read_waits_only_while_a_cblock_becomes_another_ones",
    ),
    "2.2.1 parked": (
        "test_2_2_1_parked_bios_run_from_the_beginning",
        "test_3_2_write_that_waits_for_a_demotion_waits_for_no_second",
    ),
    "2.2.1 quiesce": (
        "test_2_2_1_lock_waits_for_the_writes_that_were_there_before",
        "test_2_2_1_admitted_reads_starve_nobody",
    ),
    "2.2.1 upgrade": (
        "test_2_2_1_read_waits_only_while_a_cblock_becomes_another_ones",
    ),
    "2.2.2 1": (
        "test_2_2_2_tail_block_goes_straight_to_the_origin",
        "test_2_2_2_write_into_the_tail_is_cut_where_it_begins",
    ),
    "2.2.2 2": (FUA, "test_2_2_5_discard_waits_for_writes_and_writes_for_it"),
    "2.2.2 3": ("test_2_2_1_lock_waits_for_the_writes_that_were_there_before",),
    "2.2.2 ro and Fail": ("test_2_2_2_ro_serves_reads_and_fail_serves_nothing",),
    "2.2.3 any, miss": (
        "test_2_2_3_any_mode_miss_goes_to_the_origin_and_is_counted",
        "test_2_2_3_miss_is_promoted_later_if_the_policy_wants",
        "test_2_2_5_write_to_any_part_clears_the_whole_dblock",
    ),
    "2.2.3 writeback, optimisable": (
        OVERWRITE,
        "test_2_2_3_writeback_part_of_a_discarded_block_is_promoted_zero_filled",
        "test_2_2_3_writeback_read_of_a_discarded_block_is_the_origins",
        "test_4_2_overwritten_block_is_dirty_and_at_the_top",
    ),
    "2.2.3 writeback, hit": ("test_2_2_3_writeback_hit",),
    "2.2.3 writethrough, hit, clean": (
        "test_2_2_3_writethrough_hit_of_a_clean_block",
        "test_2_2_3_writethrough_completes_when_both_have",
        "test_2_2_3_writethrough_error_of_either_leaves_one_copy_that_counts",
    ),
    "2.2.3 writethrough, hit, dirty": ("test_2_2_3_writethrough_hit_of_a_dirty_block",),
    "2.2.3 passthrough, hit": (
        "test_2_2_3_passthrough_read_hit_is_the_origins",
        "test_2_2_3_passthrough_write_hit_gives_the_block_up",
    ),
    "2.2.3 passthrough, miss": (
        "test_2_2_3_any_mode_miss_goes_to_the_origin_and_is_counted",
    ),
    "2.2.3 nothing is optimisable": (
        "test_2_2_3_nothing_is_optimisable_but_in_writeback",
    ),
    "2.2.3 passthrough never promotes": (
        "test_2_2_3_passthrough_never_promotes_and_never_wakes_the_migrations",
    ),
    "2.2.3 no longer optimisable": (
        "test_2_2_3_second_write_to_a_discarded_block_finds_a_hit",
    ),
    "2.2.3 overwrite fails": (
        "test_2_2_3_failed_overwrite_goes_to_the_origin_and_frees_the_cblock",
    ),
    "2.2.3 FUA": (
        FUA,
        "test_2_2_3_fua_with_nothing_to_commit_goes_at_once",
        "test_2_2_3_fua_whose_commit_fails_is_an_error",
    ),
    "2.2.3 FUA overwrite": ("test_3_2_fua_of_an_overwrite_ends_after_the_commit",),
    "2.2.3 counters": (
        "test_2_2_3_counters_count_blocks_touched_and_no_flush_or_discard",
    ),
    "2.2.3 tick bio": ("test_2_2_3_time_passes_with_the_bios_too",),
    "2.2.4 1": ("test_2_2_4_two_writes_to_one_block_at_once",),
    "2.2.4 2": (
        "test_2_2_4_order_is_remove_commit_then_write",
        "test_2_2_4_block_that_is_unmapped_meanwhile_is_fine",
    ),
    "2.2.4 3": (
        "test_2_2_4_order_is_remove_commit_then_write",
        "test_2_2_4_failed_commit_is_eio_and_the_origin_is_not_written",
    ),
    "2.2.4 4": ("test_2_2_4_write_clears_the_discard_bit_and_has_the_origins_status",),
    "2.2.5 whole dblocks": (
        "test_2_2_5_whole_dblocks_only_are_marked",
        "test_whole_dblocks_are_marked",
    ),
    "2.2.5 cached blocks stay": ("test_2_2_5_cached_blocks_stay_cached_and_dirty",),
    "2.2.5 passdown": (
        "test_2_2_5_whole_discard_goes_to_the_origin_untrimmed",
        "test_2_2_5_without_passdown_it_ends_here",
    ),
    "2.2.5 serialized": ("test_2_2_5_discard_waits_for_writes_and_writes_for_it",),
    "2.2.5 cleared": (
        "test_2_2_5_write_to_any_part_clears_the_whole_dblock",
        "test_2_2_5_promotion_clears_it_once_it_is_done",
        "test_clear_takes_the_whole_dblock_back",
    ),
    "2.2.5 skips the copy": ("test_2_2_5_migrations_of_discarded_blocks_copy_nothing",),
    "2.2.5 limits": (
        "test_2_2_5_io_hints_are_the_block_size",
        "test_2_2_5_passdown_is_off_if_the_origin_takes_no_discards",
    ),
    "2.2.5 beyond the end": ("test_2_2_5_discard_beyond_the_end_is_refused",),
}

COMMITS: Final[dict[str, tuple[str, ...]]] = {
    "3.2 flush": (
        "test_3_2_flush_with_a_change_is_one_commit_and_no_second_flush",
        "test_3_2_flush_without_a_change_flushes_both_devices_only",
        "test_3_2_flush_fails_if_one_device_cannot_be_flushed",
        "test_3_2_origin_that_nothing_was_written_to_needs_no_flush",
        "test_3_2_any_write_that_reached_the_origin_needs_its_flush",
        "test_3_2_written_back_block_needs_the_flush_of_the_origin",
        "test_3_2_flush_that_began_beside_a_write_is_no_flush_of_that_write",
    ),
    "3.2 FUA bio": (FUA, "test_3_2_fua_miss_needs_no_commit"),
    "3.2 demotion": ("test_3_2_demotion_ends_after_the_commit_of_its_removal",),
    "3.2 passthrough invalidation": ("test_2_2_4_order_is_remove_commit_then_write",),
    "3.2 bio blocked on a lock": (
        "test_3_2_write_that_waits_for_a_demotion_waits_for_no_second",
    ),
    "3.2 status": ("test_3_2_status_commits", "test_3_2_status_does_not_commit_when"),
    "3.2 suspend, remove": (SYNC, "test_3_2_full_sync_of_a_removed_table"),
    "3.2 1 s waker": ("test_3_2_time_commits_a_second_after_a_change_and_never_idly",),
    "3.2 promotion": ("test_3_2_promotion_waits_for_no_commit",),
    "3.2 what counts as changed": (
        "test_3_2_flush_without_a_change_flushes_both_devices_only",
    ),
    "3.2 batching": ("test_3_2_one_commit_serves_all_that_wait_when_it_starts",),
    "3.2 commit steps": (
        "test_3_2_flush_with_a_change_is_one_commit_and_no_second_flush",
        "test_insertion_needs_the_cache_flushed_and_a_clean_one_the_origin_it_was_copied_from",
    ),
    "3.2 full sync": (SYNC, "test_3_2_failed_full_sync_does_not_say_clean"),
    "3.2 failure": (
        *FAILED,
        "test_3_2_who_waits_gets_the_error_and_so_does_every_later_flush",
        "test_3_2_only_a_new_table_returns_to_rw",
        "test_3_2_failed_flush_of_a_data_device_is_no_damage_of_the_metadata",
        "test_3_2_fail_is_never_left",
        "test_11_2_13_commit_failure_shows_needs_check_until_it_is_loaded_again",
    ),
    "3.2 RO": (
        "test_3_2_ro_promotes_and_demotes_nothing",
        "test_3_2_ro_flush_and_fua_fail_changed_or_not",
        "test_3_2_ro_writes_where_nothing_need_be_recorded",
        "test_3_2_ro_and_fail_take_no_messages",
    ),
    "3.2 events": (
        "test_3_2_event_when_nothing_is_dirty_any_more",
        "test_3_2_failed_commit_is_ro_and_the_disk_has_the_commit_before",
    ),
    "3.2 order: commit for a promotion": (
        "test_3_2_mapping_is_committed_after_the_flush_of_its_data",
    ),
    "3.2 order: demotion": (
        "test_3_2_removal_is_committed_after_the_flush_of_the_origin",
    ),
    "3.2 order: full sync": (SYNC,),
    "3.2 order: FUA": ("test_3_2_fua_of_an_overwrite_ends_after_the_commit",),
}

BACKGROUND: Final[dict[str, tuple[str, ...]]] = {
    "4.2 step 1": ("test_4_2_promotion_copies_then_inserts",),
    "4.2 step 2": ("test_2_2_1_lock_waits_for_the_writes_that_were_there_before",),
    "4.2 step 3": (
        "test_4_2_promotion_copies_then_inserts",
        "test_4_2_demotion_copies_back_what_is_dirty_only",
        "test_4_2_block_that_turns_dirty_before_its_demotion_is_copied_back",
        "test_2_2_5_migrations_of_discarded_blocks_copy_nothing",
    ),
    "4.2 step 4": ("test_2_2_1_read_waits_only_while_a_cblock_becomes_another_ones",),
    "4.2 step 5": ("test_2_2_1_read_waits_only_while_a_cblock_becomes_another_ones",),
    "4.2 step 6": (
        FREED,
        "test_4_2_writeback_changes_no_mapping_and_commits_nothing",
    ),
    "4.2 step 7": ("test_4_2_finished_migration_starts_the_next",),
    "4.2 promote (copied)": (
        "test_4_2_promoted_block_is_clean_and_at_the_top",
        "test_4_2_failed_promotion_frees_its_cblock",
    ),
    "4.2 promote (overwrite)": (
        "test_4_2_overwritten_block_is_dirty_and_at_the_top",
        "test_2_2_3_failed_overwrite_goes_to_the_origin_and_frees_the_cblock",
    ),
    "4.2 demote": (
        FREED,
        "test_4_2_failed_demotion_leaves_the_block_as_it_was",
        "test_4_2_demotion_whose_commit_fails_leaves_the_block_readable",
    ),
    "4.2 writeback": (
        "test_3_2_event_when_nothing_is_dirty_any_more",
        "test_4_2_failed_writeback_leaves_it_dirty_and_is_tried_again",
    ),
    "4.2 cannot diverge": ("test_4_2_bitset_and_policy_never_diverge",),
    "4.2 worker": (
        "test_4_2_nothing_migrates_in_passthrough",
        "test_4_2_timer_cleans_an_idle_cache",
        "test_4_2_finished_migration_starts_the_next",
        "test_4_2_suspend_waits_for_what_is_under_way",
    ),
    "4.2 idle": (
        "test_4_2_timer_cleans_an_idle_cache",
        "test_4_2_cache_that_was_just_resumed_is_not_idle",
        "test_4_2_busy_cache_is_not_idle",
        "test_4_2_bio_that_lasts_is_not_idle",
        "test_4_2_threshold_bounds_idle_writebacks_under_way",
    ),
    "4.2 migration_threshold": (
        "test_4_2_threshold_below_a_block_never_cleans_by_itself",
        "test_4_2_threshold_bounds_nothing_but_idle_writebacks",
        "test_4_2_wish_makes_room_for_what_it_wants_and_no_more",
    ),
    "4.2 throttle": ("test_4_2_copies_are_throttled_by_migration_rate",),
    "4.2 tracker": (
        "test_newest_is_issued_first",
        "test_one_for_each_oblock_until_it_is_complete",
        "test_bound_counts_queued_and_issued_work_together",
    ),
    "4.3 entities": (
        "test_push_puts_at_the_tail_and_push_front_at_the_head",
        "test_free_cblocks_are_given_out_in_the_order_they_were_freed",
        "test_6_4_used_blocks_have_those_that_are_on_the_way",
    ),
    "4.3 hotspot geometry": ("test_geometry", "test_neighbours_share_a_hotspot_block"),
    "4.3 sentinels": (
        "test_peek_not_past_sentinels_sees_only_what_is_ahead_of_the_first",
        "test_entry_is_old_after_two_ends_of_period",
    ),
    "4.3 targets per level": (
        "test_lengths_are_even_and_the_lowest_levels_get_the_rest",
        "test_lonely_entry_rises_through_levels_without_a_share",
    ),
    "4.3 redistribute": ("test_redistribution_is_the_one_by_one_kind",),
    "4.3 requeue": (
        "test_requeue_swaps_with_the_oldest_of_the_new_level",
        "test_requeue_by_nothing_only_makes_it_the_newest",
        "test_requeue_stops_at_the_top_level_and_swaps_nobody_there",
        "test_swapped_down_entry_keeps_its_age_class",
    ),
    "4.3 statistics": ("test_performance_decides_promote_level_and_jump",),
    "4.3 lookup, hit": (
        "test_hit_rises_one_level_once_in_a_period_of_60_s",
        "test_hits_count_anew_after_60_s",
        "test_hit_without_copy_hands_out_no_work",
    ),
    "4.3 lookup, miss": (
        "test_unknown_block_takes_the_oldest_entry_of_the_lowest_level_and_its_level",
        "test_level_rises_once_between_two_ticks",
        "test_write_without_copy_is_promoted_at_once_while_there_is_room",
        "test_write_with_a_copy_needs_a_hot_block",
        "test_read_without_copy_needs_a_hot_block_as_any_other",
    ),
    "4.3 promote level": (
        "test_nothing_is_promoted_before_the_first_tick",
        "test_promote_level_follows_each_tick_and_the_jump_each_period",
    ),
    "4.3 queue a promotion": (
        "test_policy_that_may_not_migrate_serves_hits_only",
        "test_full_cache_demotes_instead_of_promoting",
        "test_at_most_a_quarter_of_the_cache_is_on_its_way_out",
        "test_oblock_with_pending_work_is_not_promoted_twice",
    ),
    "4.3 queue a demotion": (
        "test_upper_half_of_the_levels_is_never_demoted",
        "test_without_a_clean_block_to_demote_an_old_dirty_one_is_written_back",
    ),
    "4.3 queue a writeback": ("test_idle_writes_everything_back_and_busy_nothing",),
    "4.3 background work": ("test_clean_idle_cache_wants_nothing",),
    "4.3 tick": ("test_promote_level_follows_each_tick_and_the_jump_each_period",),
    "4.3 worked example": ("test_worked_example_the_second_access_is_promoted",),
    "4.3 dirty change": (
        "test_block_that_became_dirty_during_its_writeback_is_dirty_after_it",
    ),
    "4.3 hints": (
        "test_hint_is_the_level_and_gives_it_back",
        "test_without_hints_levels_are_a_hash_of_the_cblock",
        "test_loaded_blocks_stand_ahead_of_the_sentinels",
    ),
    "4.3 invalidate": ("test_invalidate_forgets_the_block_and_frees_it",),
    "4.3 cleaner": (
        "test_cleaner_never_promotes_whoever_asks",
        "test_cleaner_writes_old_blocks_back_even_when_busy",
        "test_cleaner_gets_done_however_often_its_blocks_are_hit",
        "test_idle_cleaner_writes_everything_back",
    ),
}

LIFE: Final[dict[str, tuple[str, ...]]] = {
    "5.3 shared metadata": (
        "test_5_3_live_and_inactive_table_share_one_metadata",
        "test_5_3_second_opener_must_use_the_same_block_size",
        "test_5_3_reload_after_a_crash_knows_what_was_cleaned_since",
    ),
    "5.3 constructor": (
        "test_5_3_constructor_loads_no_mappings_and_starts_nothing",
        "test_5_3_loading_a_table_does_not_disturb_the_live_one",
        "test_statistics_are_those_of_the_last_table",
    ),
    "5.3 preresume 1": ("test_5_3_step_1_resume_that_failed_once_needs_another_table",),
    "5.3 preresume 2": (
        "test_5_3_step_2_passthrough_after_an_unclean_shutdown",
        "test_5_3_step_2_passthrough_after_a_crash_in_writethrough",
        "test_5_3_step_2_no_needs_check",
        "test_passthrough_is_refused_after_an_unclean_shutdown",
    ),
    "5.3 preresume 3": (
        "test_5_3_step_3_grown_cache_device_needs_a_reload",
        "test_5_3_step_3_shrunken_cache_device_keeps_the_prefix",
        "test_5_3_step_3_shrunken_cache_device_with_a_dirty_block_cut_off",
        "test_cache_grows_as_far_as_the_metadata_device_has_room",
    ),
    "5.3 preresume 4": (
        "test_5_3_step_4_dirty_block_beyond_the_new_origin",
        "test_passthrough_is_refused_while_a_block_is_dirty",
    ),
    "5.3 preresume 5": (
        "test_5_3_step_5_clean_blocks_beyond_the_new_origin_are_dropped",
    ),
    "5.3 preresume 6": ("test_5_3_step_6_discards_are_loaded_the_first_time_only",),
    "5.3 resume": ("test_5_3_resume_starts_the_timer_and_the_migrations",),
    "5.3 postsuspend": (
        "test_5_3_postsuspend_stops_the_timer",
        "test_4_2_suspend_waits_for_what_is_under_way",
        "test_5_3_bios_that_come_while_suspended_run_on_the_next_table",
        "test_5_3_bio_that_waits_for_a_lock_is_pushed_back_by_noflush",
    ),
    "5.3 origin resize": (
        "test_5_3_origin_grows_by_a_longer_table",
        "test_5_3_step_5_clean_blocks_beyond_the_new_origin_are_dropped",
    ),
    "5.3 passthrough": (
        "test_5_3_loading_a_passthrough_table_always_succeeds",
        "test_5_3_refused_passthrough_is_left_by_loading_another_table",
        "test_5_3_dirty_log_tells_what_is_dirty_after_a_crash",
    ),
    "5.3 CLEAN_SHUTDOWN": (
        "test_5_3_clean_shutdown_is_cleared_before_the_first_io",
        "test_5_3_refused_activation_leaves_the_flag",
        "test_5_3_refused_table_costs_nothing_that_is_flushed_afterwards",
    ),
    "5.4 dirty state": (
        "test_5_4_clean_start_has_the_stored_dirty_bits",
        "test_5_4_unclean_start_has_every_mapping_dirty",
    ),
    "5.4 hints": (
        "test_5_4_hints_are_used_after_a_clean_shutdown",
        "test_5_4_hints_are_dropped_by",
        "test_hints_are_believed_by_the_policy_that_gave_them",
    ),
    "5.4 discards": (
        "test_5_4_discards_are_loaded_after_a_clean_shutdown_only",
        "test_5_4_discards_are_clipped_to_a_shorter_origin",
        "test_conversion_rounds_inward_and_clips",
    ),
    "5.4 policy switch": ("test_5_4_hints_are_dropped_by",),
}

WORDS_OF_A_CACHE: Final[dict[str, tuple[str, ...]]] = {
    "6.3 RO, FAIL": ("test_3_2_ro_and_fail_take_no_messages",),
    "6.3 migration_threshold": ("test_6_3_migration_threshold", EINVAL, RECORDED),
    "6.3 mq's keys": ("test_6_3_mq_takes_its_old_keys_and_ignores_them", EINVAL),
    "6.3 invalidate_cblocks": (
        RECORDED,
        *RANGES,
        "test_6_3_invalidate_cblocks_needs_passthrough",
        "test_6_3_invalidate_cblocks_without_a_range_does_nothing",
        "test_6_3_first_bad_range_stops_and_earlier_ones_stay_applied",
        "test_6_3_unmapped_blocks_in_a_range_are_fine",
        "test_6_3_number_above_32_bits_is_refused",
        "test_6_3_invalidation_is_durable_and_counts_as_no_demotion",
        "test_6_3_invalidation_that_cannot_be_committed_is_an_error",
        "test_6_3_invalidation_that_failed_lets_nobody_write_past_the_block",
    ),
    "6.3 two words": (EINVAL,),
    "6.3 other word count": (EINVAL,),
    "6.3 not in the table line": ("test_6_3_value_of_a_message_ends_with_the_table",),
    "6.4 1": ("test_6_4_metadata_blocks_of_4_kib_are_used_and_total",),
    "6.4 2": ("test_6_4_metadata_blocks_of_4_kib_are_used_and_total",),
    "6.4 3": (LINE, FRESH),
    "6.4 4": (LINE, "test_6_4_used_blocks_have_those_that_are_on_the_way"),
    "6.4 5": (LINE, "test_workload"),
    "6.4 6": (LINE, "test_workload"),
    "6.4 7": (LINE, "test_workload"),
    "6.4 8": (
        LINE,
        "test_6_4_hits_and_misses_outlive_the_table_demotions_and_promotions_do_not",
    ),
    "6.4 9": (
        LINE,
        "test_6_4_hits_and_misses_outlive_the_table_demotions_and_promotions_do_not",
    ),
    "6.4 10": (LINE, "test_workload"),
    "6.4 11": (LINE, "test_6_4_dirty_blocks_are_field_14_of_the_whole_line"),
    "6.4 12": (
        FRESH,
        "test_6_4_features_are_counted_and_in_order",
        "test_passdown_that_the_origin_refuses_is_shown_as_off",
    ),
    "6.4 13": (FRESH, "test_values_that_messages_changed_are_shown"),
    "6.4 14": (FRESH, "test_mq_shows_its_old_keys_as_0"),
    "6.4 15": (FRESH, *FAILED),
    "6.4 16": (
        "test_6_4_line_ends_with_a_blank",
        "test_read_only_metadata_need_a_check_if_their_device_is_to_blame",
    ),
    "6.4 Fail, Error": (
        "test_6_4_fail_is_one_word_and_the_status_that_finds_out_says_error",
    ),
    "6.4 commits": ("test_3_2_status_commits", "test_3_2_status_does_not_commit_when"),
    "6.4 TABLE": ("test_6_4_table_is_the_devices_then_the_words_as_given", WORDS),
}

METADATA: Final[dict[str, tuple[str, ...]]] = {
    "7.3 dblock size": ("test_discard_blocks_are_as_large_as_the_kernels",),
    "7.3 when durable": (
        "test_7_3_mappings_are_durable_with_any_commit",
        "test_7_3_the_rest_is_durable_with_a_clean_sync_only",
    ),
    "7.3 crash recovery": (
        "test_5_4_unclean_start_has_every_mapping_dirty",
        "test_7_3_counters_after_a_crash_are_those_of_the_last_commit",
        "test_7_3_crash_in_writethrough_leaves_nothing_dirty_and_nothing_cached",
        "test_after_an_unclean_shutdown_all_is_dirty_and_nothing_else_believed",
    ),
    "7.3 needs_check": ("test_7_3_needs_check_refuses_the_constructor",),
    "7.3 growing, shrinking": ("test_7_3_growing_appends_and_shrinking_truncates",),
    "7.3 fail_io": ("test_failed_metadata_answers_nothing",),
    "7.3 unknown flags": ("test_unknown_incompatible_feature_is_refused",),
}

SUITES: Final[dict[str, tuple[str, ...]]] = {
    "11.2 1": ("test_11_2_1_clean_data_never_gets_written_back",),
    "11.2 2": ("test_11_2_2_dirty_data_always_gets_written_back",),
    "11.2 3": ("test_11_2_3_cache_remains_clean_through_reload",),
    "11.2 4": ("test_11_2_4_clean_a_cache_with_large_blocks",),
    "11.2 5": (
        "test_11_2_5_a_fresh_cache_is_trivial_to_clean",
        "test_11_2_5_a_dirtied_cache_can_be_cleaned",
    ),
    "11.2 6": ("test_11_2_6_uncache",),
    "11.2 7": ("test_11_2_7_decommission_with_checksums",),
    "11.2 8": (
        "test_11_2_8_discard_with_concurrent_io",
        "test_11_2_8_discard_out_of_bounds",
        "test_11_2_8_discard_passed_to_origin",
    ),
    "11.2 9": ("test_11_2_9_dt_cache",),
    "11.2 10": (
        "test_11_2_10_must_be_in_passthrough_mode",
        "test_11_2_10_invalidate_all_leaves_no_mappings",
        "test_11_2_10_invalidate_unmaps_exactly_what_is_named",
        "test_11_2_10_bad_ranges_fail",
    ),
    "11.2 11": ("test_11_2_11_no_io_when_idle",),
    "11.2 12": (
        "test_11_2_12_bad_metadata_is_detected",
        "test_11_2_12_can_reactivate_unused_cache",
    ),
    "11.2 13": (
        "test_11_2_13_commit_failure_shows_needs_check_until_it_is_loaded_again",
    ),
    "11.2 14": ("test_11_2_14_no_resize_retains_mappings",),
    "11.2 15": (
        "test_11_2_15_passthrough_never_promotes",
        "test_11_2_15_passthrough_demotes_writes",
        "test_11_2_15_passthrough_does_not_demote_reads",
        "test_11_2_15_passthrough_fails_with_dirty_blocks",
    ),
    "11.2 16": (
        "test_11_2_16_switch_through_the_policies",
        "test_11_2_16_reload_cleaner",
        "test_11_2_16_alternate_under_io",
    ),
    "11.2 17": (
        "test_11_2_17_resize_origin_with_discards",
        "test_11_2_17_metadata_can_grow",
        "test_11_2_17_metadata_can_shrink",
    ),
    "11.2 18": ("test_11_2_18_small_stack",),
    "11.2 19": (
        "test_11_2_19_writethrough_has_nothing_dirty",
        "test_11_2_19_clean_after_crash",
    ),
    "11.2 20": ("test_size_for_a_million_blocks_is_known",),
    "11.2 21": (
        "test_11_2_21_damaged_metadata_are_refused_and_left_alone",
        "test_metadata_in_use_is_refused",
        "test_repair_is_repeatable",
        "test_cache_that_was_written_back_goes_on",
    ),
    "11.2 22": (REFUSALS, *OPTIONS, WORDS, FRESH),
    "11.2 23": (
        "test_11_2_23_huge_error_devices_just_create",
        "test_many_cache_blocks_are_a_warning",
    ),
    "11.2 24": ("test_11_2_24_cache_in_a_stack",),
    "11.3 small_config": ("test_11_3_small_config",),
    "11.3 expand": ("test_11_3_expand_origin_with_reload",),
    "11.3 shrink": ("test_11_3_shrink_origin_drops_mappings",),
    "11.3 shrink, dirty": ("test_11_3_shrink_origin_should_fail_if_blocks_dirty",),
    "11.4 1": (UNCLEAN,),
    "11.4 2": (PRELOADED,),
}

WEAKNESSES: Final[dict[str, tuple[str, ...]]] = {
    "14 1": (
        "test_14_1_committed_mapping_never_points_at_lost_data",
        "test_14_1_committed_removal_never_leaves_an_old_origin",
        "test_14_1_block_that_is_recorded_clean_is_on_the_origin",
    ),
    "14 2": ("test_14_2_acknowledged_fua_survives_a_crash",),
    "14 3": ("test_14_3_crash_right_after_a_resume_has_no_stale_dirty_bits",),
    "14 4": ("test_14_4_table_after_a_clean_sync_is_a_clean_start",),
    "14 5": ("test_14_5_discarded_block_shows_nothing_of_the_cache_device",),
    "14 10": ("test_14_10_ro_takes_no_write_that_a_crash_would_undo",),
    "14 11": ("test_14_11_shrunken_cache_uses_no_block_that_is_gone",),
    "14 12": ("test_14_12_shrinking_after_a_crash_goes_by_what_is_dirty_now",),
    "14 13": ("test_14_13_idle_device_is_committed_by_time",),
    "14 14": ("test_14_14_mode_falls_and_a_restart_goes_on_from_the_last_commit",),
    "14 15": (
        "test_14_15_no_discarded_bit_over_fresh_data",
        "test_14_15_discard_waits_for_a_write_that_was_sent_while_it_waited",
    ),
}

ROWS: Final[dict[str, tuple[str, ...]]] = {
    **TABLE,
    **MAPPING,
    **COMMITS,
    **BACKGROUND,
    **LIFE,
    **WORDS_OF_A_CACHE,
    **METADATA,
    **SUITES,
    **WEAKNESSES,
}

WITHOUT_A_TEST: Final = {
    "1.2 10 the errno of a wrong block number or version": "another format: EILSEQ or EINVAL",
    "2.2.5 largest discard": "NBD has no word for it, and devices here take any length",
    "4.2 cache_copy_throttle": "a parameter of the kernel's module; see migration_rate",
    "6.4 IMA": "the kernel's measurements of itself",
    "7.3 the bytes": "a format of our own: metadata/FORMAT.md and its tests",
    "11.2 9 dt_thin_snap": "there is no thin pool here",
    "11.2 20 metadata_use": "the numbers of another format",
    "11.2 24 git, bonnie, sqlite": "file systems on caches: by hand, in a virtual machine",
}

# How far each section counts.
NUMBERED: Final = {
    "1.2": range(1, 13),
    "2.2.2": range(1, 4),
    "2.2.4": range(1, 5),
    "4.2 step": range(1, 8),
    "5.3 preresume": range(1, 7),
    "6.4": range(1, 17),
    "11.2": range(1, 25),
    "11.4": (1, 2),
    "14": (1, 2, 3, 4, 5, *range(10, 16)),
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
    assert named - written == set()


@pytest.mark.parametrize("section", NUMBERED)
def test_no_number_is_left_out(section: str) -> None:
    missing = [nr for nr in NUMBERED[section] if f"{section} {nr}" not in ROWS]
    assert missing == []


def test_every_test_of_the_checklist_stands_in_a_row() -> None:
    ours = [*Path(__file__).parent.glob("test_spec_*.py"), *BATTERY.glob("test_*.py")]
    ours.remove(Path(__file__))
    written = {name for path in ours for name in functions(path)}
    named = {name for tests in ROWS.values() for name in tests}
    assert written - named == set()
