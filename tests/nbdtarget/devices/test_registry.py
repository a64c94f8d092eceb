# SPDX-License-Identifier: Apache-2.0
"""The schemes of device names: what each promises, and that importing them is cheap."""

import subprocess
import sys

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.registry import SCHEMES, scheme_list
from nbdtarget.devices.scheme import Scheme
from tests.support.places import ROOT


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.syntax)
def test_syntax_begins_with_the_name_and_stands_in_the_list(scheme: Scheme) -> None:
    before, colon, _ = scheme.syntax.partition(":")
    assert scheme.name == (before if colon else "")
    assert scheme.name == scheme.name.lower()
    assert scheme.syntax in scheme_list()
    assert scheme.summary


def test_help_texts_need_neither_the_devices_nor_an_event_loop() -> None:
    # The command line imports the schemes for its help, also if it only prints a status.
    code = (
        "import sys, nbdtarget.devices.registry;"
        "print(*(name for name in sys.modules if name in sys.argv))"
    )
    heavy = ["asyncio", "nbdtarget.devices.base", "nbdtarget.devices.nbd.device"]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["memory:1M", "nbd://h/x", "nbd+unix:///x?socket=/s"])
async def test_only_files_can_be_created(name: str) -> None:
    scheme = SCHEMES[name.partition(":")[0]]
    assert not scheme.may_create(name)
    with pytest.raises(ResolveError, match="only a file"):
        await scheme.create(name, 4096, sparse=False)
