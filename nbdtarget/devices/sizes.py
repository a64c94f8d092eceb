# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them: "4096", "64K", "1G", "2TiB"."""

import re
from typing import Final

__all__ = ["SIZE_MAX", "parse_size"]

SIZE_MAX: Final = (1 << 63) - 1  # bytes: the largest offset that Linux and NBD know

_SIZE: Final = re.compile(r"([0-9]{1,20})([KMGTPE]?)(iB)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` stands for; a suffix counts in powers of 1024.

    Raises: ValueError.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"not a size: {text!r} (write 4096, 64K, 1G, …)")
    size = int(match[1]) << 10 * " KMGTPE".index(match[2].upper() or " ")
    if size > SIZE_MAX:
        raise ValueError(f"too large: {text!r}")
    return size
