# SPDX-License-Identifier: Apache-2.0
"""Images packed in every format that there is."""

import bz2
import gzip
import lzma
from typing import Any

import pytest

__all__ = ["PACKERS", "zstd_module"]


def zstd_module() -> Any:
    """The module for zstd; skips the test without one."""
    return pytest.importorskip("backports.zstd", reason="backports.zstd is missing")


PACKERS: dict[str, Any] = {
    "gzip": lambda data: gzip.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstd": lambda data: zstd_module().compress(data),
    "bzip2": lambda data: bz2.compress(data, 1),
}
