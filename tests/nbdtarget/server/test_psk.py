# SPDX-License-Identifier: Apache-2.0
"""Pre-shared keys: a client without a key gets no byte of a disk. Python has them from 3.13 on."""

import asyncio
import ssl
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.tls_context import client_context, has_psk
from nbdtarget.devices.base import Device
from nbdtarget.devices.nbd.device import open_nbd
from nbdtarget.server.listener import Listener
from nbdtarget.server.tls import ListenerTls, TlsOptions
from nbdtarget_protocol import consts as c
from tests.support.clients import client, needs, report
from tests.support.peer import Directory, Served

pytestmark = pytest.mark.skipif(not has_psk(), reason="this Python has no PSK")

KEYS = {"alice": "0f" * 32, "carol": "a5" * 32}


def keys_file(directory: Path, keys: dict[str, str]) -> Path:
    path = directory / "keys.psk"
    path.write_text("".join(f"{name}:{key}\n" for name, key in keys.items()))
    path.chmod(0o600)
    return path


class Counting(Directory):
    """Counts how often a disk was attached."""

    nr_attached = 0

    def acquire(self, name: str) -> Device:
        self.nr_attached += 1
        return super().acquire(name)


@pytest.fixture
async def protected(served: Served, tmp_path: Path) -> Served:
    """A listener with the keys of `KEYS`, which requires TLS."""
    keys = keys_file(tmp_path, KEYS)
    served.directory = Counting({"disk": served.disk})
    served.listener = Listener(
        served.directory, tls=ListenerTls(TlsOptions("require", psk=str(keys)))
    )
    await served.listener.start(f"unix:{served.path}")
    return served


def nr_attached(served: Served) -> int:
    assert isinstance(served.directory, Counting)
    return served.directory.nr_attached


def uri(served: Served, name: str, keys: Path) -> str:
    return f"nbds+unix://{name}@/?socket={served.path}&tls-psk-file={keys}"


@pytest.mark.parametrize("name", sorted(KEYS))
async def test_client_with_its_key_reads_and_writes(
    protected: Served, tmp_path: Path, name: str
) -> None:
    device = await open_nbd(
        uri(protected, name, tmp_path / "keys.psk"), read_only=False
    )
    try:
        data = bytes(range(256)) * 2048
        await device.write(4096, data)
        assert await device.read(4096, len(data)) == data
        assert nr_attached(protected) > 0
        await device.flush()
    finally:
        await device.close()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("alice", KEYS["carol"]),  # the key of another client
        ("mallory", KEYS["alice"]),  # a right key under a name that has none
        ("alice", KEYS["alice"][2:]),  # a part of the key
    ],
)
async def test_client_without_the_right_key_is_not_attached(
    protected: Served, tmp_path: Path, name: str, key: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    keys = keys_file(other, {name: key})
    with pytest.raises(ResolveError):
        await open_nbd(uri(protected, name, keys), read_only=True)
    assert nr_attached(protected) == 0


async def test_client_with_certificates_or_none_gets_nothing_but_starttls(
    protected: Served,
) -> None:
    plain = await protected.connect()
    await plain.greet()
    plain.option(c.OPT_EXPORT_NAME)
    assert await plain.reader.read(1) == b""  # it is closed, and nothing was sent

    peer = await protected.connect()
    await peer.greet()
    peer.option(c.OPT_STARTTLS)
    assert await peer.option_reply() == (c.REP_ACK, b"")
    context = client_context(None, verify_peer=False)
    with pytest.raises((ssl.SSLError, OSError)):
        await peer.writer.start_tls(context, server_hostname="localhost")
    assert nr_attached(protected) == 0


@pytest.mark.interop
@needs("nbdinfo")
async def test_nbdinfo_with_a_key(protected: Served, tmp_path: Path) -> None:
    keys = tmp_path / "keys.psk"
    found = await asyncio.to_thread(
        report, "nbdinfo", "--json", uri(protected, "alice", keys)
    )
    assert found["TLS"] is True
    wrong = keys_file(tmp_path, {"alice": KEYS["carol"]})
    await asyncio.to_thread(client, "nbdinfo", uri(protected, "alice", wrong), status=1)
