# SPDX-License-Identifier: Apache-2.0
"""What a command that serves a disk prints first: its URIs, and a line to paste for each client that can attach.

Each line works with the tools of Debian 12 (libnbd 1.14, QEMU 7.2, nbd-client 3.24); a client that cannot attach has none. With TLS the lines name the
directory of the server's certificates if it has what a client needs; else CERTIFICATES stands in its place, and the line
above says what that is. libnbd knows no `tls-hostname` yet, so the host is one that the server's certificate has.
"""

import os
import shlex
from typing import Final, NamedTuple
from urllib.parse import quote, urlsplit

from nbdtarget.common.certificate_names import host_names
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.daemon.activation import passed_sockets
from nbdtarget.devices.nbd.uri import NbdUri, parse_nbd_uri
from nbdtarget.server.listener import export_uri
from nbdtarget.server.tls import TlsOptions
from nbdtarget_protocol.handshake import TlsMode

__all__ = ["TlsClient", "client_lines", "print_attach", "tls_client"]

CERTIFICATES: Final = "CERTIFICATES"
_OWN_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
_OURS: Final = (
    *_OWN_HOSTS,
    "0.0.0.0",
    "::",
)  # a listener there can be reached as each of these
_CLIENT_FILES: Final = ("client-cert.pem", "client-key.pem")


class TlsClient(NamedTuple):
    """What a client has to say to a server with TLS.

    Attributes:
        where: of the lines to paste: what stands in them and is no real name.
        host: a name of the server's certificate; "": it has none.
        certificates: directory; None: `psk` is a file of keys.
        has_certificate: the client shows one of its own.
    """

    where: str = ""
    host: str = ""
    certificates: str | None = None
    has_certificate: bool = False
    psk: str = ""


NO_TLS: Final = TlsClient()


def print_attach(what: str, name: str, uris: list[str], tls: TlsOptions) -> None:
    """Print what is served, its URIs, and a line for each client.

    Nothing is printed if a socket was passed: who passed it knows where clients attach, and stdout may be that of a tool (`nbdinfo -- [ nbdtarget … ]`).
    """
    if passed_sockets().nbd:
        return
    exports = [export_uri(uri, name) for uri in uris]
    print(f"{what}: attach to")
    for uri in exports:
        print(f"  {uri}")
    first = exports[0]
    if tls.tls_mode is TlsMode.ON and tls.verify_peer:
        first = first.replace("nbd", "nbds", 1)  # plain clients may not attach
    client = tls_client(parse_nbd_uri(first), tls)
    if lines := client_lines(first, client):
        print(f"for example with one of{client.where}")
    for line in lines:
        print(f"  {line}")
    print(flush=True)


def tls_client(server: NbdUri, tls: TlsOptions) -> TlsClient:
    """What a client needs."""
    if server.tls is None:
        return NO_TLS
    if tls.psk is not None:
        psk = os.path.abspath(tls.psk)
        return TlsClient(f" (NAME: one of {psk})", server.host, psk=psk)
    assert tls.certificates is not None
    directory = os.path.abspath(tls.certificates)
    try:
        names = host_names(os.path.join(directory, "server-cert.pem"))
    except NbdTargetError:
        names = ()  # it was replaced meanwhile; the server has the old one, and serves
    # Of those that the certificate has: the one of the URI, one that this machine has for itself, or any.
    hosts = (
        [server.host, *_OWN_HOSTS, *names]
        if server.host in _OURS
        else [server.host, *names]
    )
    host = next((each for each in hosts if each in names), "")
    needed = ["ca-cert.pem"]
    if tls.verify_peer:
        needed += _CLIENT_FILES
    # vsock is for other machines, which have directories of their own.
    if server.cid is None and all(
        os.path.exists(os.path.join(directory, file)) for file in needed
    ):
        return TlsClient("", host, directory, bool(tls.verify_peer))
    files = " and ".join(", ".join(needed).rsplit(", ", 1))
    where = f" ({CERTIFICATES}: the client's directory with {files})"
    return TlsClient(where, host, CERTIFICATES, bool(tls.verify_peer))


