# SPDX-License-Identifier: Apache-2.0
"""The policies that a table line may name: every `POLICIES` of a module of this package.

A new policy is a new file here and no change elsewhere.
"""

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Final

import nbdtarget.policies
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.policies.base import Policy

__all__ = ["UnknownPolicyError", "policy_type", "policy_types"]

DEFAULT: Final = "smq"


class UnknownPolicyError(NbdTargetError):
    """No policy of that name."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        return (
            f"no cache policy is named {self.name!r}; there are {', '.join(self.known)}"
        )


@cache
def policy_types() -> Mapping[str, type[Policy]]:
    """All policies by name; `default` is another name for smq."""
    types: dict[str, type[Policy]] = {}
    for module in pkgutil.iter_modules(nbdtarget.policies.__path__):
        found = import_module(f"{nbdtarget.policies.__name__}.{module.name}")
        for policy in getattr(found, "POLICIES", ()):
            assert policy.name not in types, f"two policies are named {policy.name}"
            types[policy.name] = policy
    types["default"] = types[DEFAULT]
    return MappingProxyType(types)


def policy_type(name: str) -> type[Policy]:
    """The policy that a table line names, in this very spelling.

    Raises:
        UnknownPolicyError: there is none.
    """
    types = policy_types()
    if name not in types:
        raise UnknownPolicyError(name, sorted(types))
    return types[name]
