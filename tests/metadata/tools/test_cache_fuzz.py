# SPDX-License-Identifier: Apache-2.0
"""The offline tools over damaged and forged cache metadata, which fuzz_cache.py makes.

Whatever comes is refused in one line, or salvaged: what was salvaged can be dumped, read back, restored
without damage, and recorded as written back.
"""

from collections import Counter

import pytest

from nbdtarget_metadata.cache.content import read_cache_content
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.errors import MetadataError, UnsupportedFormat
from nbdtarget_metadata.tools.cache_check import CACHE_CHECKS
from nbdtarget_metadata.tools.cache_restore import record_written_back, restore_cache
from nbdtarget_metadata.tools.cache_salvage import salvage_cache
from nbdtarget_metadata.tools.check import examine
from tests.support.metadata import fuzz_cache
from tests.support.metadata.cache_dumps import parsed, text_of
from tests.support.metadata.store import Store, drive, read_image

CASES = 400
BITS_MAX = (1 << 64) - 1


def outcome(image: bytes) -> str:
    """Salvage an image, and do with that whatever the tools can do."""
    try:
        found = read_image(image, salvage_cache(len(image)))
    except MetadataError as error:
        return "refused" if "\n" not in str(error) else "refused in many words"
    content = found.content
    numbers = (content.compat, content.ro_compat, content.flags)
    if content.generation < 1 or not all(0 <= each <= BITS_MAX for each in numbers):
        return "out of range"  # opened, but for a dump
    assert parsed(text_of(content)) == content
    size = CacheMetadata.device_size_for(content.nr_cblocks)
    store = Store(size)
    try:
        drive(store, restore_cache(content, device_size=size))
    except UnsupportedFormat:
        assert content.ro_compat
        return "unknown features"
    assert drive(store, examine(CACHE_CHECKS, size)).damage == ()
    again = drive(store, read_cache_content(size))
    assert again == content._replace(nr_lost=0, doubtful=None)
    drive(store, record_written_back(size, again.dirty, disks=b""))
    assert drive(store, examine(CACHE_CHECKS, size)).damage == ()
    assert not drive(store, read_cache_content(size)).dirty.any()
    return "salvaged" if found.damage else "intact"


@pytest.mark.long
@pytest.mark.slow
def test_any_image_is_salvaged_into_metadata_that_are_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz_cache, "judge", outcome)
    found = Counter(fuzz_cache.fuzz_cache_image(seed) for seed in range(CASES))
    assert not found["refused in many words"]
    for each in ("refused", "salvaged", "intact"):
        assert found[each] > CASES // 10, found
