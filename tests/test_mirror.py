# SPDX-License-Identifier: Apache-2.0
"""The tests of a module are where its name says; the table names those that are elsewhere.

`nbdtarget/dm/table.py` is tested by `tests/nbdtarget/dm/test_table.py`. A module that has no test
module of its own name stands in `ELSEWHERE`, with the one that says most of it. The table may
only shrink: a new module gets a test module of its own name.
"""

import re
from pathlib import Path

from tests.support.places import ROOT

NR_ELSEWHERE_MAX = 105

ELSEWHERE = {
    "metadata/nbdtarget_metadata/cache/blocks.py": "tests/metadata/cache/test_metadata.py",
    "metadata/nbdtarget_metadata/cache/content.py": "tests/metadata/tools/test_cache_dump.py",
    "metadata/nbdtarget_metadata/cache/records.py": "tests/metadata/cache/test_load.py",
    "metadata/nbdtarget_metadata/cache/shutdown.py": "tests/metadata/cache/test_metadata.py",
    "metadata/nbdtarget_metadata/cache/superblock.py": "tests/metadata/cache/test_load.py",
    "metadata/nbdtarget_metadata/clone/content.py": "tests/metadata/tools/test_clone_dump.py",
    "metadata/nbdtarget_metadata/clone/load.py": "tests/metadata/clone/test_metadata.py",
    "metadata/nbdtarget_metadata/clone/superblock.py": "tests/metadata/log/test_superblock.py",
    "metadata/nbdtarget_metadata/log/chain.py": "tests/metadata/clone/test_records.py",
    "metadata/nbdtarget_metadata/log/foreign.py": "tests/metadata/log/test_layout.py",
    "metadata/nbdtarget_metadata/tools/cache_check.py": "tests/metadata/tools/test_cache_salvage.py",
    "metadata/nbdtarget_metadata/tools/cache_dump_parser.py": "tests/metadata/tools/test_cache_dump.py",
    "metadata/nbdtarget_metadata/tools/clone_check.py": "tests/metadata/tools/test_examine.py",
    "metadata/nbdtarget_metadata/tools/clone_dump_parser.py": "tests/metadata/tools/test_clone_dump.py",
    "metadata/nbdtarget_metadata/tools/dump.py": "tests/metadata/tools/test_clone_dump.py",
    "metadata/nbdtarget_metadata/tools/dump_fields.py": "tests/metadata/tools/test_clone_dump.py",
    "metadata/nbdtarget_metadata/tools/kernel_blocks.py": "tests/metadata/tools/test_kernel_import.py",
    "metadata/nbdtarget_metadata/tools/kinds.py": "tests/metadata/tools/test_examine.py",
    "metadata/nbdtarget_metadata/tools/restore.py": "tests/metadata/tools/test_clone_restore.py",
    "metadata/nbdtarget_metadata/tools/salvage.py": "tests/metadata/tools/test_clone_salvage.py",
    "nbdtarget/cli/clone.py": "tests/interop/test_command_line.py",
    "nbdtarget/cli/common.py": "tests/nbdtarget/cli/test_commands.py",
    "nbdtarget/cli/devices.py": "tests/nbdtarget/cli/test_commands.py",
    "nbdtarget/cli/dmsetup.py": "tests/nbdtarget/cli/test_dmsetup_verbs.py",
    "nbdtarget/cli/export.py": "tests/nbdtarget/porcelain/test_export.py",
    "nbdtarget/cli/health.py": "tests/nbdtarget/cli/test_commands.py",
    "nbdtarget/cli/listing.py": "tests/nbdtarget/cli/test_commands.py",
    "nbdtarget/cli/log_writes.py": "tests/nbdtarget/tools/test_replay_log.py",
    "nbdtarget/cli/names.py": "tests/nbdtarget/cli/test_commands.py",
    "nbdtarget/cli/outlet.py": "tests/nbdtarget/cli/test_logs.py",
    "nbdtarget/cli/progress/cache.py": "tests/nbdtarget/cli/test_cache.py",
    "nbdtarget/cli/progress/uncache.py": "tests/nbdtarget/cli/test_cache.py",
    "nbdtarget/cli/progress/writeback.py": "tests/nbdtarget/cli/test_cache_writeback.py",
    "nbdtarget/cli/serve.py": "tests/nbdtarget/daemon/test_serve.py",
    "nbdtarget/cli/sizes.py": "tests/nbdtarget/cli/test_commands.py",
    "nbdtarget/cli/stats_report.py": "tests/nbdtarget/cli/test_stats.py",
    "nbdtarget/cli/tables.py": "tests/nbdtarget/cli/test_commands.py",
    "nbdtarget/cli/uncache.py": "tests/nbdtarget/cli/test_cache.py",
    "nbdtarget/common/clock.py": "tests/nbdtarget/dm/test_hanging.py",
    "nbdtarget/common/errors.py": "tests/nbdtarget/cli/test_commands.py",
    "nbdtarget/config/openings.py": "tests/nbdtarget/config/test_devices.py",
    "nbdtarget/config/render.py": "tests/nbdtarget/config/test_file.py",
    "nbdtarget/control/api.py": "tests/nbdtarget/control/test_control.py",
    "nbdtarget/control/client.py": "tests/nbdtarget/control/test_control.py",
    "nbdtarget/control/doorkeeper.py": "tests/nbdtarget/control/test_strangers.py",
    "nbdtarget/control/messages.py": "tests/nbdtarget/control/test_http.py",
    "nbdtarget/control/openapi.py": "tests/nbdtarget/control/test_http.py",
    "nbdtarget/control/paths.py": "tests/nbdtarget/control/test_control.py",
    "nbdtarget/control/servers.py": "tests/nbdtarget/cli/test_servers.py",
    "nbdtarget/control/sockets.py": "tests/nbdtarget/control/test_control.py",
    "nbdtarget/control/verbs.py": "tests/nbdtarget/control/test_control.py",
    "nbdtarget/devices/absent.py": "tests/nbdtarget/dm/test_reopening.py",
    "nbdtarget/devices/file/extents.py": "tests/nbdtarget/devices/file/test_device.py",
    "nbdtarget/devices/file/open.py": "tests/nbdtarget/devices/test_resolve.py",
    "nbdtarget/devices/file/scheme.py": "tests/nbdtarget/devices/test_resolve.py",
    "nbdtarget/devices/file/space.py": "tests/nbdtarget/devices/file/test_device.py",
    "nbdtarget/devices/file/syscalls.py": "tests/nbdtarget/devices/file/test_device.py",
    "nbdtarget/devices/health.py": "tests/nbdtarget/devices/nbd/test_loss.py",
    "nbdtarget/devices/memory_scheme.py": "tests/nbdtarget/devices/test_memory.py",
    "nbdtarget/devices/nbd/connect.py": "tests/nbdtarget/devices/nbd/test_device.py",
    "nbdtarget/devices/nbd/connection.py": "tests/nbdtarget/devices/nbd/test_loss.py",
    "nbdtarget/devices/nbd/scheme.py": "tests/nbdtarget/devices/nbd/test_uri.py",
    "nbdtarget/devices/scheme.py": "tests/nbdtarget/devices/test_registry.py",
    "nbdtarget/dm/below.py": "tests/nbdtarget/dm/test_mapped_device.py",
    "nbdtarget/dm/bio_path.py": "tests/nbdtarget/dm/test_mapped_device.py",
    "nbdtarget/dm/events.py": "tests/nbdtarget/dm/test_mapped_device.py",
    "nbdtarget/dm/fast_path.py": "tests/nbdtarget/dm/test_mapped_device.py",
    "nbdtarget/dm/geometry.py": "tests/nbdtarget/dm/test_spec_9.py",
    "nbdtarget/dm/open_devices.py": "tests/nbdtarget/dm/test_registry.py",
    "nbdtarget/dm/replacements.py": "tests/nbdtarget/dm/test_replacement.py",
    "nbdtarget/policies/base.py": "tests/nbdtarget/policies/test_registry.py",
    "nbdtarget/policies/mq.py": "tests/nbdtarget/policies/test_registry.py",
    "nbdtarget/policies/simple.py": "tests/nbdtarget/policies/test_registry.py",
    "nbdtarget/policies/smq/allocator.py": "tests/nbdtarget/policies/smq/test_block_table.py",
    "nbdtarget/server/buffers.py": "tests/nbdtarget/server/test_half_sent_writes.py",
    "nbdtarget/server/commands.py": "tests/nbdtarget/server/test_requests.py",
    "nbdtarget/server/large_write.py": "tests/nbdtarget/server/test_half_sent_writes.py",
    "nbdtarget/server/peer.py": "tests/nbdtarget/server/test_connection.py",
    "nbdtarget/server/replies.py": "tests/nbdtarget/server/test_requests.py",
    "nbdtarget/server/shared.py": "tests/nbdtarget/server/test_listener.py",
    "nbdtarget/targets/base.py": "tests/nbdtarget/dm/test_mapped_device.py",
    "nbdtarget/targets/cache/blocks.py": "tests/nbdtarget/targets/cache/test_spec_2_2.py",
    "nbdtarget/targets/cache/failures.py": "tests/nbdtarget/targets/cache/test_target_faults.py",
    "nbdtarget/targets/cache/messages.py": "tests/nbdtarget/targets/cache/test_spec_6_3.py",
    "nbdtarget/targets/cache/target.py": "tests/nbdtarget/targets/cache/test_spec_2_2.py",
    "nbdtarget/targets/cache/unflushed.py": "tests/nbdtarget/targets/cache/test_foreground.py",
    "nbdtarget/targets/clone/foreground.py": "tests/nbdtarget/targets/clone/test_target.py",
    "nbdtarget/targets/clone/hydrator.py": "tests/nbdtarget/targets/clone/test_hydration.py",
    "nbdtarget/targets/clone/regions.py": "tests/nbdtarget/targets/clone/test_target.py",
    "nbdtarget/targets/disks.py": "tests/nbdtarget/dm/test_disks.py",
    "nbdtarget/targets/error.py": "tests/nbdtarget/targets/test_linear_zero_error.py",
    "nbdtarget/targets/linear.py": "tests/nbdtarget/targets/test_linear_zero_error.py",
    "nbdtarget/targets/log_writes/log.py": "tests/nbdtarget/targets/log_writes/test_target.py",
    "nbdtarget/targets/log_writes/replay.py": "tests/nbdtarget/tools/test_replay_log.py",
    "nbdtarget/targets/metadata_faults.py": "tests/nbdtarget/targets/clone/test_constructor.py",
    "nbdtarget/targets/run.py": "tests/nbdtarget/dm/test_mapped_device.py",
    "nbdtarget/targets/zero.py": "tests/nbdtarget/targets/test_linear_zero_error.py",
    "nbdtarget/tools/answers.py": "tests/nbdtarget/cli/test_metadata.py",
    "nbdtarget/tools/files.py": "tests/nbdtarget/cli/test_metadata.py",
    "nbdtarget/tools/metadata.py": "tests/nbdtarget/cli/test_metadata.py",
    "nbdtarget/tools/sizes.py": "tests/nbdtarget/cli/test_metadata_size.py",
}


