# SPDX-License-Identifier: Apache-2.0
"""Recognises other formats where a superblock should stand, so that errors can name them.

The metadata of the kernel's own targets is known by a magic number, a little-endian u64 at byte 32.
"""

from typing import Final

__all__ = [
    "KERNEL_CACHE",
    "KERNEL_CACHE_MAGIC",
    "KERNEL_CLONE",
    "KERNEL_CLONE_MAGIC",
    "KERNEL_MAGIC_AT",
    "describe",
]

KERNEL_CACHE_MAGIC: Final = 0o6142003
KERNEL_CLONE_MAGIC: Final = 0x8AF27F64
KERNEL_MAGIC_AT: Final = 32

KERNEL_CACHE: Final = "the kernel's dm-cache metadata"
KERNEL_CLONE: Final = "the kernel's dm-clone metadata"
_KERNEL_MAGICS: Final = {
    KERNEL_CLONE_MAGIC: KERNEL_CLONE,
    KERNEL_CACHE_MAGIC: KERNEL_CACHE,
}


def describe(head: memoryview) -> str:
    """Say in a few words what foreign content begins with."""
    kernel = _KERNEL_MAGICS.get(
        int.from_bytes(head[KERNEL_MAGIC_AT : KERNEL_MAGIC_AT + 8], "little")
    )
    if kernel:
        return kernel
    first = next(at for at, byte in enumerate(head) if byte)
    return f"{bytes(head[first : first + 8]).hex()} at byte {first}"
