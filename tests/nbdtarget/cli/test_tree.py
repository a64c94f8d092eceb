# SPDX-License-Identifier: Apache-2.0
"""The tree of devices, held against what dmsetup draws for the same devices."""

import pytest

from nbdtarget.cli.tree import draw_tree
from nbdtarget.common.errors import NbdTargetError
from tests.support.command_line import line

DEVICES = [
    line("top", 3, deps=("/dev/mapper/b",)),
    line("a", 0, deps=("/srv/a",)),
    line("b", 1, uuid="UUID-B", open_count=1, deps=("/srv/b", "/srv/a")),
    line("n", 2),
]


def drawn(*options: str, utf: bool = False) -> str:
    return "\n".join(draw_tree(DEVICES, options, utf=utf)) + "\n"


def test_ascii() -> None:
    assert (
        drawn()
        == drawn("ascii", utf=True)
        == """\
a (253:0)
 `- (/srv/a)
n (253:2)
top (253:3)
 `-b (253:1)
    |- (/srv/b)
    `- (/srv/a)
"""
    )


def test_lines() -> None:
    assert (
        drawn(utf=True)
        == drawn("utf")
        == """\
a (253:0)
 └─ (/srv/a)
n (253:2)
top (253:3)
 └─b (253:1)
    ├─ (/srv/b)
    └─ (/srv/a)
"""
    )


def test_without_devices() -> None:
    assert drawn("nodevice") == "a\nn\ntop\n `-b\n"


def test_notes() -> None:
    assert (
        drawn("blkdevname", "uuid", "active", "open", "rw")
        == """\
a <dm-0> (253:0) [ACTIVE, RW, 0, ]
 `- (/srv/a)
n <dm-2> (253:2) [ACTIVE, RW, 0, ]
top <dm-3> (253:3) [ACTIVE, RW, 0, ]
 `-b <dm-1> (253:1) [ACTIVE, RW, 1, UUID-B]
    |- (/srv/b)
    `- (/srv/a)
"""
    )


def test_inverted() -> None:
    assert (
        drawn("inverted")
        == """\
 (/srv/a)
 |-a (253:0)
 `-b (253:1)
    `-top (253:3)
 (/srv/b)
 `-b (253:1)
    `-top (253:3)
n (253:2)
"""
    )


def test_deep_branches_keep_their_lines() -> None:
    devices = [
        line("t", 0, deps=("/dev/mapper/m1", "/dev/mapper/m2")),
        line("m1", 1, deps=("/x", "/y")),
        line("m2", 2, deps=("/z",)),
    ]
    assert "\n".join(draw_tree(devices, (), utf=False)) == (
        "t (253:0)\n |-m1 (253:1)\n |  |- (/x)\n |  `- (/y)\n `-m2 (253:2)\n    `- (/z)"
    )


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(NbdTargetError, match="Tree options not recognised: nosuch"):
        drawn("nosuch")
