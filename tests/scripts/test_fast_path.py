# SPDX-License-Identifier: Apache-2.0
"""A measurement says when it runs without compiled code, and only then."""

import pytest

from nbdtarget.fast import compiled
from scripts.fast_path import warn_if_pure


@pytest.mark.parametrize("is_compiled", [False, True], ids=["pure", "compiled"])
def test_measurement_without_compiled_code_says_so(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_compiled: bool,
) -> None:
    monkeypatch.setattr(compiled, "IS_COMPILED", is_compiled)
    warn_if_pure()
    told = capsys.readouterr().err
    assert ("measured without compiled code: fast path: none" in told) != is_compiled
