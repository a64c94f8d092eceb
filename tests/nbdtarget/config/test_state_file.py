# SPDX-License-Identifier: Apache-2.0
"""The file of a server's state: what is refused, and what a crash leaves at each moment of a replacement."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdtarget.config import state_file
from nbdtarget.config.file import DeviceConfig
from nbdtarget.config.state_file import (
    StateError,
    read_state,
    render_state,
    replace_file,
)
from nbdtarget.targets.registry import TARGET_TYPES

DEVICES = (
    DeviceConfig("a", "0 8 zero", (), uuid="U-1", rotational=True),
    DeviceConfig('odd "name"', "0 8 error\n8 8 zero", (), read_only=True),
    DeviceConfig("bare", "", ()),
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(render_state(DEVICES))
    config = read_state(str(path), TARGET_TYPES)
    found = {each.name: each for each in config.devices}
    assert found.keys() == {"a", 'odd "name"', "bare"}
    assert (found["a"].uuid, found["a"].rotational) == ("U-1", True)
    assert found['odd "name"'].read_only
    assert found['odd "name"'].table.split("\n")[:2] == ["0 8 error", "8 8 zero"]
    assert found["bare"].table == ""


def test_no_file_is_no_device(tmp_path: Path) -> None:
    assert read_state(str(tmp_path / "devices.toml"), TARGET_TYPES).devices == ()


def test_every_changed_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    whole = render_state(DEVICES).encode()
    # Of the first line only its beginning counts: it is for people.
    for at in (0, *range(whole.index(b"\n"), len(whole))):
        data = bytearray(whole)
        data[at] ^= 1
        path.write_bytes(data)
        try:
            config = read_state(str(path), TARGET_TYPES)
        except StateError:
            continue
        # A comment's words may change; nothing that counts may.
        assert [each.name for each in config.devices] == [each.name for each in DEVICES]
        assert at < whole.index(b"\n# ", 100), whole[at:]


@pytest.mark.parametrize("size", [0, 1, 50, 150, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "devices.toml"
    path.write_bytes(render_state(DEVICES).encode()[:size])
    with pytest.raises(StateError, match=f"{path}: it "):
        read_state(str(path), TARGET_TYPES)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("# format 1,", "# format 2,", "it has format 2, and this version knows 1"),
        ("0 8 zero", "0 9 zero", "it does not fit its checksum"),
    ],
)
def test_the_refusal_is_one_line_that_says_what_to_do(
    tmp_path: Path, old: str, new: str, reason: str
) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(render_state(DEVICES).replace(old, new, 1))
    before = path.read_bytes()
    with pytest.raises(StateError) as caught:
        read_state(str(path), TARGET_TYPES)
    (line,) = caught.value.lines()
    assert line.startswith(f"{path}: {reason}. ")
    assert "move it away" in line
    assert path.read_bytes() == before


def test_a_table_that_this_version_does_not_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(render_state([DeviceConfig("a", "0 8 newer", ())]))
    with pytest.raises(StateError, match="newer"):
        read_state(str(path), TARGET_TYPES)


class Disk:
    """Which contents `path` may have after a power cut, while a replacement runs.

    A file's bytes are safe from its fsync on, and a new name from the directory's fsync on. Before that each of them may be there
    or not.
    """

    def __init__(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.temporary = f"{path}.new"
        self.seen: list[set[str]] = []
        self._old = Path(path).read_text()
        self._flushed = "garbage"  # of the temporary file
        self._possible = {self._old}
        for module, name, after in (
            (os, "fsync", self._synced),
            (os, "rename", self._renamed),
            (state_file, "sync_directory", self._directory_synced),
        ):
            self._watch(monkeypatch, module, name, after)

    def _watch(
        self,
        monkeypatch: pytest.MonkeyPatch,
        module: Any,
        name: str,
        after: Callable[[], None],
    ) -> None:
        real = getattr(module, name)

        def call(*args: Any) -> None:
            self.seen.append(set(self._possible))  # the power goes before the call
            if name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode):
                real(*args)  # inside `sync_directory`, which is watched itself
                return
            real(*args)
            after()
            self.seen.append(set(self._possible))

        monkeypatch.setattr(module, name, call)

    def _synced(self) -> None:
        self._flushed = Path(self.temporary).read_text()

    def _renamed(self) -> None:
        self._possible.add(self._flushed)

    def _directory_synced(self) -> None:
        self._possible = {self._flushed}

    def end(self) -> set[str]:
        return self._possible


def test_a_crash_leaves_the_old_text_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "devices.toml"
    path.write_text("old")
    (tmp_path / "devices.toml.new").write_text("left behind by a crash, and longer")
    disk = Disk(str(path), monkeypatch)
    replace_file(str(path), "new")
    assert disk.seen
    assert set().union(*disk.seen) == {"old", "new"}
    assert disk.end() == {"new"}, "after the return only the new text is possible"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "tables may hold passwords"
    assert os.listdir(tmp_path) == ["devices.toml"]


def test_a_failure_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "devices.toml"
    path.write_text("old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(str(path), "new")
    assert path.read_text() == "old"
