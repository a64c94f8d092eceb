# SPDX-License-Identifier: Apache-2.0
"""Rules that the schemes of all remote images have in common."""

import errno

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.resolve import (
    absolute_name,
    copy_sizes,
    identity,
    is_read_only,
    may_create,
    open_device,
)

NAMES = ("http://h/k", "https://h/k", "s3://h/k", "gs://h/k", "az://h/k")


@pytest.mark.parametrize("name", NAMES)
async def test_remote_images_are_only_read(name: str) -> None:
    assert is_read_only(name)
    assert not may_create(name)
    assert copy_sizes(name)[0] > copy_sizes("nbd://h/x")[0]
    with pytest.raises(ResolveError, match="can only be read") as caught:
        await open_device(name)
    assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("name", NAMES)
def test_options_are_no_part_of_the_identity(name: str) -> None:
    assert identity(name) == identity(f"{name}#pin=size&connections=3")
    assert identity(name) != identity(f"{name}2")
    assert len({identity(each) for each in NAMES}) == len(NAMES)
    # The identity of a name that cannot be parsed is the name itself.
    assert identity(f"{name}#nonsense=1") == f"{name}#nonsense=1"


@pytest.mark.parametrize("name", NAMES)
def test_authorities_have_an_absolute_path(name: str) -> None:
    assert absolute_name(f"{name}#ca=c.pem", "/srv") == f"{name}#ca=/srv/c.pem"
    assert absolute_name(f"{name}#ca=/c.pem", "/srv") == f"{name}#ca=/c.pem"
