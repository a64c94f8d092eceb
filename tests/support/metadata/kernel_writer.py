# SPDX-License-Identifier: Apache-2.0
"""Writes metadata in the kernel's format, from its description alone: for shapes that are too large to
make with a kernel (deep trees), and for dm-clone, which Debian's kernels lack.

Nothing is shared with the reader: it has its own checksum, its own offsets, its own arrays.
"""

import struct
from collections.abc import Sequence

BLOCK = 4096
XOR = {
    "cache": 9031977,
    "clone": 257649492,
    "node": 121107,
    "array": 595846735,
}


def _remainder(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


REMAINDERS = [_remainder(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """Without a final inversion, as the kernel computes it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = REMAINDERS[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


class KernelWriter:
    """A metadata device that grows block by block; block 0 is the superblock's.

    Args:
        fanout: entries in each tree node: small ones make deep trees.
        per_block: values in each array block.
    """

    def __init__(self, *, fanout: int = 252, per_block: int | None = None) -> None:
        self.blocks: list[bytes] = [bytes(BLOCK)]
        self.fanout = fanout
        self.per_block = per_block

    def image(self) -> bytes:
        return b"".join(self.blocks)

    def seal(self, body: bytes, kind: str) -> bytes:
        """Put the checksum before `body`, which is the rest of the block."""
        body = body.ljust(BLOCK - 4, b"\0")
        return struct.pack("<I", crc32c(body) ^ XOR[kind]) + body

    def _append(self, make_body: bytes, kind: str) -> int:
        self.blocks.append(self.seal(make_body, kind))
        return len(self.blocks) - 1

    def array(self, values: Sequence[int], size: int) -> int:
        """Write an array of values of `size` bytes; return its root."""
        most = (BLOCK - 24) // size
        per_block = self.per_block or most
        letter = {4: "I", 8: "Q"}[size]
        locations = []
        for at in range(0, len(values), per_block):
            part = values[at : at + per_block]
            body = struct.pack("<IIIQ", most, len(part), size, len(self.blocks))
            body += struct.pack(f"<{len(part)}{letter}", *part)
            locations.append(self._append(body, "array"))
        return self._tree(list(enumerate(locations)), leaf=True)

    def bitset(self, bits: Sequence[bool]) -> int:
        words = [bits[at : at + 64] for at in range(0, len(bits), 64)]
        return self.array(
            [sum(1 << n for n, bit in enumerate(word) if bit) for word in words], 8
        )

    def _tree(self, entries: list[tuple[int, int]], *, leaf: bool) -> int:
        nodes = []
        for at in range(0, len(entries), self.fanout) or [0]:
            part = entries[at : at + self.fanout]
            keys = [key for key, _ in part]
            values = [value for _, value in part]
            body = struct.pack(
                "<IQIII4x", 2 if leaf else 1, len(self.blocks), len(part), 252, 8
            )
            body += struct.pack(f"<{len(keys)}Q", *keys).ljust(8 * 252, b"\0")
            body += struct.pack(f"<{len(values)}Q", *values)
            nodes.append((keys[0] if keys else 0, self._append(body, "node")))
        return nodes[0][1] if len(nodes) == 1 else self._tree(nodes, leaf=False)

    def clone_superblock(
        self,
        bits: Sequence[bool],
        *,
        region_sectors: int,
        target_sectors: int,
        version: int = 1,
    ) -> None:
        root = self.bitset(bits)
        body = struct.pack("<IQ16sQI", 0, 0, bytes(16), 0x8AF27F64, version)
        body += bytes(128)
        body += struct.pack("<QQQ", region_sectors, target_sectors, root)
        self.blocks[0] = self.seal(body, "clone")

    def cache_superblock(
        self,
        mappings: Sequence[int],
        *,
        flags: int = 1,
        version: int = 2,
        dirty: Sequence[bool] = (),
        hints: Sequence[int] = (),
        block_sectors: int = 64,
        policy: bytes = b"smq",
        incompat: int = 0,
        discards: Sequence[bool] = (),
    ) -> None:
        mapping_root = self.array(mappings, 8)
        hint_root = self.array(hints, 4) if hints else 0
        discard_root = self.bitset(discards)
        dirty_root = self.bitset(dirty) if dirty else 0
        body = struct.pack("<IQ16sQI", flags, 0, bytes(16), 0o6142003, version)
        body += policy.ljust(16, b"\0") + struct.pack("<I", 4) + bytes(128)
        body += struct.pack("<QQQ", mapping_root, hint_root, discard_root)
        body += struct.pack("<QQII", block_sectors, len(discards), block_sectors, 8)
        body += struct.pack("<IIII", len(mappings), 0, 0, incompat)
        body += struct.pack("<IIII", 1, 2, 3, 4)
        body += struct.pack("<III", 2, 0, 0) + struct.pack("<Q", dirty_root)
        self.blocks[0] = self.seal(body, "cache")
