# SPDX-License-Identifier: Apache-2.0
"""Contents of a cache's metadata as values, and as the text of a dump."""

from array import array
from typing import Any

from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.load import Discarded
from nbdtarget_metadata.cache.records import LOGGED, VALID
from nbdtarget_metadata.cache.superblock import DIRTY_LOG, NO_POLICY, PolicyIdentity
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.tools.cache_dump import render_cache
from nbdtarget_metadata.tools.kinds import CACHE, parse_dump

__all__ = ["CONTENTS", "PLAIN", "UNCLEAN", "make_cache", "parsed", "text_of", "value"]


def value(oblock: int, *, logged: bool = False) -> int:
    return oblock << 16 | (LOGGED if logged else 0) | VALID


def make_cache(**fields: Any) -> CacheContent:
    content = CacheContent(
        uuid=bytes(range(16)),
        generation=7,
        flags=CLEAN_SHUTDOWN,
        compat=0,
        ro_compat=0,
        incompat=0,
        nr_commits=6,
        nr_compactions=1,
        block_size=65536,
        origin_size=100 * 65536 + 512,
        values=array("Q", [value(17), 0, value(99), value(3)]),
        dirty=bitarray("0010", "little"),
        policy=PolicyIdentity("smq", (2, 0, 0)),
        hints=array("I", [5, 0, 0, (1 << 32) - 1]),
        discarded=Discarded(131072, bitarray("0110", "little")),
        read_hits=1,
        read_misses=2,
        write_hits=3,
        write_misses=4,
    )
    return content._replace(**fields)


PLAIN = make_cache(
    policy=NO_POLICY, hints=None, discarded=None, dirty=bitarray("0010", "little")
)


def text_of(content: CacheContent) -> str:
    return "".join(render_cache(content))


def parsed(text: str, piece: int = 1 << 16) -> CacheContent:
    data = text.encode()
    pieces = (data[at : at + piece] for at in range(0, len(data), piece))
    kind, content = parse_dump(pieces)
    assert kind is CACHE
    assert isinstance(content, CacheContent)
    return content


UNCLEAN = make_cache(
    flags=0,
    policy=NO_POLICY,
    hints=None,
    discarded=None,
    dirty=bitarray("1011", "little"),
)
CONTENTS = {
    "small": make_cache(),
    "plain": PLAIN,
    "unclean": UNCLEAN,
    "empty": PLAIN._replace(values=array("Q", bytes(32)), dirty=zeros(4, "little")),
    "logged": PLAIN._replace(
        incompat=DIRTY_LOG,
        values=array(
            "Q", [value(17, logged=True), 0, value(99, logged=True), value(3)]
        ),
    ),
    "lost": UNCLEAN._replace(nr_lost=5, doubtful=bitarray("0001", "little")),
    "unknown": UNCLEAN._replace(nr_lost=None),
}
