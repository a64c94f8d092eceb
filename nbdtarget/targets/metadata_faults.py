# SPDX-License-Identifier: Apache-2.0
"""Error messages for metadata that cannot be used: which file, what is wrong, what to do."""

from typing import Final

from nbdtarget_metadata.errors import CorruptMetadata, MetadataError, NeedsCheck

__all__ = ["explain"]

DAMAGE_LENGTH_MAX: Final = 200  # characters


def explain(error: MetadataError, name: str) -> str:
    """Return one line about the metadata on the device or file called `name`."""
    if isinstance(error, NeedsCheck):
        return (
            f"{name} is marked as needing a check: `nbdtarget metadata check"
            f" --clear-needs-check {name}` checks it, and removes the mark if there is no damage"
        )
    if isinstance(error, CorruptMetadata):
        return (
            f"{name} is damaged: {_damage(error)}; `nbdtarget metadata check {name}` shows what is damaged, and"
            f" `nbdtarget metadata repair -i {name} -o NEW_FILE` saves what is left"
        )
    return f"{name}: {error}"


def _damage(error: CorruptMetadata) -> str:
    text = f"{error.where}: expected {error.expected}, found {error.found}"
    # For example the faults of all four superblocks; the command that is named shows them.
    return text if len(text) <= DAMAGE_LENGTH_MAX else f"{text[:DAMAGE_LENGTH_MAX]}..."
