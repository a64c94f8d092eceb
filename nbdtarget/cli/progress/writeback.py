# SPDX-License-Identifier: Apache-2.0
"""How far an offline writeback is: a bar on a terminal, else nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["make_progress"]


@contextmanager
def make_progress(*, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told how many bytes of how many are copied."""
    if quiet or not sys.stderr.isatty():
        yield _say_nothing
        return
    from nbdtarget.cli.progress.writeback_bar import WritebackBar  # rich: 30 ms

    bar = WritebackBar()
    try:
        yield bar.update
    finally:
        bar.stop()


def _say_nothing(done: int, total: int) -> None:
    """Whoever waits looks at the answer."""
