# SPDX-License-Identifier: Apache-2.0
"""The schemes that a device name may have, by name.

A new scheme is a module of its own and one line here: docs/extending.md.
"""

from operator import attrgetter
from typing import Final

from nbdtarget.common.named import by_name
from nbdtarget.devices.file.direct_scheme import DirectScheme
from nbdtarget.devices.file.scheme import FileScheme
from nbdtarget.devices.helper.scheme import (
    HelperScheme,
    NbdkitScheme,
    QemuScheme,
    RbdScheme,
)
from nbdtarget.devices.http.scheme import HttpScheme, HttpsScheme
from nbdtarget.devices.memory_scheme import MemoryScheme
from nbdtarget.devices.nbd.scheme import (
    NbdScheme,
    NbdsScheme,
    NbdsUnixScheme,
    NbdsVsockScheme,
    NbdUnixScheme,
    NbdVsockScheme,
)
from nbdtarget.devices.objects.scheme import AzureScheme, GcsScheme, S3Scheme
from nbdtarget.devices.packed.scheme import GzipScheme, XzScheme, ZstdScheme
from nbdtarget.devices.raw_scheme import RawScheme
from nbdtarget.devices.scheme import Scheme, syntaxes

__all__ = ["SCHEMES", "scheme_list"]

# These are files, in which an image in another format may lie.
_REMOTE: Final[dict[str, Scheme]] = by_name(
    (HttpScheme(), HttpsScheme(), S3Scheme(), GcsScheme(), AzureScheme()),
    attrgetter("name"),
)

_OF_DISKS: Final[dict[str, Scheme]] = by_name(
    (
        FileScheme(),
        DirectScheme(),
        MemoryScheme(),
        NbdScheme(),
        NbdUnixScheme(),
        NbdVsockScheme(),
        NbdsScheme(),
        NbdsUnixScheme(),
        NbdsVsockScheme(),
        *_REMOTE.values(),
        QemuScheme(_REMOTE),
        RbdScheme(),
        NbdkitScheme(),
        HelperScheme(),
    ),
    attrgetter("name"),
)

# These stand before a name of any of them.
_BEFORE_NAMES: Final[dict[str, Scheme]] = by_name(
    (
        RawScheme(_OF_DISKS),
        GzipScheme(_OF_DISKS),
        XzScheme(_OF_DISKS),
        ZstdScheme(_OF_DISKS),
    ),
    attrgetter("name"),
)

SCHEMES: Final[dict[str, Scheme]] = {**_OF_DISKS, **_BEFORE_NAMES}


def scheme_list() -> str:
    """Return how device names are written, for help texts and errors."""
    return syntaxes(SCHEMES)
