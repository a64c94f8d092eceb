# SPDX-License-Identifier: Apache-2.0
"""Extended headers with clients and a server that speak them: libnbd 1.22 and QEMU 10, which `scripts/newer-clients` unpacks."""

import asyncio
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.devices.nbd.device import NbdDevice, open_nbd
from tests.support.clients import NEWER, client, needs_newer, report
from tests.support.processes import NBDTARGET, ServerProcess

pytestmark = [pytest.mark.interop, needs_newer]

TIB = 1 << 40
MIB = 1 << 20

# A client with extended headers uses a whole disk. libnbd's own Python runs this program, which prints its results.
WHOLE_DISK = """
    import json, nbd, sys
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.add_meta_context("x-nbdtarget:hydration")
    h.connect_uri(sys.argv[1])
    size, seen = h.get_size(), {}
    def status(ask):
        told = {}
        ask(lambda name, offset, extents, error: told.update({name: extents}))
        return told
    seen["is_extended"] = h.get_extended_headers_negotiated()
    h.pwrite(b"x" * 65536, 5 << 40)
    seen["written"] = status(lambda told: h.block_status_64(size, 0, told))
    if h.can_block_status_payload():
        only = [sys.argv[2]]
        seen["selected"] = status(lambda told: h.block_status_filter(size, 0, only, told))
    h.zero(size, 0, nbd.CMD_FLAG_FUA)
    seen["data"] = h.pread(4, 5 << 40).decode()
    seen["zeroed"] = status(lambda told: h.block_status_64(size, 0, told))
    h.trim(size, 0)
    h.cache(size, 0)
    h.shutdown()
    print(json.dumps(seen))
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[str]:
    """The URI of an empty clone of 16 TiB, in memory."""
    sock, log = tmp_path / "nbd.sock", tmp_path / "log"
    argv = [NBDTARGET, "clone", "memory:16T", "memory:16T", "--no-hydration"]
    argv += ["--metadata", str(tmp_path / "metadata"), "--name", "disk"]
    argv += ["--listen", f"unix:{sock}"]
    with ServerProcess(argv, sockets=[sock], log=log) as process:
        yield f"nbd+unix:///disk?socket={sock}"
        assert process.terminate() == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


def test_whole_disk_of_a_clone(run: str) -> None:
    hydration = "x-nbdtarget:hydration"
    script = textwrap.dedent(WHOLE_DISK)
    seen = json.loads(client(f"{NEWER}/python3", "-c", script, run, hydration))
    holes = [[5 * TIB, 3], [65536, 0], [11 * TIB - 65536, 3]]
    copied = [[5 * TIB, 1], [65536, 0], [11 * TIB - 65536, 1]]
    assert seen == {
        "is_extended": True,
        "written": {"base:allocation": holes, hydration: copied},
        "selected": {hydration: copied},
        "data": "\0" * 4,
        "zeroed": {"base:allocation": [[16 * TIB, 3]], hydration: [[16 * TIB, 0]]},
    }


def test_nbdinfo_and_qemu_img(run: str) -> None:
    seen = report(f"{NEWER}/nbdinfo", "--json", run)
    assert seen["extended"]
    [export] = seen["exports"]
    assert export["can_block_status_payload"]
    [extent] = report(f"{NEWER}/nbdinfo", "--map", "--json", run)
    assert (extent["length"], extent["type"]) == (16 * TIB, 3)
    client(f"{NEWER}/qemu-io", "-f", "raw", "-c", "write -P 7 3T 1M", run)
    client(f"{NEWER}/qemu-io", "-f", "raw", "-c", "read -P 7 3T 1M", run)
    mapped = report(f"{NEWER}/qemu-img", "map", "--output=json", "-f", "raw", run)
    assert [(part["start"], part["length"]) for part in mapped if part["data"]] == [
        (3 * TIB, MIB)
    ]


def test_nbdcopy(tmp_path: Path) -> None:
    source, copy = tmp_path / "source.img", tmp_path / "copy.img"
    sock, log = tmp_path / "nbd.sock", tmp_path / "log"
    data = bytes(MIB) + bytes(range(256)) * 4096 + bytes(6 * MIB)
    source.write_bytes(data)
    argv = [NBDTARGET, "export", str(source), "--name", "disk"]
    argv += ["--listen", f"unix:{sock}"]
    with ServerProcess(argv, sockets=[sock], log=log):
        client(f"{NEWER}/nbdcopy", f"nbd+unix:///disk?socket={sock}", str(copy))
    assert copy.read_bytes() == data


def test_our_client_and_a_server_that_has_them(tmp_path: Path) -> None:
    sock, log = tmp_path / "qemu.sock", tmp_path / "log"
    argv = [f"{NEWER}/qemu-nbd", "--persistent", "--discard=unmap", f"--socket={sock}"]
    argv += ["--image-opts", "driver=null-co,size=16T,read-zeroes=on"]

    async def talk() -> None:
        device = await open_nbd(f"nbd+unix:///?socket={sock}", read_only=False)
        assert isinstance(device, NbdDevice)
        assert device.is_extended
        try:
            await device.write(3 * TIB, bytes(512))
            assert sum(each.length for each in await device.extents(0, 16 * TIB))
            await device.write_zeroes(0, 16 * TIB)
            await device.discard(512, 16 * TIB - 512)
            await device.flush()
            assert await device.read(3 * TIB, 512) == bytes(512)
        finally:
            await device.close()

    with ServerProcess(argv, sockets=[sock], log=log):
        asyncio.run(talk())
