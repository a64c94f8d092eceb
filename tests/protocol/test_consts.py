# SPDX-License-Identifier: Apache-2.0
"""The numbers, written a second time from proto.md, and the layouts' sizes."""

from struct import Struct

import pytest

from nbdtarget_protocol import consts


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (consts.GREETING, 18),
        (consts.CLIENT_FLAGS, 4),
        (consts.OPTION, 16),
        (consts.OPTION_REPLY, 20),
        (consts.EXPORT, 10),
        (consts.INFO_EXPORT_PAYLOAD, 12),
        (consts.INFO_BLOCK_SIZE_PAYLOAD, 14),
        (consts.REQUEST, 28),
        (consts.SIMPLE_REPLY, 16),
        (consts.CHUNK, 20),
        (consts.OFFSET_DATA, 28),
        (consts.OFFSET_HOLE, 32),
        (consts.EXTENDED_REQUEST, 32),
        (consts.EXTENDED_CHUNK, 32),
        (consts.EXTENDED_OFFSET_DATA, 40),
        (consts.EXTENDED_OFFSET_HOLE, 44),
    ],
)
def test_layout_has_the_size_of_the_document(layout: Struct, size: int) -> None:
    assert layout.size == size


def test_magics() -> None:
    assert consts.NBDMAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert consts.IHAVEOPT.to_bytes(8, "big") == b"IHAVEOPT"
    assert consts.CLISERV_MAGIC == 0x420281861253
    assert consts.OPTION_REPLY_MAGIC == 0x3E889045565A9
    assert consts.REQUEST_MAGIC == 0x25609513
    assert consts.SIMPLE_REPLY_MAGIC == 0x67446698
    assert consts.STRUCTURED_REPLY_MAGIC == 0x668E33EF
    assert consts.EXTENDED_REQUEST_MAGIC == 0x21E41C71
    assert consts.EXTENDED_REPLY_MAGIC == 0x6E8A278C


def test_name_tables() -> None:
    assert list(consts.OPT_NAMES) == list(range(1, 12))
    assert consts.OPT_NAMES[7] == "GO"
    assert consts.REP_NAMES[1] == "ACK"
    assert consts.REP_NAMES[2**31 + 9] == "ERR_TOO_BIG"
    assert 2**31 not in consts.REP_NAMES
    assert consts.INFO_NAMES == {
        0: "EXPORT",
        1: "NAME",
        2: "DESCRIPTION",
        3: "BLOCK_SIZE",
    }
    assert list(consts.CMD_NAMES) == list(range(9))
    assert consts.CMD_NAMES[6] == "WRITE_ZEROES"
    assert consts.CMD_FLAG_NAMES[16] == "FAST_ZERO"
    assert consts.REPLY_TYPE_NAMES[2**15 + 2] == "ERROR_OFFSET"
    assert sorted(consts.ERROR_NAMES) == [1, 5, 12, 22, 28, 75, 95, 108]


@pytest.mark.parametrize(
    ("bit", "name"),
    list(
        enumerate(
            [
                "HAS_FLAGS",
                "READ_ONLY",
                "SEND_FLUSH",
                "SEND_FUA",
                "ROTATIONAL",
                "SEND_TRIM",
                "SEND_WRITE_ZEROES",
                "SEND_DF",
                "CAN_MULTI_CONN",
                "SEND_RESIZE",
                "SEND_CACHE",
                "SEND_FAST_ZERO",
                "BLOCK_STATUS_PAYLOAD",
            ]
        )
    ),
)
def test_transmission_flag(bit: int, name: str) -> None:
    assert getattr(consts, f"FLAG_{name}") == 1 << bit
