# SPDX-License-Identifier: Apache-2.0
"""No secret of a URL is left, and nothing else is changed."""

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.redaction import has_secrets, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://h/a.img?X-Sig=abc%2F", "https://h/a.img?***"),
        ("http://me:pw@h:8080/a", "http://***@h:8080/a"),
        ("https://me@h/a?b=c#pin=size", "https://***@h/a?***#pin=size"),
        ("HTTPS://u:p@h/a?x", "HTTPS://***@h/a?***"),
        ("s3://key:secret@bucket/a?x=y", "s3://***@bucket/a?***"),
        ("https://h/a?sig=a: is not there", "https://h/a?***: is not there"),
        ("'https://h/a?sig=a', see", "'https://h/a?***', see"),
        ("0 8 clone m d https://h/a?s=1 8", "0 8 clone m d https://h/a?*** 8"),
        ("https://me:p'w@h/a?sig='b", "https://***@h/a?***"),
        ("`https://h/a?a https://me:b@h/a?c'", "`https://h/a?*** https://***@h/a?***'"),
        ("https://h/a?s=1:2 and gs://b/c?t=2", "https://h/a?*** and gs://b/c?***"),
    ],
)
def test_secrets_are_replaced(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert has_secrets(text)
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://h/a.img",
        "https://h/a@b.img#pin=size",
        "nbd+unix:///x?socket=/run/s",
        "/srv/what?.img",
        "no URL: a?b",
    ],
)
def test_all_else_stays(text: str) -> None:
    assert redacted(text) == text
    assert not has_secrets(text)


def test_error_about_a_name_shows_no_secret() -> None:
    error = ResolveError("https://me:pw@h/a?sig=1", "is empty")
    assert str(error) == "https://***@h/a?***: is empty"
    assert "pw" not in repr(error)
