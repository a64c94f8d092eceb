# SPDX-License-Identifier: Apache-2.0
"""Errors are one line that names thing and reason."""

from nbdtarget_protocol.consts import EINVAL, REP_ERR_UNKNOWN
from nbdtarget_protocol.errors import (
    HandshakeError,
    OptionError,
    ReplyError,
    RequestError,
)


def test_errors_say_one_line() -> None:
    assert str(HandshakeError("bad magic")) == "bad magic"
    assert str(OptionError(REP_ERR_UNKNOWN, "no export")) == "ERR_UNKNOWN: no export"
    assert str(OptionError(7, "x")) == "0x7: x"
    assert str(RequestError(EINVAL, "odd")) == "EINVAL: odd"
    assert str(RequestError(1000, "odd")) == "1000: odd"
    assert str(ReplyError("gap")) == "gap"
