# SPDX-License-Identifier: Apache-2.0
"""Fields that the messages of several verbs have in common."""

import msgspec
import pytest

from nbdtarget.control.fields import Answer, Certificate, Request, told


class Ask(Request):
    name: str


def test_a_request_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `nam`"):
        msgspec.json.decode(b'{"name": "x", "nam": "y"}', type=Ask)


def test_an_answer_of_a_newer_server_is_understood() -> None:
    raw = b'{"path": "/c.pem", "expires_s": 1.5, "new": []}'
    assert msgspec.json.decode(raw, type=Certificate) == Certificate("/c.pem", 1.5)
    assert issubclass(Certificate, Answer)


def test_a_description_is_one_for_the_schema() -> None:
    assert told("Name.").description == "Name."
