# SPDX-License-Identifier: Apache-2.0
"""The decompressors: every format, every cut of the input, several members, padding, damage."""

import sys

import pytest

from nbdtarget.devices.packed import unpack as module
from nbdtarget.devices.packed.unpack import DamagedError, MissingPackageError, Unpacker
from tests.support.image_server import image_of
from tests.support.packed import PACKERS

DATA = image_of(60_000) + bytes(200_000) + image_of(5_000)


def unpacked(format_name: str, packed: bytes, *, step: int, length: int) -> bytes:
    unpacker = Unpacker(format_name)
    found = bytearray()
    at = 0
    while True:
        if unpacker.needs_input:
            if at >= len(packed):
                unpacker.finish()
                return bytes(found)
            unpacker.feed(packed[at : at + step])
            at += step
        piece = unpacker.take(length)
        assert len(piece) <= length
        found += piece


@pytest.mark.parametrize("format_name", PACKERS)
@pytest.mark.parametrize(
    ("step", "length"), [(977, 1 << 20), (1 << 20, 4099), (333, 50)]
)
def test_any_cut_of_input_and_output(format_name: str, step: int, length: int) -> None:
    packed = PACKERS[format_name](DATA)
    assert unpacked(format_name, packed, step=step, length=length) == DATA


@pytest.mark.parametrize("format_name", PACKERS)
@pytest.mark.parametrize("padding", [0, 512])
def test_members_one_after_the_other_and_zeroes_behind(
    format_name: str, padding: int
) -> None:
    pack = PACKERS[format_name]
    packed = pack(DATA) + pack(b"") + pack(b"end") + bytes(padding)
    for step in (1009, 1 << 20):
        assert unpacked(format_name, packed, step=step, length=8192) == DATA + b"end"


@pytest.mark.parametrize("format_name", PACKERS)
def test_damage_and_a_missing_end_are_noticed(format_name: str) -> None:
    packed = PACKERS[format_name](DATA)
    with pytest.raises(DamagedError, match="ends in the middle"):
        unpacked(format_name, packed[:-20], step=4096, length=8192)
    with pytest.raises(DamagedError, match=f"is no intact {format_name} file"):
        unpacked(format_name, packed + b"garbage" * 9, step=4096, length=8192)
    with pytest.raises(DamagedError, match=f"is no intact {format_name} file"):
        unpacked(format_name, b"x" * 5000, step=4096, length=8192)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    with pytest.raises(MissingPackageError, match=r"nbdtarget\[zstd\]"):
        Unpacker("zstd")
    assert set(module.FORMATS) == set(PACKERS)