def client_lines(uri: str, client: TlsClient = NO_TLS) -> list[str]:
    """One line to paste for each client that can attach. `client`: with TLS."""
    where = parse_nbd_uri(uri)
    if where.tls is None:
        return [*_by_libnbd(uri), *_by_qemu(uri, where), *_by_kernel(where)]
    lines = []
    if client.host or not where.host:
        # Over unix sockets and vsock, libnbd does not look at the name.
        lines += _by_libnbd(_tls_uri(uri, where, client))
    if client.certificates is not None and client.host:
        lines += _by_qemu_with_tls(where, client, client.certificates)
        lines += _by_kernel(where, client)
    return lines


def _by_libnbd(uri: str) -> list[str]:
    word = shlex.quote(uri)
    return [f"nbdinfo {word}", f"nbdcopy --progress {word} copy.img"]


def _tls_uri(uri: str, where: NbdUri, client: TlsClient) -> str:
    parts = urlsplit(uri)
    netloc = parts.netloc
    if where.host:
        host = f"[{client.host}]" if ":" in client.host else client.host
        netloc = f"{host}:{where.port}"
    if client.certificates is None:
        netloc, key = f"NAME@{netloc}", f"tls-psk-file={quote(client.psk)}"
    else:
        key = f"tls-certificates={quote(client.certificates)}"
    query = f"{parts.query}&{key}" if parts.query else key
    # `urlunsplit` would leave out the // of a unix URI.
    return f"{parts.scheme}://{netloc}{parts.path}?{query}"


def _by_qemu(uri: str, where: NbdUri) -> list[str]:
    if where.cid is not None:
        # QEMU takes no such URI.
        disk = shlex.quote(_qemu_disk(where))
        return [f"qemu-img info --image-opts {disk}"]
    drive = shlex.quote(f"file={uri.replace(',', ',,')},format=raw,if=virtio")
    return [
        f"qemu-img info {shlex.quote(uri)}",
        f"qemu-system-x86_64 -m 1G -drive {drive}",
    ]


def _by_qemu_with_tls(where: NbdUri, client: TlsClient, directory: str) -> list[str]:
    escaped = directory.replace(",", ",,")
    object_ = shlex.quote(f"tls-creds-x509,id=tls,dir={escaped},endpoint=client")
    keys = f",tls-creds=tls,tls-hostname={client.host}"
    disk = shlex.quote(_qemu_disk(where) + keys)
    file = _qemu_disk(where, "file.") + keys.replace(",", ",file.")
    drive = shlex.quote(f"format=raw,if=virtio,{file}")
    return [
        f"qemu-img info --object {object_} --image-opts {disk}",
        f"qemu-system-x86_64 -m 1G -object {object_} -drive {drive}",
    ]


def _qemu_disk(where: NbdUri, prefix: str = "") -> str:
    """The disk in QEMU's options."""
    if where.cid is not None:
        server = {"type": "vsock", "cid": str(where.cid), "port": str(where.port)}
    elif where.socket_path:
        server = {"type": "unix", "path": where.socket_path}
    else:
        server = {"type": "inet", "host": where.host, "port": str(where.port)}
    options = {f"server.{key}": value for key, value in server.items()}
    options = {"driver": "nbd", **options, "export": where.export_name}
    return ",".join(
        f"{prefix}{key}={value.replace(',', ',,')}" for key, value in options.items()
    )


def _by_kernel(where: NbdUri, client: TlsClient | None = None) -> list[str]:
    if where.cid is not None:
        return []  # nbd-client speaks no vsock
    if where.socket_path:
        server = f"-unix {shlex.quote(where.socket_path)}"
    else:
        server = f"{where.host} {where.port}"
    keys = ""
    if client is not None and client.certificates is not None:
        directory = client.certificates
        files = {"cacertfile": "ca-cert.pem"}
        if client.has_certificate:
            files |= {"certfile": "client-cert.pem", "keyfile": "client-key.pem"}
        keys = "".join(
            f" -{key} {shlex.quote(os.path.join(directory, file))}"
            for key, file in files.items()
        )
        keys += f" -tlshostname {client.host}"
    name = shlex.quote(where.export_name)
    return [f"sudo nbd-client {server} -N {name}{keys} /dev/nbd0"]
