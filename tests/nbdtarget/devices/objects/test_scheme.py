# SPDX-License-Identifier: Apache-2.0
"""URLs of objects as names of devices. What all remote images have in common: ../ranged/test_scheme.py."""

from nbdtarget.devices.resolve import identity


def test_identity() -> None:
    assert identity("s3://b") == "s3://b"  # it names no object
    assert identity("s3://b/a%20b") == identity("s3://b/a b#region=x")
    assert identity("s3://b/k") != identity("s3://b/k#version=2")
