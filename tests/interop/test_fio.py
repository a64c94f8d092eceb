# SPDX-License-Identifier: Apache-2.0
"""fio writes random blocks at depth, then reads each back and checks its CRC."""

from pathlib import Path

import pytest

from tests.support.clients import CloneUnderTest, client, needs

pytestmark = [pytest.mark.interop, needs("fio")]


@pytest.mark.parametrize(
    ("block", "extra"),
    [
        ("4k-4k", ()),
        ("512-192k", ("--no-hydration",)),
        pytest.param("4k-4k", ("--no-hydration",), marks=pytest.mark.long),
        pytest.param("512-192k", (), marks=pytest.mark.long),
    ],
    ids=["4k-hydrating", "unaligned-not", "4k-not", "unaligned-hydrating"],
)
def test_fio_verifies_what_it_wrote(
    clone: CloneUnderTest, tmp_path: Path, block: str, extra: tuple[str, ...]
) -> None:
    with clone.serve(*extra):
        client(
            *["fio", "--name=verify", "--ioengine=nbd", f"--uri={clone.uri}"],
            *["--rw=randwrite", f"--bsrange={block}", "--bs_unaligned=0"],
            *["--iodepth=32", "--randseed=5", "--verify=crc32c", "--do_verify=1"],
            *["--verify_fatal=1", "--fsync=50", f"--aux-path={tmp_path}"],
        )
