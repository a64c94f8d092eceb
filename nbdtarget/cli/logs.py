# SPDX-License-Identifier: Apache-2.0
"""Logging of a process that serves: to whatever stderr is at the time."""

import logging
import sys

__all__ = ["start_logging"]


class _StderrHandler(logging.Handler):
    """Asks for `sys.stderr` each time: a progress bar puts its own there meanwhile."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def start_logging(*, verbose: bool) -> None:
    """Log warnings and errors, with `verbose` also what happens to devices."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("nbdtarget: %(message)s"))
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, handlers=[handler]
    )
