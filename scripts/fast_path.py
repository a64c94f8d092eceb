# SPDX-License-Identifier: Apache-2.0
"""Says when a measurement runs without the compiled fast path: its figures then compare Python with C.

That may be meant (NBDTARGET_PURE=1, no compiler), or the extension modules are older than the source: `make run` builds them anew.
"""

import sys

from nbdtarget.fast import compiled

__all__ = ["warn_if_pure"]


def warn_if_pure() -> None:
    """Print one line to standard error, unless the compiled path is in use."""
    if not compiled.IS_COMPILED:
        print(f"measured without compiled code: {compiled.describe()}", file=sys.stderr)
