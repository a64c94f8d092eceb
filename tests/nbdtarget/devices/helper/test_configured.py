# SPDX-License-Identifier: Apache-2.0
"""The commands of helpers: those of the last configuration file that was read, and no others."""

from collections.abc import Iterator

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices import resolve
from nbdtarget.devices.helper.configured import helper_commands, set_helper_commands


@pytest.fixture(autouse=True)
def _no_commands() -> Iterator[None]:
    yield
    set_helper_commands({})


async def test_file_that_is_read_again_replaces_all() -> None:
    set_helper_commands({"a": ["x", "y"], "b": ["z"]})
    assert helper_commands() == {"a": ("x", "y"), "b": ("z",)}
    set_helper_commands({"c": ["z"]})
    assert helper_commands() == {"c": ("z",)}
    with pytest.raises(ResolveError, match=r"no \[helper.a\]: there are c"):
        await resolve.open_device("helper:a", read_only=True)
