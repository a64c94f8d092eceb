# SPDX-License-Identifier: Apache-2.0
"""Numbers among the status fields of a target."""

from nbdtarget.targets.base import StatusFields

__all__ = ["count"]


def count(fields: StatusFields, name: str) -> int:
    """Return the field `name`, which is a number."""
    value = fields[name]
    assert isinstance(value, int)
    return value
