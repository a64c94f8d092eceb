# SPDX-License-Identifier: Apache-2.0
"""Whether the origin has anything that no flush of ours has covered yet.

An idle cache whose origin has gone away has lost nothing if the last flush came after the last
write. Then it can be stopped cleanly, and its FLUSH succeeds. To know that, writes to the origin are
counted as they are sent. A flush covers what was counted when it began, but only if no write was under way at
that moment: otherwise the count does not say which of them had ended.

The writes of the table before this one are not known here, so something counts as unflushed until
the first flush has ended well. A DISCARD is not counted, because it promises nothing.
"""

from collections.abc import Callable

__all__ = ["OriginWrites"]


class OriginWrites:
    """See the module head.

    Args:
        is_quiet: whether no write to the origin is under way that was counted only once.

    Attributes:
        nr_sent: add one for each write before it is sent, if `is_quiet` knows of it while it is under
            way; otherwise one before and one after it. For a copy, which counts only if it ends well, one is
            enough when it has ended.
    """

    def __init__(self, is_quiet: Callable[[], bool]) -> None:
        self.nr_sent = 1
        self._nr_covered = 0
        self._is_quiet = is_quiet

    @property
    def has_any(self) -> bool:
        """Whether anything was written since the last flush that covered all of it."""
        return self.nr_sent != self._nr_covered

    def begin_flush(self) -> int:
        """A flush begins; returns what it will have covered, for `end_flush`."""
        return self.nr_sent if self._is_quiet() else self._nr_covered

    def end_flush(self, begun: object) -> None:
        """That flush has ended well."""
        assert isinstance(begun, int)
        self._nr_covered = max(self._nr_covered, begun)