FUNCTION = re.compile(r"^ *(async )?def \w+\(", re.MULTILINE)


def modules() -> list[str]:
    """Modules of the product that have at least one function, as paths in the repository."""
    found = [
        str(path.relative_to(ROOT))
        for top in ("protocol", "metadata", "nbdtarget")
        for path in sorted((ROOT / top).rglob("*.py"))
        if path.name != "__init__.py" and FUNCTION.search(path.read_text())
    ]
    assert found
    return found


def home_of(module: str) -> Path:
    """Where the tests of a module are, going by its name."""
    folder, _, name = module.rpartition("/")
    for top in ("protocol", "metadata"):
        folder = folder.replace(f"{top}/nbdtarget_{top}", top, 1)
    return ROOT / "tests" / folder / f"test_{name}"


def test_each_module_has_a_test_module_of_its_name_or_stands_in_the_table() -> None:
    untested = {module for module in modules() if not home_of(module).is_file()}
    assert untested - set(ELSEWHERE) == set(), "add a test module of this name"


def test_table_names_only_modules_without_a_test_module_of_their_name() -> None:
    gone = [module for module in ELSEWHERE if not (ROOT / module).is_file()]
    tested = [module for module in ELSEWHERE if home_of(module).is_file()]
    assert (gone, tested) == ([], []), "take these out of the table"


def test_table_names_test_modules_that_exist() -> None:
    missing = {name for name in ELSEWHERE.values() if not (ROOT / name).is_file()}
    assert missing == set()


def test_table_does_not_grow() -> None:
    assert len(ELSEWHERE) <= NR_ELSEWHERE_MAX
