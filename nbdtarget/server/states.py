# SPDX-License-Identifier: Apache-2.0
"""The states of a connection; what they mean: `connection.py`."""

from typing import Final

__all__ = ["CLOSED", "DRAINING", "HANDSHAKE", "TRANSMISSION"]

HANDSHAKE: Final = 0
TRANSMISSION: Final = 1
DRAINING: Final = 2
CLOSED: Final = 3
