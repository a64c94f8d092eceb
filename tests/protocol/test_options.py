# SPDX-License-Identifier: Apache-2.0
"""Option payloads: round trips, and each way to be wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdtarget_protocol.consts import (
    REP_ERR_INVALID,
    REP_ERR_TOO_BIG,
    STRING_MAX,
    U16,
    U32,
)
from nbdtarget_protocol.errors import OptionError
from nbdtarget_protocol.options import (
    clip_string,
    decode_info_request,
    decode_meta_context_request,
    decode_name,
    encode_info_request,
    encode_meta_context_request,
    is_export_name,
    printable,
)

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


@given(NAMES, st.frozensets(st.integers(0, 65535), max_size=8))
def test_info_request_comes_back(name: str, infos: frozenset[int]) -> None:
    assert decode_info_request(encode_info_request(name, sorted(infos))) == (
        name,
        infos,
    )


@given(NAMES, st.lists(NAMES, max_size=8))
def test_meta_context_request_comes_back(name: str, queries: list[str]) -> None:
    data = encode_meta_context_request(name, queries)
    expected = [query.encode() for query in queries]
    assert decode_meta_context_request(data, 8) == (name, expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(5),
        U32.pack(1) + bytes(2),  # the name reaches into the count
        U32.pack(0xFFFFFFFF) + bytes(2),
        U32.pack(0) + U16.pack(1),  # a type is missing
        U32.pack(0) + U16.pack(0) + b"x",
        U32.pack(1) + b"\xff" + U16.pack(0),
        U32.pack(1) + b"\0" + U16.pack(0),
    ],
)
def test_info_request_is_refused_when_malformed(data: bytes) -> None:
    with pytest.raises(OptionError) as caught:
        decode_info_request(data)
    assert caught.value.rep == REP_ERR_INVALID


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        U32.pack(1) + bytes(4),
        U32.pack(0) + U32.pack(1),  # a query is missing
        U32.pack(0) + U32.pack(1) + U32.pack(2) + b"x",
        U32.pack(0) + U32.pack(1) + U32.pack(4097) + bytes(4097),
        U32.pack(0) + U32.pack(0) + b"x",
        U32.pack(1) + b"\xff" + U32.pack(0),
    ],
)
def test_meta_context_request_is_refused_when_malformed(data: bytes) -> None:
    with pytest.raises(OptionError) as caught:
        decode_meta_context_request(data, 8)
    assert caught.value.rep == REP_ERR_INVALID


def test_meta_context_request_with_too_many_queries_is_too_big() -> None:
    data = encode_meta_context_request("", ["base:"] * 9)
    with pytest.raises(OptionError) as caught:
        decode_meta_context_request(data, 8)
    assert caught.value.rep == REP_ERR_TOO_BIG


def test_name_of_4096_bytes_is_the_longest() -> None:
    assert decode_name(b"x" * STRING_MAX) == "x" * STRING_MAX
    with pytest.raises(OptionError, match="longer than 4096"):
        decode_name(b"x" * (STRING_MAX + 1))


@pytest.mark.parametrize("name", ["a\0b", "\udc80", "é" * 2049])
def test_is_export_name_when_it_cannot_be_sent(name: str) -> None:
    assert not is_export_name(name)


def test_is_export_name_when_it_can() -> None:
    assert is_export_name("")
    assert is_export_name("é" * 2048)


def test_clip_string_cuts_between_characters() -> None:
    assert clip_string("short") == b"short"
    assert clip_string("x" + "é" * 2048) == ("x" + "é" * 2047).encode()


def test_printable_has_no_control_characters() -> None:
    assert printable(b"no\x1b[31m such\nthing\xff ") == "no?[31m such?thing\ufffd"
