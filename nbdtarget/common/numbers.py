# SPDX-License-Identifier: Apache-2.0
"""`maybe_number`: whole numbers that users write and other programs send."""

from typing import Final

__all__ = ["ID_MAX", "maybe_number"]

# Of users, groups, CIDs and ports of vsock: the next number is none of them, or means all of them.
ID_MAX: Final = 0xFFFF_FFFE


def maybe_number(text: str, most: int) -> int | None:
    """Return the number that `text` is, in ASCII digits; None: it is none, or more than `most`.

    Python refuses to convert thousands of digits, so a text that is far too long is not even tried.
    """
    if not (text.isascii() and text.isdecimal()):
        return None
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(most)):
        return None
    number = int(digits)
    return number if number <= most else None
