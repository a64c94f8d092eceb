# SPDX-License-Identifier: Apache-2.0
"""What to tell people about metadata that cannot be used: which file, what is wrong, what helps."""

from nbdtarget_metadata.errors import CorruptMetadata, MetadataError, NeedsCheck

__all__ = ["explain"]


def explain(error: MetadataError, name: str) -> str:
    """Return one line about the metadata on the device or file called `name`."""
    if isinstance(error, NeedsCheck):
        return (
            f"{name} is marked as needing a check: `nbdtarget metadata check"
            f" --clear-needs-check {name}` looks at it, and takes the mark back if all is well"
        )
    if isinstance(error, CorruptMetadata):
        return (
            f"{name} is damaged: {error.where}: expected {error.expected}, found"
            f" {error.found}; `nbdtarget metadata check {name}` tells how much of it, and"
            " `nbdtarget metadata repair` makes new metadata of what is left"
        )
    return f"{name}: {error}"
