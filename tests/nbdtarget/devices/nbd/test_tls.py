# SPDX-License-Identifier: Apache-2.0
"""NbdDevice through TLS, to our own server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.tls_socket import TlsSocket
from nbdtarget.devices.nbd.connection import connect
from nbdtarget.devices.nbd.device import open_nbd
from nbdtarget.devices.nbd.scheme import NbdsUnixScheme
from nbdtarget.devices.nbd.uri import parse_nbd_uri
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.server.tls import ListenerTls, TlsOptions
from nbdtarget_protocol import consts as c
from tests.support.certificates import Authority, authority, needs_openssl
from tests.support.patience import PATIENCE_S
from tests.support.peer import MIB, Directory, Disk

pytestmark = needs_openssl


@asynccontextmanager
async def serving(
    tmp_path: Path,
    disk: Disk,
    mode: str = "require",
    *,
    verify_peer: bool = False,
    limits: Limits | None = None,
) -> AsyncIterator[str]:
    """Serve `disk`; yield a URI without the keys of TLS."""
    tls = ListenerTls(TlsOptions(mode, str(authority()[1]), verify_peer))
    listener = Listener(Directory({"disk": disk}), tls=tls, limits=limits)
    await listener.start(f"unix:{tmp_path / 's'}")
    try:
        yield f"nbds+unix:///disk?socket={tmp_path / 's'}"
    finally:
        disk.hold = False
        disk.let_go()
        await listener.close()


def with_pki(uri: str, pki: Path | None = None) -> str:
    return f"{uri}&tls-certificates={pki or authority()[1]}"


@pytest.mark.parametrize("verify_peer", [False, True])
async def test_data_of_all_sizes_passes(tmp_path: Path, verify_peer: bool) -> None:
    disk = Disk(16 * MIB)
    async with serving(tmp_path, disk, verify_peer=verify_peer) as uri:
        device = await open_nbd(with_pki(uri), read_only=False)
        try:
            for size in (512, 4096, 70_000, 9 * MIB):
                data = (bytes(range(1, 252)) * (size // 251 + 1))[:size]
                await device.write(4096, data)
                await device.flush()
                assert disk.data[4096 : 4096 + size] == data
                assert bytes(await device.read(4096, size)) == data
        finally:
            await device.close()


async def test_many_requests_at_once(tmp_path: Path) -> None:
    disk = Disk(4 * MIB)
    disk.data[:] = bytes(range(256)) * (4 * MIB // 256)
    async with serving(tmp_path, disk) as uri:
        device = await open_nbd(with_pki(uri), read_only=True)
        try:
            reads = [device.read(at * 4096 + 3, 4096) for at in range(500)]
            for at, data in enumerate(await asyncio.gather(*reads)):
                assert bytes(data) == disk.data[at * 4096 + 3 : at * 4096 + 4099]
        finally:
            await device.close()


async def refusal(uri: str) -> str:
    with pytest.raises(ResolveError) as caught:
        await open_nbd(uri, read_only=True)
    return str(caught.value)


async def test_client_that_demands_tls_is_not_talked_out_of_it(tmp_path: Path) -> None:
    async with serving(tmp_path, Disk(), "off") as uri:
        assert "server has no TLS" in await refusal(with_pki(uri))


async def test_plain_uri_where_tls_is_required(tmp_path: Path) -> None:
    async with serving(tmp_path, Disk()) as uri:
        assert "requires TLS" in await refusal(uri.replace("nbds", "nbd"))


async def test_client_that_gives_up_ends_tls_before_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ABORT, as the standard demands. Whose close_notify it was is seen from its own end."""
    ends_of_servers = []
    close = TlsSocket.close

    def noting(it: TlsSocket) -> None:
        ends_of_servers.append(it._ssl.server_side)
        close(it)

    monkeypatch.setattr(TlsSocket, "close", noting)
    async with serving(tmp_path, Disk()) as uri:
        other = with_pki(uri).replace("/disk?", "/other?")
        with pytest.raises(ResolveError, match="has no export 'other'"):
            await open_nbd(other, read_only=True)
        assert False in ends_of_servers


async def test_certificate_with_another_name_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, Disk()) as uri:
        reason = await refusal(with_pki(uri) + "&tls-hostname=other.example")
        assert "certificate is not accepted: Hostname mismatch" in reason


async def test_certificate_of_an_unknown_authority_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Authority(other, "ca-cert")
    async with serving(tmp_path, Disk()) as uri:
        reason = await refusal(with_pki(uri, other))
        assert "certificate is not accepted" in reason
        trusting = with_pki(uri, other) + "&tls-verify-peer=false"
        device = await open_nbd(trusting, read_only=True)
        await device.close()


async def test_client_without_a_certificate_learns_that_it_needs_one(
    tmp_path: Path,
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "ca-cert.pem").write_bytes((authority()[1] / "ca-cert.pem").read_bytes())
    async with serving(tmp_path, Disk(), verify_peer=True) as uri:
        assert "requires a certificate" in await refusal(with_pki(uri, bare))


@pytest.mark.parametrize("name", [".example", "x" * 300])
async def test_name_that_is_none(tmp_path: Path, name: str) -> None:
    async with serving(tmp_path, Disk()) as uri:
        assert "TLS" in await refusal(with_pki(uri) + f"&tls-hostname={name}")


async def test_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    async with serving(tmp_path, Disk()) as uri:
        reason = await refusal(with_pki(uri, tmp_path / "none"))
        assert "none/ca-cert.pem: No such file" in reason


async def test_encrypted_requests_count_as_sent_when_the_connection_is_given_up(
    tmp_path: Path,
) -> None:
    """A write whose bytes may have left must not be forgotten: it may still be carried out."""
    disk = Disk(64 * MIB)
    limits = Limits(requests_in_flight_max=1)
    async with serving(tmp_path, disk, limits=limits) as uri:
        disk.hold = True
        name = with_pki(uri)
        connection = await connect(name, parse_nbd_uri(name))
        connection.start(lambda _: None, lambda _: None)
        payload = memoryview(bytes(100_000))
        for nr in range(400):
            connection.send(
                c.CMD_WRITE, 0, nr * 100_000, 100_000, payload, None, object()
            )
        await disk.until_held(1)
        tls = connection._sock
        assert isinstance(tls, TlsSocket)
        while not tls.sealed:
            connection._send_out()  # the server reads no more: its socket fills up
        connection.give_up()
        assert sum(map(len, connection._out)) == tls.sealed
        owed = len(connection._transmission.in_flight)
        assert 0 < owed < 400
        disk.hold = False
        disk.let_go()
        async with asyncio.timeout(PATIENCE_S):
            await connection.ended.wait()
        assert len(disk.bios) == owed


def test_relative_paths_are_made_absolute() -> None:
    absolute = NbdsUnixScheme().absolute
    assert absolute(
        "nbds+unix:///d?socket=s&tls-certificates=pki&tls-psk-file=%2Fk#tls-psk-file=f",
        "/srv/a b",
    ) == (
        "nbds+unix:///d?socket=/srv/a%20b/s&tls-certificates=/srv/a%20b/pki"
        "&tls-psk-file=%2Fk#tls-psk-file=f"
    )
