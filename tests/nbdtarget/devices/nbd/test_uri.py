# SPDX-License-Identifier: Apache-2.0
"""NBD URIs: each form that people write, and one line for each that means nothing."""

import os
import pwd

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.nbd import uri as uri_module
from nbdtarget.devices.nbd.uri import NbdTls, NbdUri, parse_nbd_uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://host", NbdUri("", "host")),
        ("nbd://host/", NbdUri("", "host")),
        ("nbd://host:1234/disk", NbdUri("disk", "host", 1234)),
        ("nbd://[::1]/disk", NbdUri("disk", "::1")),
        ("NBD://10.0.0.1:1/a/b", NbdUri("a/b", "10.0.0.1", 1)),
        ("nbd://host//abs", NbdUri("/abs", "host")),
        ("nbd://host/caf%C3%A9%20", NbdUri("café ", "host")),
        ("nbd+unix:///d?socket=/run/s", NbdUri("d", socket_path="/run/s")),
        ("nbd+unix://?socket=/run/s", NbdUri("", socket_path="/run/s")),
        ("nbd+unix:///?socket=/a%20b+c", NbdUri("", socket_path="/a b+c")),
        ("nbd+unix:///?socket=%00abstract", NbdUri("", socket_path="\0abstract")),
        ("nbd+vsock://1:10810/d", NbdUri("d", port=10810, cid=1)),
        ("nbd+vsock:///d", NbdUri("d", port=10809, cid=2)),
        ("nbd+vsock://7", NbdUri("", port=10809, cid=7)),
        (
            "nbd+vsock://4294967294:4294967294/d",
            NbdUri("d", port=0xFFFFFFFE, cid=0xFFFFFFFE),
        ),
    ],
)
def test_parse_what_people_write(text: str, expected: NbdUri) -> None:
    assert parse_nbd_uri(text) == expected


def test_key_of_the_local_user_is_meant_without_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the URI document asks; certificates need no name."""
    monkeypatch.setattr(uri_module, "_local_user", lambda: "bob")
    for name, user in (("", "bob"), ("alice@", "alice")):
        tls = parse_nbd_uri(f"nbds://{name}host/?tls-psk-file=/k").tls
        assert tls is not None
        assert tls.username == user
    tls = parse_nbd_uri("nbds://host/").tls
    assert tls is not None
    assert tls.username == ""


def test_user_without_a_name_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uri_module._local_user() == pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setattr(os, "getuid", lambda: 0x7FFF_FFF7)
    assert uri_module._local_user() == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nbd:///disk", "names no host"),
        ("nbd://host:port/", "not an NBD URI"),
        ("nbd://host:70000/", "not an NBD URI"),
        ("nbd://[::1/", "not an NBD URI"),
        ("nbd://host/%ff", "not an NBD URI"),
        ("nbd://host/a%00b", "not an export name"),
        ("nbd://host/" + "x" * 5000, "not an export name"),
        ("nbd+unix:///disk", "names no socket"),
        ("nbd+unix://host/disk?socket=/s", "has no host"),
        ("nbd+unix:///?socket=/a%00b", "no NUL"),
        ("nbd://host/?sockte=/s", r"unknown key `sockte' .*did you mean `socket'"),
        ("nbds://host/?x=1", "unknown key `x' in the URI"),
        (
            "nbds://h/?tls-verify-peer=true&tls-verify-peer=false",
            "`tls-verify-peer' stands twice in the URI",
        ),
        ("nbd+unix:///?socket=/a&socket=/a", "`socket' stands twice in the URI"),
        ("nbd://host/?tls-hostname=a", "`tls-hostname' needs TLS: write nbds:"),
        (
            "nbd+unix:///?socket=/s&tls-verify-peer=0",
            r"needs TLS: write nbds\+unix:",
        ),
        ("nbds://host/?tls-verify-peer=maybe", "is true or false, not maybe"),
        ("nbds://host/?tls-type=anon", "tls-type anon is not supported"),
        ("nbds://host/?tls-type=psk", "belong together"),
        ("nbds://host/?tls-type=x509&tls-psk-file=/k", "belong together"),
        ("nbds+unix://user@host/?socket=/s", "has no host"),
        ("nbd+unix://user@/?socket=/s", "has no host"),
        ("nbd+vsock://host/", "CID and port of vsock are numbers"),
        ("nbd+vsock://1:/", "CID and port of vsock are numbers"),
        ("nbd+vsock://1:x/", "CID and port of vsock are numbers"),
        ("nbd+vsock://4294967295/", "CID and port of vsock are numbers"),
        ("nbd+vsock://1:4294967295/", "CID and port of vsock are numbers"),
        ("nbd+tcp://1/", "nbd\\+tcp: is not supported"),
        (
            "nbd://host/?socket=/s",
            r"`socket' is for unix sockets: write nbd\+unix:",
        ),
        (
            "nbds+vsock://1/?socket=/s",
            r"`socket' is for unix sockets: write nbds\+unix:",
        ),
        (f"nbd://host/?connections={'9' * 5000}", "is a number from 1 to 16"),
        (f"nbd://host/?request-timeout={'9' * 5000}", "is 0 to 86400 seconds"),
    ],
)
def test_parse_refuses_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ResolveError, match=reason) as caught:
        parse_nbd_uri(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbds://host/d", NbdUri("d", "host", tls=NbdTls("host"))),
        ("nbds+vsock://3/d", NbdUri("d", cid=3, tls=NbdTls("localhost"))),
        (
            "nbds+vsock://alice@3:4/d?tls-psk-file=/k",
            NbdUri(
                "d",
                port=4,
                cid=3,
                tls=NbdTls("localhost", psk_file="/k", username="alice"),
            ),
        ),
        (
            "nbds+unix:///d?socket=/s",
            NbdUri("d", socket_path="/s", tls=NbdTls("localhost")),
        ),
        (
            "nbds://10.0.0.1/d?tls-hostname=a.example&tls-certificates=/etc/pki&tls-verify-peer=0",
            NbdUri("d", "10.0.0.1", tls=NbdTls("a.example", False, "/etc/pki")),
        ),
        (
            "nbds+unix://alice%20b@/d?socket=/s&tls-type=psk&tls-psk-file=/keys",
            NbdUri(
                "d",
                socket_path="/s",
                tls=NbdTls("localhost", psk_file="/keys", username="alice b"),
            ),
        ),
    ],
)
def test_parse_tls(text: str, expected: NbdUri) -> None:
    assert parse_nbd_uri(text) == expected


def test_identity_is_one_for_all_ways_to_write_it() -> None:
    first = parse_nbd_uri("nbd://Host/x").identity
    assert first == parse_nbd_uri("nbd://host:10809/x").identity
    assert first != parse_nbd_uri("nbd://host/y").identity
    assert first == parse_nbd_uri("nbds://host/x?tls-verify-peer=0").identity
    vsock = parse_nbd_uri("nbd+vsock:///x").identity
    assert vsock == parse_nbd_uri("nbds+vsock://2:10809/x").identity
    assert vsock != parse_nbd_uri("nbd+vsock://3/x").identity
    assert vsock != parse_nbd_uri("nbd+vsock://2:10810/x").identity
    unix = parse_nbd_uri("nbd+unix:///x?socket=/run/../run/s").identity
    assert unix == parse_nbd_uri("nbd+unix:///x?socket=/run/s").identity
