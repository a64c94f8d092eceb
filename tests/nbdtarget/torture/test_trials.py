# SPDX-License-Identifier: Apache-2.0
"""The disk of a trial is the base, the epochs before the cut, and what survives of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.torture.cuts import Cut, keep_all
from nbdtarget.torture.recording import Epoch, Recording, RecordingFiles, Write
from nbdtarget.torture.trials import ACKNOWLEDGED, Trials, copy_sparse

S = 512
# The data of write N is the letter N. Write 3 is a discard.
EPOCHS = [
    Epoch(1, (Write(1, 0, 2, 0), Write(2, 1, 2, 2 * S)), 0),
    Epoch(2, (Write(3, 0, 1, None), Write(4, 6, 2, 4 * S)), 1),
]
CHECK = f'echo checked; cat "${ACKNOWLEDGED}"; test -e fine'


@pytest.fixture
def trials(tmp_path: Path) -> Iterator[Trials]:
    files = RecordingFiles(tmp_path)
    files.base.write_bytes(b"." * 8 * S)
    files.log.write_bytes(b"1" * 2 * S + b"2" * 2 * S + b"4" * 2 * S)
    recording = Recording(8 * S, "ext4", ("true",), CHECK, ("one", "two"))
    work = tmp_path / "work"
    work.mkdir()
    trials = Trials(files, recording, EPOCHS, work, check_timeout_s=30)
    yield trials
    trials.close()


def made(trials: Trials, cut: Cut, image: Path) -> str:
    trials.make_image(cut, image)
    data = image.read_bytes()
    assert all(len(set(data[at : at + S])) == 1 for at in range(0, len(data), S))
    return data[::S].decode().replace("\0", "0")


def test_disks_are_made_in_any_order(trials: Trials, tmp_path: Path) -> None:
    image = tmp_path / "image"
    for cut, disk in [
        (Cut.of(1, "", {}), "........"),
        (Cut.of(1, "", {0: 1, 2: 2}), "1.2....."),
        (Cut.of(1, "", keep_all(EPOCHS[0])), "122....."),
        (Cut.of(2, "", {}), "122....."),
        (Cut.of(2, "", {7: 4}), "122....4"),
        (Cut.of(2, "", {0: 3}), "022....."),
        (Cut.of(1, "", {1: 1}), ".1......"),
        (Cut.of(2, "", keep_all(EPOCHS[1])), "022...44"),
    ]:
        assert made(trials, cut, image) == disk
    with pytest.raises(NbdTargetError, match="flush 3: the recording has 2"):
        trials.make_image(Cut.of(3, "", {}), image)


def test_disk_that_cannot_be_mounted_is_a_failed_trial(trials: Trials) -> None:
    outcome = trials.run(Cut.of(1, "", {}))
    assert outcome.reason.startswith("the file system cannot be mounted: mount: ")
    assert not outcome.has_passed


def test_check_sees_what_was_acknowledged(trials: Trials, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("one\n")
    outcome = trials._check(tmp_path, lines)
    assert outcome.reason == "the check ended with status 1"
    assert outcome.output == "checked\none\n"
    (tmp_path / "fine").touch()
    assert trials._check(tmp_path, lines).has_passed


def test_copy_has_the_data_and_the_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(64 << 20)
        os.pwrite(file.fileno(), b"data", 5 << 20)
    target.write_bytes(b"old" * 1000)
    copy_sparse(source, target)
    assert target.stat().st_size == 64 << 20
    assert target.stat().st_blocks * S < 1 << 20
    with target.open("rb") as file:
        assert file.read(3) == bytes(3)
        assert os.pread(file.fileno(), 4, 5 << 20) == b"data"
