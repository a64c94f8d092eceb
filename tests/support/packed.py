# SPDX-License-Identifier: Apache-2.0
"""Images packed in every format that there is."""

import gzip
import lzma
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest

__all__ = ["PACKERS", "zstd_module"]


def zstd_module() -> Any:
    """The module for zstd; skips the test without one."""
    return pytest.importorskip("backports.zstd", reason="backports.zstd is missing")


@lru_cache(maxsize=16)
def _pack(name: str, data: bytes) -> bytes:
    """Packed once: most tests pack the same image."""
    match name:
        case "gzip":
            return gzip.compress(data, 1)
        case "xz":
            return lzma.compress(data, preset=0)
        case _:
            packed: bytes = zstd_module().compress(data)
            return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    name: partial(_pack, name) for name in ("gzip", "xz", "zstd")
}
