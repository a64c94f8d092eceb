# SPDX-License-Identifier: Apache-2.0
"""The picture is a picture, and one line says what is missing for it."""

import sys
from pathlib import Path

import pytest

from nbdtarget.advise.advice import Advice, Ratios
from nbdtarget.advise.picture import draw
from nbdtarget.common.errors import NbdTargetError

MIB = 1 << 20
ROWS = (
    Ratios(MIB, 0.2, 0.1, 0.4),
    Ratios(4 * MIB, 0.6, 0.5, 0.7),
    Ratios(8 * MIB, 0.6, 0.6, 0.7),
)
ADVICE = Advice("smq", 100, 50, 10, 8 * MIB, ROWS, 4 * MIB)


@pytest.mark.parametrize(
    ("name", "begin"), [("a.png", b"\x89PNG\r\n"), ("a.SVG", b"<?xml")]
)
def test_picture(tmp_path: Path, name: str, begin: bytes) -> None:
    pytest.importorskip("matplotlib")
    draw(ADVICE, "disk", tmp_path / name)
    drawn = (tmp_path / name).read_bytes()
    assert drawn.startswith(begin)
    assert len(drawn) > 5000


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NbdTargetError, match=r"is called .png or .svg"):
        draw(ADVICE, "disk", tmp_path / "a.gif")
    with pytest.raises(NbdTargetError, match="No such file or directory"):
        draw(ADVICE, "disk", tmp_path / "none" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NbdTargetError, match=r"pip install 'nbdtarget\[pictures\]'"):
        draw(ADVICE, "disk", tmp_path / "a.png")
