# SPDX-License-Identifier: Apache-2.0
"""Which parts of a READ have come, in any order."""

import itertools

import pytest

from nbdtarget_protocol import completion as it
from nbdtarget_protocol.completion import Completion, add_span, check_extents
from nbdtarget_protocol.consts import CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, CMD_READ
from nbdtarget_protocol.errors import ReplyError


def read(first: tuple[int, int]) -> Completion:
    request = Completion(CMD_READ, 0, 1, 0, 100, None, None)
    request.spans = list(first)
    return request


@pytest.mark.parametrize(
    "spans", [*itertools.permutations([(0, 10), (10, 20), (20, 50), (90, 100)])]
)
def test_spans_that_touch_become_one(spans: tuple[tuple[int, int], ...]) -> None:
    request = read(spans[0])
    for span in spans[1:]:
        add_span(request, *span)
    assert request.spans == [0, 50, 90, 100]


@pytest.mark.parametrize("span", [(10, 20), (5, 11), (19, 30), (0, 30), (12, 13)])
def test_spans_that_overlap(span: tuple[int, int]) -> None:
    with pytest.raises(ReplyError, match="overlapping"):
        add_span(read((10, 20)), *span)


def test_too_many_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(it, "SPANS_MAX", 2)
    request = read((0, 1))
    add_span(request, 2, 3)
    with pytest.raises(ReplyError, match="too many"):
        add_span(request, 4, 5)


def test_extents_are_cut_at_the_end() -> None:
    request = Completion(CMD_BLOCK_STATUS, 0, 1, 0, 100, None, None)
    extents = [(60, 1), (1 << 40, 0)]
    check_extents(request, extents)
    assert extents == [(60, 1), (40, 0)]
    request.flags = CMD_FLAG_REQ_ONE
    with pytest.raises(ReplyError, match="REQ_ONE"):
        check_extents(request, [(101, 0)])
