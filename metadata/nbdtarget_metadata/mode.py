# SPDX-License-Identifier: Apache-2.0
"""The modes of a metadata object: RW, RO and FAIL, as in the kernel. They only ever go downwards."""

import enum

__all__ = ["Mode"]


class Mode(enum.Enum):
    """The operations that the metadata allows. The value is the word in a status line."""

    RW = "rw"  # everything
    RO = "ro"  # a commit failed: what is in core is what was last committed; no changes
    FAIL = "Fail"  # nothing
