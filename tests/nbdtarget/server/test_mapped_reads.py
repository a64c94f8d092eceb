# SPDX-License-Identifier: Apache-2.0
"""Long READs of whole servers, which the compiled path sends from mappings of the files."""

import errno as errnos
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.file.windows import windows_of_loop
from nbdtarget.fast import compiled
from nbdtarget_protocol import consts as c
from tests.support.certificates import needs_openssl
from tests.support.patience import until
from tests.support.site import SECTORS, SIZE, TABLES, Site, linear

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)

LENGTH = 256 << 10


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    yield made
    await made.close()


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("name", ["linear", "clone", "cache"])
async def test_long_reads_are_sent_from_windows(
    site: Site, name: str, extended: bool
) -> None:
    content = os.urandom(SIZE)
    device = await site.registry.create("d", TABLES[name](site, content))
    if name == "cache":
        await device.message(0, ["pin", "0-4"])
        await until(lambda: _nr_pinned(device) >= 4)
    peer = await site.attach(extended=extended)
    windows = windows_of_loop()
    before = windows.nr_sent
    # Again, until it is in the page cache, and the blocks of a cache are hits.
    while windows.nr_sent == before:
        assert (await peer.ask(c.CMD_READ, 0, LENGTH)).data == content[:LENGTH]
    data = os.urandom(LENGTH)
    await peer.ask(c.CMD_WRITE, 4096, payload=data[:8192])
    expected = content[:4096] + data[:8192] + content[12288:LENGTH]
    assert (await peer.ask(c.CMD_READ, 0, LENGTH)).data == expected


def _nr_pinned(device: object) -> int:
    target = device.active.targets[0]  # type: ignore[attr-defined]
    return int(target.status_fields()["pinned_blocks"])


@needs_openssl
async def test_reads_of_a_client_in_tls_are_copied(tmp_path: Path) -> None:
    site = Site(tmp_path, tls=True)
    content = os.urandom(SIZE)
    await site.registry.create("d", linear(site, content))
    peer = await site.attach()
    before = windows_of_loop().nr_sent
    for _ in range(4):
        assert (await peer.ask(c.CMD_READ, 0, LENGTH)).data == content[:LENGTH]
    assert windows_of_loop().nr_sent == before
    await site.close()


async def test_reads_of_a_disk_with_direct_io_are_copied(site: Site) -> None:
    content = os.urandom(SIZE)
    table = f"0 {SECTORS} linear direct:{site.file('disk', content)} 0"
    await site.registry.create("d", table)
    peer = await site.attach()
    before = windows_of_loop().nr_sent
    for _ in range(4):
        assert (await peer.ask(c.CMD_READ, 0, LENGTH)).data == content[:LENGTH]
    assert windows_of_loop().nr_sent == before


async def test_reply_whose_rest_cannot_be_read_ends_the_connection(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    content = os.urandom(SIZE)
    device = await site.registry.create("d", linear(site, content))
    (below,) = device.devices_below()
    assert isinstance(below, FileDevice)
    file = below.maybe_fast_file()
    assert file is not None
    peer, other = await site.attach(), await site.attach()
    for at in range(0, SIZE, LENGTH):
        await other.ask(c.CMD_READ, at, LENGTH)
    file.fake_error = errnos.EIO
    # More than the socket takes: the client does not read.
    wire = b"".join(peer.request(c.CMD_READ, 0, LENGTH) for _ in range(100))
    peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
    peer.writer.write(wire)
    await until(lambda: "the rest of its data cannot be read" in caplog.text)
    assert below.health.errors["read"] == 1
    file.fake_error = 0
    assert (await other.ask(c.CMD_READ, 0, LENGTH)).data == content[:LENGTH]


async def test_file_that_shrinks_is_an_error_and_no_zeroes(site: Site) -> None:
    content = os.urandom(SIZE)
    await site.registry.create("d", linear(site, content))
    peer = await site.attach()
    for _ in range(3):
        assert (await peer.ask(c.CMD_READ, 0, LENGTH)).data == content[:LENGTH]
    os.truncate(f"{site.folder}/disk", 4096 + LENGTH - 1000)
    assert (await peer.ask(c.CMD_READ, 0, LENGTH)).error == errnos.EIO
    data = (await peer.ask(c.CMD_READ, 0, LENGTH - 1000)).data
    assert data == content[: LENGTH - 1000]
