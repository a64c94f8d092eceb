# SPDX-License-Identifier: Apache-2.0
"""URLs without their secrets, for everything that people or files get to see.

A signed URL carries a key in its query, and `user:password@` stands in front of a host. Both are replaced by `***` in
names, errors, log lines and metadata. A fragment stays: it holds options of ours (`nbdtarget.devices.ranged.options`)
and never a secret. NBD URIs are left alone, because their queries say where a socket is.
"""

import re
from typing import Final

__all__ = ["HIDDEN", "has_secrets", "redacted"]

HIDDEN: Final = "***"

_SCHEMES: Final = r"(?:https?|s3|gs|az)"
# A URL ends at a blank, a quote or a bracket. A colon or full stop behind a query belongs to the sentence. An apostrophe may
# be a part of a password or of a query.
_URL: Final = re.compile(
    rf"(?P<scheme>\b{_SCHEMES}://)"
    r"(?P<user>[^\s/?#<>]*@)?"
    r"(?P<place>[^\s?#'\"`<>]*)"
    r"(?P<query>\?[^\s#\"`<>]*?(?=[:;,.)\]]*(?:[\s#\"`<>]|'[\s:;,.)\]]|'?$)))?",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Return `text` with the secrets of all URLs in it replaced by `***`."""
    return _URL.sub(_hide, text) if "://" in text else text


def has_secrets(text: str) -> bool:
    """Whether `redacted` would change anything."""
    return redacted(text) != text


def _hide(match: re.Match[str]) -> str:
    user = f"{HIDDEN}@" if match["user"] else ""
    query = f"?{HIDDEN}" if match["query"] else ""
    return f"{match['scheme']}{user}{match['place']}{query}"
