# SPDX-License-Identifier: Apache-2.0
"""The chunks of one reply, for servers that the tests play: with structured replies or with extended headers."""

from nbdtarget_protocol import consts as c
from nbdtarget_protocol import extended as ext
from nbdtarget_protocol.client import Completion
from nbdtarget_protocol.transmission import (
    block_status,
    error_chunk,
    none_chunk,
    offset_data_header,
    offset_hole,
)

__all__ = ["Chunks"]


class Chunks:
    """The chunks of one reply, with structured replies or with extended headers."""

    def __init__(self, asked: Completion, how: str) -> None:
        self._key = asked.cookie, asked.offset
        self._is_extended = how == "extended"

    def error(self, message: bytes) -> bytes:
        if self._is_extended:
            return ext.error_chunk(*self._key, c.EIO, message)
        return error_chunk(self._key[0], c.EIO, message)

    def none(self) -> bytes:
        if self._is_extended:
            return ext.none_chunk(*self._key)
        return none_chunk(self._key[0])

    def data(self, offset: int, length: int, *, done: bool) -> bytes:
        if self._is_extended:
            return ext.offset_data_header(*self._key, offset, length, done)
        return offset_data_header(self._key[0], offset, length, done)

    def hole(self, offset: int, length: int, *, done: bool) -> bytes:
        if self._is_extended:
            return ext.offset_hole(*self._key, offset, length, done)
        return offset_hole(self._key[0], offset, length, done)

    def status(self, extents: list[tuple[int, int]]) -> bytes:
        if self._is_extended:
            return ext.block_status(*self._key, 0, extents, done=True)
        return block_status(self._key[0], 0, extents, done=True)
