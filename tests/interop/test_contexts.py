# SPDX-License-Identifier: Apache-2.0
"""Several metadata contexts on one connection, asked for through libnbd.

Its tools select one at a time, so the library is called itself.
"""

import ctypes
import ctypes.util

import pytest

from tests.support.clients import CloneUnderTest, client, needs
from tests.support.processes import ServerProcess

LIBRARY = ctypes.util.find_library("nbd")

pytestmark = [
    pytest.mark.interop,
    needs("qemu-io"),
    pytest.mark.skipif(LIBRARY is None, reason="not installed: libnbd"),
]

BASE, HYDRATION = "base:allocation", "x-nbdtarget:hydration"
REQ_ONE = 8
MIB = 1 << 20

Told = dict[str, list[tuple[int, int]]]

_EXTENT = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_int),
)


class _ExtentCallback(ctypes.Structure):
    _fields_ = (
        ("callback", _EXTENT),
        ("user_data", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
    )


class Nbd:
    """A libnbd handle, as much of it as these tests need."""

    def __init__(self, uri: str, *contexts: str) -> None:
        library = self.library = ctypes.CDLL(LIBRARY)
        library.nbd_create.restype = ctypes.c_void_p
        library.nbd_get_error.restype = ctypes.c_char_p
        self.handle = ctypes.c_void_p(library.nbd_create())
        for context in contexts:
            self.check(library.nbd_add_meta_context(self.handle, context.encode()))
        self.check(library.nbd_connect_uri(self.handle, uri.encode()))

    def check(self, status: int) -> int:
        assert status >= 0, self.library.nbd_get_error()
        return status

    def can(self, context: str) -> bool:
        able = self.library.nbd_can_meta_context(self.handle, context.encode())
        return bool(self.check(able))

    def block_status(self, offset: int, length: int, flags: int = 0) -> Told:
        """Return the extents of each context: (bytes, flags)."""
        told: Told = {}

        def extent(
            _data: int, name: bytes, at: int, numbers: list[int], nr: int, _error: int
        ) -> int:
            assert at == offset
            pairs = [(numbers[i], numbers[i + 1]) for i in range(0, nr, 2)]
            told[name.decode()] = pairs
            return 0

        self.check(
            self.library.nbd_block_status(
                self.handle,
                ctypes.c_uint64(length),
                ctypes.c_uint64(offset),
                _ExtentCallback(_EXTENT(extent), None, None),
                ctypes.c_uint32(flags),
            )
        )
        return told

    def close(self) -> None:
        self.check(self.library.nbd_shutdown(self.handle, 0))
        self.library.nbd_close(self.handle)


def test_two_contexts_are_told_in_one_reply(
    clone: CloneUnderTest, served_unhydrated: ServerProcess
) -> None:
    client("qemu-io", "--format", "raw", "-c", "write 1M 128k", clone.uri)
    nbd = Nbd(clone.uri, HYDRATION, "x-nbdtarget:nobody", BASE)
    assert nbd.can(BASE)
    assert nbd.can(HYDRATION)
    assert not nbd.can("x-nbdtarget:nobody")
    assert nbd.block_status(MIB, 2 * MIB) == {
        BASE: [(MIB, 0), (MIB, 3)],
        HYDRATION: [(128 << 10, 0), (2 * MIB - (128 << 10), 1)],
    }
    assert nbd.block_status(MIB, 2 * MIB, REQ_ONE) == {
        BASE: [(MIB, 0)],
        HYDRATION: [(128 << 10, 0)],
    }
    nbd.close()
