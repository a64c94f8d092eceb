# SPDX-License-Identifier: Apache-2.0
"""Which requests to a control socket may change something, and which may only look.

A server has up to two tokens. With one a client may do everything; with the other it may look (`LOOKING_VERBS`, metrics, page).
A unix socket needs none, because the file's mode says who may connect; without a token its clients may do everything. On TCP each request needs one of them.

A request may ask for less than its token allows, with the header `Nbdtarget-Rights: look`: so a program that passes requests on, as
`nbdtarget page --read-only` does, takes the right to change away. Each answer says in the same header what was allowed.
"""

import enum
import hmac
from typing import Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.paths import LOOK_TOKEN_VARIABLE, TOKEN_VARIABLE, control_token

__all__ = ["NO_TOKENS", "RIGHTS_HEADER", "ControlTokens", "Rights", "control_tokens"]

RIGHTS_HEADER: Final = "Nbdtarget-Rights"


class Rights(enum.Enum):
    """The rights of a request."""

    LOOK = "look"
    ALL = "all"


class ControlTokens(NamedTuple):
    """The tokens of a server.

    Attributes:
        full: with it a client may do everything. None: there is none.
        look: with it a client may look, and change nothing. None: there is none.
    """

    full: str | None = None
    look: str | None = None

    def are_needed(self, *, is_tcp: bool) -> bool:
        """Whether a request without a token is refused."""
        return self.full is not None or (is_tcp and self.look is not None)

    def rights(self, given: str, *, is_tcp: bool) -> Rights | None:
        """Return what a request may do; None: nothing. Args: given: its header `Authorization`, empty: it has none."""
        raw = given.encode("utf-8", "replace")
        # Both are compared each time, and whole: how long it takes says nothing of either.
        is_full = _is_token(raw, self.full)
        is_look = _is_token(raw, self.look)
        if is_full:
            return Rights.ALL
        if is_look:
            return Rights.LOOK
        return None if self.are_needed(is_tcp=is_tcp) else Rights.ALL


NO_TOKENS: Final = ControlTokens()


def _is_token(given: bytes, token: str | None) -> bool:
    is_same = hmac.compare_digest(given, f"Bearer {token}".encode())
    return is_same and token is not None


def control_tokens(
    file: str | None = None, look_file: str | None = None
) -> ControlTokens:
    """The tokens of a server: the first lines of these files, else of the environment.

    Raises: NbdTargetError: a file is unreadable, a token is too short or more than one word, or both are the same.
    """
    tokens = ControlTokens(
        control_token(file), control_token(look_file, LOOK_TOKEN_VARIABLE)
    )
    if tokens.full is not None and tokens.full == tokens.look:
        raise NbdTargetError(
            f"{look_file or f'${LOOK_TOKEN_VARIABLE}'}: it is the token of {file or f'${TOKEN_VARIABLE}'}: clients that"
            " may only look need another one"
        )
    return tokens
