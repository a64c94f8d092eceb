# SPDX-License-Identifier: Apache-2.0
"""Which heads of answers are taken, and what each of the others means."""

import pytest
from multidict import CIMultiDict

from nbdtarget.devices.http.answer import Body, check_head, failure_of
from nbdtarget.devices.ranged.pin import Pin
from nbdtarget.devices.ranged.store import (
    SourceAway,
    SourceChanged,
    SourceDenied,
    SourceError,
    SourceUnfit,
)

PIN = Pin(1000, '"a"', "Mon")
GOOD = {
    "Content-Range": "bytes 100-199/1000",
    "Content-Length": "100",
    "ETag": '"a"',
    "Last-Modified": "Mon",
}


def head(
    status: int = 206,
    pinned: Pin | None = PIN,
    begin: int = 100,
    end: int = 200,
    **changed: str,
) -> Body:
    headers = CIMultiDict(GOOD)
    for key, value in changed.items():
        name = key.replace("_", "-")
        headers.popall(name, None)
        if value:
            headers[name] = value
    return check_head(status, headers, begin, end, pinned)


def test_good_answers() -> None:
    assert head() == Body(PIN, 100)
    assert head(content_length="") == Body(PIN, 100)
    assert head(content_encoding="identity") == Body(PIN, 100)
    # An image that is opened may be shorter than what is asked for.
    first = head(
        pinned=None,
        begin=0,
        end=5000,
        content_range="bytes 0-999/1000",
        content_length="1000",
    )
    assert first == Body(PIN, 1000)
    # All of it was asked for: some servers answer with 200 then.
    whole = head(200, begin=0, end=1000, content_range="", content_length="1000")
    assert whole == Body(PIN, 1000)
    assert head(pinned=Pin(1000), etag='"other"') == Body(
        Pin(1000, '"other"', "Mon"), 100
    )


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"content_range": ""}, SourceUnfit, "Content-Range says nothing"),
        (
            {"content_range": "bytes 100-199/*"},
            SourceUnfit,
            "Content-Range says `bytes 100-199/*'",
        ),
        (
            {"content_range": "bytes 0-99/1000"},
            SourceUnfit,
            "sent bytes 0 to 99 when asked for 100 to 199",
        ),
        ({"content_range": "bytes 100-198/1000"}, SourceUnfit, "sent bytes 100 to 198"),
        ({"content_range": "bytes 100-299/1000"}, SourceUnfit, "sent bytes 100 to 299"),
        (
            {"content_range": "bytes 100-199/1001"},
            SourceChanged,
            "its size is 1001 bytes, not 1000",
        ),
        ({"content_length": "99"}, SourceUnfit, "sends 99 bytes for a range of 100"),
        ({"content_encoding": "gzip"}, SourceUnfit, "encoded (gzip)"),
        ({"etag": '"b"'}, SourceChanged, 'it was replaced: its etag is "b", not "a"'),
        ({"etag": ""}, SourceAway, "does not tell its etag, as it did before"),
    ],
    ids=range(10),
)
def test_answers_with_data_that_are_not_taken(
    changed: dict[str, str], kind: type[SourceError], says: str
) -> None:
    with pytest.raises(kind) as caught:
        head(**changed)  # type: ignore[arg-type]
    assert says in str(caught.value)


def test_whole_file_in_place_of_a_range_is_refused() -> None:
    for pinned in (None, PIN):
        with pytest.raises(SourceUnfit, match="does not support ranges"):
            head(200, pinned, 100, 200, content_range="", content_length="1000")
        with pytest.raises(SourceUnfit, match="does not support ranges"):
            head(200, pinned, 0, 200, content_range="", content_length="1000")
        with pytest.raises(SourceUnfit, match="does not support ranges"):
            head(200, pinned, 0, 200, content_range="", content_length="")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, SourceUnfit), (401, SourceDenied), (403, SourceDenied), (404, SourceUnfit),
        (405, SourceUnfit), (407, SourceDenied), (408, SourceAway), (410, SourceUnfit),
        (412, SourceChanged), (425, SourceAway), (429, SourceAway), (500, SourceAway),
        (502, SourceAway), (503, SourceAway), (504, SourceAway), (304, SourceUnfit), (204, SourceUnfit),
    ],
)  # fmt: skip
def test_statuses(status: int, kind: type[SourceError]) -> None:
    with pytest.raises(kind) as caught:
        head(status)
    assert type(caught.value) is kind
    if isinstance(caught.value, SourceAway):
        assert caught.value.is_overload is (status in (429, 503))


def test_retry_after_is_passed_on() -> None:
    error = failure_of(503, CIMultiDict({"retry-after": "17"}), PIN)
    assert isinstance(error, SourceAway)
    assert error.retry_after_s == 17.0


def test_expired_token_is_no_bad_request() -> None:
    body = "<Error><Code>ExpiredToken</Code></Error>"
    assert isinstance(failure_of(400, {}, PIN, body), SourceDenied)
    assert isinstance(failure_of(400, {}, PIN, "<Error>"), SourceUnfit)


def test_range_behind_the_end() -> None:
    assert failure_of(416, {"Content-Range": "bytes */0"}, None).reason == "is empty"
    changed = failure_of(416, {"Content-Range": "bytes */50"}, PIN)
    assert isinstance(changed, SourceChanged)
    assert changed.reason == "its size is 50 bytes, not 1000"
    assert isinstance(
        failure_of(416, {"Content-Range": "bytes */1000"}, PIN), SourceUnfit
    )
    assert isinstance(failure_of(412, {}, None), SourceUnfit)


def test_failed_precondition_says_what_is_known() -> None:
    assert failure_of(412, {}, PIN).reason.endswith("another state of it now")
    assert failure_of(412, {"ETag": '"b"'}, PIN).reason.endswith(
        'its etag is "b", not "a"'
    )
