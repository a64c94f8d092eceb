# SPDX-License-Identifier: Apache-2.0
"""The event loop of a server process."""

import gc

from nbdtarget.daemon import process


def test_full_collections_leave_out_what_was_imported() -> None:
    # Else each of them stops the loop for milliseconds.
    frozen: list[int] = []

    async def main() -> None:
        frozen.append(gc.get_freeze_count())

    process.run(main)
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() < frozen[0]
