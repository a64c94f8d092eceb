# SPDX-License-Identifier: Apache-2.0
"""URLs as names of devices."""

import errno

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.resolve import absolute_name, identity, may_create, open_device


async def test_images_are_not_written_to() -> None:
    with pytest.raises(ResolveError, match="can only be read") as caught:
        await open_device("https://h/a?secret")
    assert caught.value.errno == errno.EROFS
    assert "secret" not in str(caught.value)
    assert not may_create("https://h/a")


def test_identity_and_absolute_name() -> None:
    assert identity("http://H/a") == identity("http://h:80/a#connections=3")
    assert identity("http://h/a#nonsense=1") == "http://h/a#nonsense=1"
    assert (
        absolute_name("https://h/a?x#ca=c.pem", "/srv") == "https://h/a?x#ca=/srv/c.pem"
    )
