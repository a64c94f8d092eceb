# SPDX-License-Identifier: Apache-2.0
"""A whole run: a program that syncs passes, one that does not is caught, and its case can be replayed."""

from pathlib import Path

import msgspec
import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.testing.attached import why_not
from nbdtarget.torture.mounts import why_no_mounts
from nbdtarget.torture.session import TortureOptions, replay, torture
from nbdtarget.torture.trials import ACKNOWLEDGED

reason = why_no_mounts("ext4") or (why_not("kernel") and why_not("nbdfuse"))
needs_mounts = pytest.mark.skipif(bool(reason), reason=reason)

CHECK = f'for each in $(cat "${ACKNOWLEDGED}"); do test -s $each || {{ echo $each is lost; exit 1; }}; done'
SYNCED = "for each in a b c; do echo data > $each; sync; echo $each; done"
FORGOTTEN = "for each in a b c; do echo data > $each; echo $each; done; sync"


def options(command: str, **changes: object) -> TortureOptions:
    plain = TortureOptions(
        command=("/bin/sh", "-c", command), check=CHECK, size=8 << 20, nr_cuts=6
    )
    return msgspec.structs.replace(plain, **changes)


@needs_mounts
def test_program_that_syncs_passes_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: list[str] = []
    result = torture(options(SYNCED), said.append)
    assert result.failure is None
    assert result.nr_lines == 3
    assert result.nr_tried >= 4
    assert said[0].endswith("and 3 lines")
    assert list(tmp_path.iterdir()) == []


@needs_mounts
def test_program_that_forgets_to_sync_is_caught_and_replayed(tmp_path: Path) -> None:
    output = tmp_path / "record"
    result = torture(options(FORGOTTEN, output=str(output)), lambda _: None)
    failure = result.failure
    assert failure is not None
    assert failure.outcome.output.endswith("is lost\n")
    assert failure.nr_lines > 0
    assert failure.case == output / "case-1.json"
    assert failure.lost
    recording, cut, outcome = replay(failure.case, None, 30)
    assert cut == failure.cut
    assert outcome == failure.outcome
    image = tmp_path / "image"
    assert replay(failure.case, image, 30)[2] is None
    assert image.stat().st_size == recording.size
    with pytest.raises(NbdTargetError, match="exists already"):
        replay(failure.case, image, 30)


@needs_mounts
def test_check_that_always_fails_says_nothing_about_power_cuts() -> None:
    with pytest.raises(NbdTargetError, match=r"fails although nothing was lost: .*no"):
        torture(options("true", check="echo no; exit 1"), lambda _: None)


@needs_mounts
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 4096}, "size 4096: must be"),
        ({"nr_cuts": 0}, "0 cuts: must be 1 or more"),
        ({"every": -1}, "must be 0 or more"),
        ({"tear_size": 1024}, "must be 512 or 4096"),
        ({"file_system": "fat"}, "file system 'fat'"),
        ({"output": "/"}, "/: File exists"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(NbdTargetError, match=said):
        torture(options("true", **changes), lambda _: None)


def test_case_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NbdTargetError, match=r"recording\.json: No such file"):
        replay(tmp_path / "case-1.json", None, 1)
