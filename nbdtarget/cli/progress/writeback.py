# SPDX-License-Identifier: Apache-2.0
"""How far an offline writeback is: a bar on a terminal, else nothing, as its answer tells all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from nbdtarget.cli.progress.common import Nowhere, open_display

__all__ = ["make_progress"]


@contextmanager
def make_progress(*, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told how many bytes of how many are copied."""
    shown = (
        nullcontext(Nowhere()) if quiet else open_display("writing back", period_s=None)
    )
    with shown as display:
        yield partial(display.show, "")
