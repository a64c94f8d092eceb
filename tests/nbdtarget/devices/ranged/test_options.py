# SPDX-License-Identifier: Apache-2.0
"""The options behind the # of a URL."""

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.ranged.options import (
    SourceOptions,
    absolute_options,
    parse_options,
)


def test_defaults_and_every_key() -> None:
    assert parse_options("n", "") == SourceOptions(86_400.0, 32, False, "")
    assert parse_options("n", "region=x", ("region",)).said == {"region": "x"}
    text = "source-timeout=0&connections=4&pin=size&ca=/etc/my%20ca.pem"
    found = parse_options("n", text)
    assert (found.source_timeout_s, found.connections) == (0.0, 4)
    assert found.is_pinned_by_size
    assert found.ca == found.said["ca"] == "/etc/my ca.pem"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "conections=4",
            "unknown option `conections' behind the #; did you mean `connections'?",
        ),
        (
            "zzz",
            "unknown option `zzz' behind the #; write source-timeout, connections, pin, ca",
        ),
        ("connections=0", "connections is a number from 1 to 64, not 0"),
        ("source-timeout=1m", "source-timeout is a number from 0 to 31536000, not 1m"),
        ("pin=none", "pin is etag or size, not none"),
        ("pin=etag&pin=size", "option `pin' stands twice behind the #"),
    ],
)
def test_mistakes_are_named(text: str, says: str) -> None:
    with pytest.raises(ResolveError) as caught:
        parse_options("https://h/a?secret", text)
    assert str(caught.value) == f"https://h/a?***: {says}"


def test_relative_path_of_the_authorities() -> None:
    assert absolute_options("https://h/a#pin=size&ca=my.pem", "/srv") == (
        "https://h/a#pin=size&ca=/srv/my.pem"
    )
    for name in (
        "https://h/a",
        "https://h/a#ca=/x",
        "https://h/ca=a",
        "https://h/a#ca=",
    ):
        assert absolute_options(name, "/srv") == name
