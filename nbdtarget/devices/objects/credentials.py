# SPDX-License-Identifier: Apache-2.0
"""Credentials for S3 from a command, in the form that AWS calls `credential_process`.

The command of the URL (`nbdtarget.devices.http.url_command`) prints one JSON object:

    {"Version": 1, "AccessKeyId": "…", "SecretAccessKey": "…", "SessionToken": "…", "Expiration": "2026-11-30T12:00:00Z"}

SessionToken and Expiration may be missing. The credentials are used until `Expiration`, or until the store refuses them.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from nbdtarget.devices.http.url_command import command_output
from nbdtarget.devices.ranged.store import SourceAway

__all__ = ["Credentials", "run_credential_command"]

OUTPUT_MAX: Final = 64 << 10


class Credentials(msgspec.Struct, frozen=True, rename="pascal"):
    """See the module head. `repr` shows no secret."""

    access_key_id: str
    secret_access_key: str
    session_token: str | None = None
    expiration: datetime | None = None

    def __repr__(self) -> str:
        return f"<Credentials until {self.expiration}>"

    def as_obstore(self) -> dict[str, Any]:
        """Return the credentials in the form that obstore takes from a provider."""
        return {
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
            "token": self.session_token,
            "expires_at": self.expiration,
        }


async def run_credential_command(command: Sequence[str]) -> Credentials:
    """Run the command. Raises: SourceAway, without a secret."""
    output = await command_output(command, OUTPUT_MAX)
    wrong = f"what the command {command[0]} printed are no credentials"
    try:
        found = msgspec.json.decode(output, type=Credentials)
    except msgspec.MsgspecError:
        raise SourceAway(wrong) from None
    if found.expiration is not None and found.expiration.tzinfo is None:
        raise SourceAway(f"{wrong}: Expiration has no time zone")
    return found
