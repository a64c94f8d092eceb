# SPDX-License-Identifier: Apache-2.0
"""A program that is missing is named with the package that has it."""

from pathlib import Path

import pytest

from nbdtarget.devices.helper.programs import missing


def test_program_that_is_there() -> None:
    assert missing("sh") == ""


@pytest.mark.parametrize(
    ("program", "package"),
    [("qemu-nbd", "qemu-utils"), ("qemu-img", "qemu-utils"), ("nbdkit", "nbdkit")],
)
def test_program_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, package: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"`apt install {package}'" in missing(program)


def test_program_of_which_nothing_is_known() -> None:
    assert missing("no-such-program") == "the program no-such-program is not there"
