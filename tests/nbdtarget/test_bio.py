# SPDX-License-Identifier: Apache-2.0
"""Bio: it ends once, owns what it keeps, and splits without losing a byte or an error."""

import errno

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, PENDING, Bio, split_bio


def payload_of(bio: Bio) -> bytes:
    assert bio.payload is not None
    return bytes(bio.payload)


def ended_into(log: list[Bio]) -> Bio:
    return Bio(OP_FLUSH, 0, 0, None, 0, log.append)


def test_end_calls_endio_with_the_bio() -> None:
    log: list[Bio] = []
    bio = ended_into(log)
    assert bio.status == PENDING
    bio.end(errno.EIO)
    assert log == [bio]
    assert bio.status == errno.EIO


def test_end_twice_is_our_bug() -> None:
    bio = ended_into([])
    bio.end(0)
    with pytest.raises(AssertionError):
        bio.end(0)


def test_hooks_run_last_in_first_out_before_endio() -> None:
    order: list[str] = []
    bio = Bio(OP_FLUSH, 0, 0, None, 0, lambda _: order.append("endio"))
    bio.on_end(lambda _: order.append("lower"))
    bio.on_end(lambda _: order.append("upper"))
    bio.end(0)
    assert order == ["upper", "lower", "endio"]


def test_own_copies_a_borrowed_write() -> None:
    buffer = bytearray(b"abcd")
    bio = Bio(OP_WRITE, 0, 4, memoryview(buffer), 0, lambda _: None, borrowed=True)
    bio.own()
    buffer[:] = b"XXXX"
    assert payload_of(bio) == b"abcd"
    assert not bio.borrowed


def test_own_gives_a_borrowed_read_a_buffer_of_its_own() -> None:
    buffer = bytearray(4)
    bio = Bio(OP_READ, 0, 4, memoryview(buffer), 0, lambda _: None, borrowed=True)
    bio.own()
    assert bio.payload is not None
    bio.payload[:] = b"abcd"
    assert buffer == bytes(4)


def test_own_leaves_what_is_owned() -> None:
    view = memoryview(b"abcd")
    bio = Bio(OP_WRITE, 0, 4, view, 0, lambda _: None)
    bio.own()
    assert bio.payload is view


@pytest.mark.parametrize("borrowed", [False, True])
def test_split_read_gathers_children_in_one_buffer(borrowed: bool) -> None:
    scratch = memoryview(bytearray(6))
    bio = Bio(OP_READ, 10, 6, scratch, 0, lambda _: None, borrowed=borrowed)
    first, second = split_bio(bio, [2, 4])
    assert (first.offset, second.offset) == (10, 12)
    assert first.payload is not None
    assert second.payload is not None
    second.own()
    second.payload[:] = b"cdef"
    second.end(0)
    assert bio.status == PENDING
    first.payload[:] = b"ab"
    first.end(0)
    assert payload_of(bio) == b"abcdef"
    assert bio.status == 0


def test_split_write_keeps_flags_and_borrowing() -> None:
    bio = Bio(OP_WRITE, 0, 4, memoryview(b"abcd"), FUA, lambda _: None, borrowed=True)
    first, second = split_bio(bio, [1, 3])
    assert first.flags == second.flags == FUA
    assert first.borrowed
    assert payload_of(second) == b"bcd"


def test_split_write_leaves_the_parent_nothing_to_own() -> None:
    # A server checks that a bio which did not end at once holds no borrowed memory.
    bio = Bio(OP_WRITE, 0, 4, memoryview(b"abcd"), FUA, lambda _: None, borrowed=True)
    split_bio(bio, [1, 3])
    assert not bio.borrowed
    assert bio.payload is None


def test_split_ends_with_the_first_error() -> None:
    bio = Bio(OP_READ, 0, 3, memoryview(bytearray(3)), 0, lambda _: None)
    children = split_bio(bio, [1, 1, 1])
    children[1].end(errno.EIO)
    children[0].end(errno.ENOSPC)
    assert bio.status == PENDING
    children[2].end(0)
    assert bio.status == errno.EIO
