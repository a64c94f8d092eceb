# SPDX-License-Identifier: Apache-2.0
"""The schemes that a device name may have, by name.

A new scheme is a module of its own and one line here: docs/extending.md.
"""

from typing import Final

from nbdtarget.devices.file.scheme import FileScheme
from nbdtarget.devices.memory_scheme import MemoryScheme
from nbdtarget.devices.nbd.scheme import NbdScheme, NbdUnixScheme
from nbdtarget.devices.scheme import Scheme

__all__ = ["SCHEMES", "scheme_list"]

SCHEMES: Final[dict[str, Scheme]] = {
    scheme.name: scheme
    for scheme in (
        FileScheme(),
        MemoryScheme(),
        NbdScheme(),
        NbdUnixScheme(),
    )
}


def scheme_list() -> str:
    """How device names are written, for help texts and errors."""
    *most, last = (scheme.syntax for scheme in SCHEMES.values())
    return f"{', '.join(most)} or {last}"
