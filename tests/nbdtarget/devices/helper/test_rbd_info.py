# SPDX-License-Identifier: Apache-2.0
"""Facts about an image from a program in the place of `rbd`, which answers as Ceph 16 does. `make ceph-test` uses a real Ceph."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper.rbd_info import RbdState, look_at_rbd
from nbdtarget.devices.helper.rbd_name import RbdImage

IMAGE = RbdImage("p", "", "i", "")
SNAPSHOT = RbdImage("p", "", "i", "two")
INFO = {"name": "i", "id": "100f", "modify_timestamp": "Mon Nov 30 22:09:10 2026"}
SNAPSHOTS = [{"id": 4, "name": "one"}, {"id": 5, "name": "two"}]
LOCKS = [{"id": "auto 1", "locker": "client.4135", "address": "127.0.0.1:0/3"}]


def answer(work: Path, monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    """Make a program `rbd` that answers; what has no answer fails."""
    for name, told in answers.items():
        (work / name).write_text(json.dumps(told))
    program = work / "rbd"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {work}/asked\n'
        f"cat {work}/$1 2>/dev/null && exit; echo 'rbd: error opening image i: (2) No such file or directory' >&2; exit 2\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{work}:{os.environ['PATH']}")


async def test_image_and_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(tmp_path, monkeypatch, info=INFO, snap=SNAPSHOTS, lock=[])
    assert await look_at_rbd("d", SNAPSHOT) == RbdState("100f", "5")
    written = datetime(2026, 11, 30, 22, 9, 10).timestamp()
    assert await look_at_rbd("d", IMAGE) == RbdState("100f", "", int(written) * 10**9)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(asked) == [
        "info --format json --pool p --image i",
        "info --format json --pool p --image i",
        "lock ls --format json --pool p --image i",
        "snap ls --format json --pool p --image i",
    ]


@pytest.mark.parametrize(
    ("image", "answers", "reason"),
    [
        (IMAGE, {}, "No such file"),
        (IMAGE, {"info": INFO, "lock": LOCKS}, "make a snapshot .*rbd:p/i@NAME"),
        (IMAGE, {"info": {}, "lock": []}, "did not tell the id"),
        (IMAGE, {"info": [], "lock": []}, "did not tell the id"),
        (SNAPSHOT, {"info": INFO, "snap": SNAPSHOTS[:1]}, "no snapshot two"),
        (SNAPSHOT, {"info": INFO, "snap": "?"}, "no snapshot two"),
    ],
    ids=["missing", "written-to", "no-id", "no-object", "no-snapshot", "odd"],
)
async def test_what_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image: RbdImage,
    answers: dict[str, Any],
    reason: str,
) -> None:
    answer(tmp_path, monkeypatch, **answers)
    with pytest.raises(ResolveError, match=reason) as caught:
        await look_at_rbd("d", image)
    assert "\n" not in str(caught.value)


async def test_release_that_tells_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(tmp_path, monkeypatch, info={"id": "1"}, lock=[])
    assert (await look_at_rbd("d", IMAGE)).mtime_ns == 0
