# SPDX-License-Identifier: Apache-2.0
"""URLs as names of devices: their parts, and what is refused."""

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.http.url import origin_of, parse_http_url


def test_parts_are_kept_apart() -> None:
    url = parse_http_url(
        "HTTPS://me:p%40w@Host.example:8443/a%2Fb.img?sig=x%3D#pin=size"
    )
    assert url.url == "https://Host.example:8443/a%2Fb.img?sig=x%3D"  # not encoded anew
    assert url.authorization == "Basic bWU6cEB3"  # me:p@w
    assert url.place == "https://Host.example:8443/a%2Fb.img"
    assert url.options.is_pinned_by_size


def test_identity_is_the_file_and_not_its_spelling() -> None:
    def same(a: str, b: str) -> bool:
        return parse_http_url(a).identity == parse_http_url(b).identity

    assert same("http://h/a", "HTTP://me:pw@H:80/a#pin=size")
    assert not same("http://h/a", "https://h/a")
    assert not same("http://h/a?id=1", "http://h/a?id=2")
    assert not same("http://h/a", "http://h/A")


def test_origin() -> None:
    assert origin_of("https://H/x") == ("https", "h", 443)
    assert origin_of("http://[::1]:81/x") == ("http", "::1", 81)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("http:///a", "the URL names no host"),
        ("http://h:port/a", "not a URL: Port could not be cast"),
        (
            "http://h/a b?s=secret",
            "holds blanks or letters that must be written as %XX",
        ),
        ("http://h/ä", "holds blanks or letters that must be written as %XX"),
        ("http://h/" + "a" * 9000, "is longer than 8192 characters"),
        ("http://h/a?s=secret#x=y", "unknown option `x' behind the #"),
    ],
)
def test_mistakes(name: str, says: str) -> None:
    with pytest.raises(ResolveError) as caught:
        parse_http_url(name)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 400
