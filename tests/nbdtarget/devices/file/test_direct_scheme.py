# SPDX-License-Identifier: Apache-2.0
"""Names of the form direct:PATH."""

from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices import resolve


async def test_it_is_the_same_disk_as_the_path_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    assert resolve.identity(f"direct:{path}") == resolve.identity(str(path))
    assert resolve.absolute_name("direct:disk", "/a/b") == "direct:/a/b/disk"
    assert resolve.may_create(f"direct:{tmp_path}/new")
    assert not resolve.may_create(f"direct:{path}")


async def test_path_without_a_file_is_refused(tmp_path: Path) -> None:
    for name in (f"direct:{tmp_path}/none", "direct:", f"direct:{tmp_path}"):
        with pytest.raises(ResolveError):
            await resolve.open_device(name)
