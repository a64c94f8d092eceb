# SPDX-License-Identifier: Apache-2.0
"""Metadata that kernels wrote: where it lies, and what is known of it."""

from tests.support.places import ROOT

__all__ = ["CACHED", "DIRTY", "FOLDER", "MADE"]

FOLDER = ROOT / "tests" / "metadata" / "kernel_metadata"
MADE = sorted(path.stem for path in FOLDER.glob("*.gz"))
CACHED = {3, 7, 11, 200, 201, 202, 300}
DIRTY = {7, 201, 300}
