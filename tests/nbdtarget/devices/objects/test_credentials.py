# SPDX-License-Identifier: Apache-2.0
"""Credentials that a command prints."""

import json

import pytest

from nbdtarget.devices.objects.credentials import run_credential_command
from nbdtarget.devices.ranged.store import SourceAway

PRINTED = {"Version": 1, "AccessKeyId": "id", "SecretAccessKey": "hidden"}


async def test_printed_credentials() -> None:
    text = json.dumps(
        PRINTED | {"SessionToken": "t", "Expiration": "2026-11-30T12:00:00Z"}
    )
    found = await run_credential_command(["echo", text])
    provided = found.as_obstore()
    assert provided["access_key_id"] == "id"
    assert provided["token"] == "t"
    assert provided["expires_at"].isoformat() == "2026-11-30T12:00:00+00:00"
    assert "hidden" not in repr(found)
    lasting = await run_credential_command(["echo", json.dumps(PRINTED)])
    assert lasting.as_obstore()["expires_at"] is None


@pytest.mark.parametrize(
    ("printed", "says"),
    [
        ("{", "are no credentials"),
        (json.dumps({"AccessKeyId": "hidden"}), "are no credentials"),
        (json.dumps(PRINTED | {"Expiration": "2026-11-30T12:00:00"}), "Expiration has no time zone"),
    ],
    ids=range(3),
)  # fmt: skip
async def test_mistakes_show_no_secret(printed: str, says: str) -> None:
    with pytest.raises(SourceAway) as caught:
        await run_credential_command(["echo", printed])
    assert says in caught.value.reason
    assert "hidden" not in caught.value.reason
