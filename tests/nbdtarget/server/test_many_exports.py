# SPDX-License-Identifier: Apache-2.0
"""A server with many exports: a list of all of them takes longer than one step of the handshake may take."""

import asyncio
import json
import shutil
from collections.abc import Iterable

import pytest

from nbdtarget.devices.base import Device
from nbdtarget.server.export import DirectoryExports
from tests.support.patience import PATIENCE_S
from tests.support.peer import Directory, Disk, Served

NR = 2000


class Many(Directory):
    """`NR` exports; counts how often all of them are walked through."""

    def __init__(self) -> None:
        super().__init__({f"export-{nr:04}": Disk(4096) for nr in range(NR)})
        self._names = {device: name for name, device in self.devices.items()}
        self.nr_walks = 0

    def names(self) -> Iterable[tuple[str, str]]:
        self.nr_walks += 1
        return super().names()

    def _name(self, device: Device) -> str:
        return self._names[device]


def test_what_one_export_is_does_not_take_a_walk_through_all() -> None:
    directory = Many()
    exports = DirectoryExports(directory)
    info = exports.lookup("export-1999")
    assert info is not None
    assert (info.name, info.description) == ("export-1999", "about export-1999")
    assert directory.nr_walks == 0


@pytest.mark.interop
@pytest.mark.skipif(not shutil.which("nbdinfo"), reason="nbdinfo is not installed")
async def test_nbdinfo_lists_all(served: Served) -> None:
    served.directory = Many()
    await served.start()
    nbdinfo = await asyncio.create_subprocess_exec(
        *["nbdinfo", "--list", "--json", f"nbd+unix:///?socket={served.path}"],
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(nbdinfo.communicate(), PATIENCE_S)
    assert nbdinfo.returncode == 0
    exports = json.loads(out)["exports"]
    assert {each["export-name"] for each in exports} == set(served.directory.devices)
