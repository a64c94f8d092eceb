# SPDX-License-Identifier: Apache-2.0
"""Whether the compiled fast path is there, and the names that it has.

The extension modules `nbdtarget_fast`, `nbdtarget_map`, `nbdtarget_ring`, `nbdtarget_sync`, `nbdtarget_copy` and `nbdtarget_tls` are built from the `.pyx` files beside this one, which tell what they
do, when a C compiler is at hand (`scripts/build_fast.py`). Where they are missing, or were built from another version
of the source, `IS_COMPILED` is false, no device offers a `Route`, and every request takes the way through
Python: slower, and otherwise the same. The environment variable NBDTARGET_PURE=1 asks for that.

Other modules import them from here, and nowhere else.
"""

import os
from typing import TYPE_CHECKING, Final

__all__ = [
    "ABI",
    "IS_COMPILED",
    "Copies",
    "CopyStream",
    "FastFile",
    "Plane",
    "Receiver",
    "Ring",
    "Route",
    "Syncer",
    "TlsRecords",
    "Windows",
    "batches_received",
    "describe",
    "describe_tls",
    "give_way",
    "is_available",
    "take_over",
    "write_pieces",
]

ABI: Final = 14  # the extension's must be the same; both change together

IS_COMPILED = False
_REASON = "the environment variable NBDTARGET_PURE is set"
if not os.environ.get("NBDTARGET_PURE"):
    try:
        import nbdtarget_copy
        import nbdtarget_fast
        import nbdtarget_map
        import nbdtarget_ring
        import nbdtarget_sync
        import nbdtarget_tls
    except (
        ImportError,
        AttributeError,
        TypeError,
        ValueError,
    ):  # the latter three: they do not fit each other
        _REASON = "it has not been built"
    else:
        IS_COMPILED = {
            m.ABI
            for m in (
                nbdtarget_copy,
                nbdtarget_fast,
                nbdtarget_map,
                nbdtarget_ring,
                nbdtarget_sync,
                nbdtarget_tls,
            )
        } == {ABI}
        _REASON = "it was built from another version"

if TYPE_CHECKING or IS_COMPILED:
    from nbdtarget_copy import Copies, CopyStream
    from nbdtarget_fast import (
        FastFile,
        Plane,
        Receiver,
        Route,
        batches_received,
        write_pieces,
    )
    from nbdtarget_map import Windows
    from nbdtarget_ring import Ring, is_available
    from nbdtarget_sync import Syncer, give_way
    from nbdtarget_tls import TlsRecords, take_over
else:

    class _NotBuilt:
        """Stands for the types of the extension where none of them is ever made."""

    Copies = CopyStream = FastFile = Plane = _NotBuilt
    Receiver = Ring = Route = Syncer = TlsRecords = Windows = _NotBuilt

    def is_available() -> bool:
        return False

    def batches_received() -> int:
        return 0

    def give_way(nice_step: int) -> None:
        """Threads of Python have their own way: see `nbdtarget.devices.background_threads`."""
        raise NotImplementedError  # callers look at IS_COMPILED first

    def take_over(*_: object) -> None:
        """Python's own way goes on."""

    def write_pieces(*_: object) -> tuple[int, int]:
        raise NotImplementedError  # callers look at IS_COMPILED first


def describe() -> str:
    """Return which path is in use, as `nbdtarget --version` says it."""
    if not IS_COMPILED:
        return f"fast path: none ({_REASON})"
    why_not = describe_tls()
    return f"fast path: compiled{f', TLS in Python ({why_not})' if why_not else ''}"


def describe_tls() -> str:
    """Return why TLS is not served by compiled code; "": it is."""
    return nbdtarget_tls.why_not() if IS_COMPILED else _REASON
