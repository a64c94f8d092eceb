# SPDX-License-Identifier: Apache-2.0
"""The constants that the compiled modules repeat from Python are the same there."""

import pytest

from nbdtarget.devices.file.pieces import WRITE_PIECE
from nbdtarget.fast import compiled

pytestmark = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=f"{compiled.describe()}"
)


def test_pieces_of_long_writes_are_as_long_as_those_of_python() -> None:
    """On ext4 they decide what small writes to the same place cost later."""
    from nbdtarget_fast import WRITE_PIECE_BYTES

    assert WRITE_PIECE_BYTES == WRITE_PIECE
