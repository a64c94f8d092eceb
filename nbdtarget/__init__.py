# SPDX-License-Identifier: Apache-2.0
"""nbdtarget: device-mapper's clone and cache as NBD exports, in user space.

The names of `__all__` are the Python API; docs/how-to/python.md and docs/reference/python.md describe it. Each is imported
when it is first used, so that `import nbdtarget` is as quick as that of an empty module.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "BlockingDisk": "nbdtarget.api.blocking",
    "BlockingServer": "nbdtarget.api.blocking",
    "Disk": "nbdtarget.api.disk",
    "DiskStatus": "nbdtarget.api.disk",
    "NbdClient": "nbdtarget.api.nbd_client",
    "NbdError": "nbdtarget.api.nbd_client",
    "NbdTargetError": "nbdtarget.common.errors",
    "NoServerError": "nbdtarget.control.client",
    "PowerCut": "nbdtarget.api.disk",
    "Server": "nbdtarget.api.server",
    "TableError": "nbdtarget.common.errors",
    "TargetStatus": "nbdtarget.api.disk",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'nbdtarget' has no attribute {name!r}") from None
    found: object = getattr(importlib.import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
