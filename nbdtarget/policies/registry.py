# SPDX-License-Identifier: Apache-2.0
"""The cache policies that a table line may name, by name.

A new policy is a module of its own and one line here: docs/extending.md.
"""

from operator import attrgetter
from typing import Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.named import by_name
from nbdtarget.policies.base import Policy
from nbdtarget.policies.cleaner import Cleaner
from nbdtarget.policies.mq import Mq
from nbdtarget.policies.smq.policy import Smq

__all__ = ["ALIASES", "POLICY_TYPES", "UnknownPolicyError", "policy_type"]

POLICY_TYPES: Final[dict[str, type[Policy]]] = by_name(
    (
        Smq,
        Mq,
        Cleaner,
    ),
    attrgetter("name"),
)

# The kernel has a second name for these policies; status lines show the first one.
ALIASES: Final = {"default": "smq"}


class UnknownPolicyError(NbdTargetError):
    """There is no policy of that name."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        return (
            f"no cache policy is named {self.name!r}; there are {', '.join(self.known)}"
        )


def policy_type(name: str) -> type[Policy]:
    """Return the policy that a table line names, in exactly this spelling.

    Raises: UnknownPolicyError.
    """
    found = POLICY_TYPES.get(ALIASES.get(name, name))
    if found is None:
        raise UnknownPolicyError(name, sorted([*POLICY_TYPES, *ALIASES]))
    return found
