# SPDX-License-Identifier: Apache-2.0
"""The stores that there are have what `Store` asks for, and errors say what the fetcher acts upon."""

from typing import get_type_hints

from nbdtarget.devices.http.store import HttpStore
from nbdtarget.devices.http.url import parse_http_url
from nbdtarget.devices.ranged.store import SourceAway, SourceDenied, SourceError, Store
from tests.support.ranged import MemoryStore


def test_stores_are_stores() -> None:
    stores: list[Store] = [
        MemoryStore(b"x"),
        HttpStore(parse_http_url("http://h/a")),
    ]
    for store in stores:
        for name in ("open", "get", "renew", "close"):
            hints = get_type_hints(getattr(type(store), name))
            assert hints["return"] == get_type_hints(getattr(Store, name))["return"]


def test_errors_carry_their_reason() -> None:
    error = SourceAway("status 503", 4.0, is_overload=True)
    assert isinstance(error, SourceError)
    assert (error.reason, error.retry_after_s, error.is_overload) == (
        "status 503",
        4.0,
        True,
    )
    assert str(SourceDenied("status 403")) == "status 403"
