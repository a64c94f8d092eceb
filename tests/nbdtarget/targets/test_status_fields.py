# SPDX-License-Identifier: Apache-2.0
"""The status of the small targets as named fields."""

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE
from nbdtarget.targets.base import StatusFields
from tests.support.tables import Disks, submit


@pytest.mark.parametrize(
    ("table", "fields"),
    [
        (
            "striped 2 8 /a 0 /b 0",
            {"nr_stripes": 2, "nr_failed_stripes": 1, "nr_errors": 1},
        ),
        (
            "delay /b 0 1",
            {"nr_reads_waiting": 1, "nr_writes_waiting": 1, "nr_flushes_waiting": 0},
        ),
        (
            "dust /b 0 512",
            {"fails_reads_of_bad_blocks": False, "nr_bad_blocks": 0, "quiet": False},
        ),
        (
            "log-writes /b /log",
            {"nr_logged_entries": 0, "highest_sector": 0, "logging": True},
        ),
        (
            "powercut /b 0",
            {
                "power_is_on": True,
                "nr_writes_at_risk": 1,
                "at_risk_bytes": 512,
                "nr_cuts": 0,
            },
        ),
        (
            "scratch /b 0 /log",
            {"written_bytes": 512, "max_bytes": 8192, "nr_resets": 0},
        ),
    ],
)
async def test_status_fields(table: str, fields: StatusFields) -> None:
    disks = Disks(a=8192, b=8192, log=8192)
    disks["/a"].fails = lambda bio: 5 if bio.op == OP_READ else 0
    device = await disks.create(f"0 16 {table}")
    submit(device, OP_WRITE, 0, b"x" * 512)
    submit(device, OP_READ, 0, 512)
    assert device.active is not None
    assert device.active.targets[0].status_fields() == fields
