# SPDX-License-Identifier: Apache-2.0
"""URLs of objects as names of devices."""

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.resolve import (
    absolute_name,
    copy_sizes,
    identity,
    is_read_only,
    open_device,
)


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
async def test_objects_are_only_read(scheme: str) -> None:
    name = f"{scheme}://b/k"
    assert is_read_only(name)
    assert copy_sizes(name)[0] > copy_sizes("nbd://h/x")[0]
    with pytest.raises(ResolveError, match="can only be read"):
        await open_device(name)


def test_identity_and_absolute_name() -> None:
    assert identity("s3://b/k") == identity("s3://b/k#pin=size")
    assert identity("s3://b") == "s3://b"
    assert absolute_name("s3://b/k#ca=c.pem", "/srv") == "s3://b/k#ca=/srv/c.pem"
