# SPDX-License-Identifier: Apache-2.0
"""The fields that the OpenAPI document promises are those that the targets give."""

import msgspec
import pytest

from nbdtarget.control.status_fields import STATUS_FIELDS
from nbdtarget.targets.registry import TARGET_TYPES
from tests.support.tables import Disks

MIB = 1 << 20
TABLES = {
    "cache": "cache /m /a /b 64 1 writeback default 0",
    "clone": "clone /m /a /b 8 1 no_hydration",
    "delay": "delay /a 0 1",
    "dust": "dust /a 0 512",
    "error": "error",
    "flakey": "flakey /a 0 1 1",
    "linear": "linear /a 0",
    "log-writes": "log-writes /a /b",
    "powercut": "powercut /a 0",
    "scratch": "scratch /a 0 /b",
    "striped": "striped 2 8 /a 0 /b 0",
    "zero": "zero",
}


@pytest.mark.parametrize("type_name", TARGET_TYPES)
async def test_fields_are_those_of_the_type(type_name: str) -> None:
    disks = Disks(a=4 * MIB, b=4 * MIB, m=4 * MIB)
    device = await disks.create(f"0 2048 {TABLES[type_name]}")
    ((_, fields),) = await device.status_by_name(noflush=True)
    if type_name in STATUS_FIELDS:
        given = msgspec.convert(fields, STATUS_FIELDS[type_name], strict=True)
        assert msgspec.structs.asdict(given) == fields
    else:
        assert fields == {}
    await device.close()
