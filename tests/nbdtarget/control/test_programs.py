# SPDX-License-Identifier: Apache-2.0
"""Tables that come over TCP: those that would start a program are refused."""

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.control import messages as m
from nbdtarget.control.programs import refuse_programs

REFUSED = [
    "0 8 linear qemu:qcow2:/x 0",
    "0 8 zero\n8 8 clone m d raw:nbdkit:memory?size=1M 8",
    "0 8 linear QEMU:raw:/x 0",
    "0 8 linear helper:vault 0",
    r"0 8 linear qemu:raw:/a\ b 0",
    "0 8 clone m d gzip:nbdkit:curl?url=https://h/a.gz#size=1M 8",
    "0 8 clone m d xz:qemu:raw:https://h/a.xz 8",
    "0 8 clone m d zstd:helper:vault 8",
]


@pytest.mark.parametrize("table", REFUSED)
def test_disk_that_a_program_opens_is_refused(table: str) -> None:
    for request in (m.Create("d", table), m.Load("d", table)):
        with pytest.raises(TableError, match="control_starts_programs"):
            refuse_programs(request)


@pytest.mark.parametrize(
    "table",
    ["0 8 linear /srv/x 0", "0 8 linear ./qemu:raw:/x 0", "0 8 clone m d nbd://h/x 8"],
)
def test_other_disks_are_not(table: str) -> None:
    refuse_programs(m.Create("d", table))
    refuse_programs(m.Load("d", table))


def test_requests_without_a_table_are_not() -> None:
    refuse_programs(m.Create("d", None))
    refuse_programs(m.Status())
