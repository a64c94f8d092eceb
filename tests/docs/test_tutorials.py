# SPDX-License-Identifier: Apache-2.0
"""The commands of the tutorials print what the pages show."""

import shutil
from pathlib import Path

import pytest

from tests.support.clients import needs
from tests.support.reference_pages import DOCS
from tests.support.tutorials import Difference, blocks_of, run_page

TUTORIALS = DOCS / "tutorial"
HOW_TO = DOCS / "how-to"

# The how-to pages assume a running server with a disk called `web`.
WITH_WEB = """
<!-- run: server -->
```console
$ nbdtarget serve
…
```

```console
$ truncate -s 16M /srv/DISK
$ until nbdtarget create web --table '0 32768 linear /srv/DISK 0' 2>/dev/null; do sleep 0.05; done
```
"""

pytestmark = [pytest.mark.interop, pytest.mark.long, needs("bash", "qemu-io")]


@needs("nbdinfo", "mkfs.ext4")
def test_first_clone(tmp_path: Path) -> None:
    run_page((TUTORIALS / "first-clone.md").read_text(), tmp_path)
    # The page ends with the destination alone.
    assert not (tmp_path / "source.img").exists()
    assert (tmp_path / "disk.img").stat().st_size == 64 << 20


@needs("nbdinfo")
def test_first_cache(tmp_path: Path) -> None:
    run_page((TUTORIALS / "first-cache.md").read_text(), tmp_path)
    assert (tmp_path / "slow.img").read_bytes()[: 4 << 20] == bytes([7]) * (4 << 20)


@needs("nbdcopy")
def test_power_cuts(tmp_path: Path) -> None:
    run_page((TUTORIALS / "power-cuts.md").read_text(), tmp_path)
    disk = (tmp_path / "disk.img").read_bytes()
    assert disk[1 << 20 :][:4096] == b"\1" * 4096
    # The page ends with a torn write: some of it is there.
    assert 0 < disk[: 64 << 10].count(b"not flushed") < (64 << 10) // 12


def test_how_to_move_a_disk(tmp_path: Path) -> None:
    page = (HOW_TO / "move-a-disk.md").read_text()
    told = "$ nbdtarget table web\n0 32768 linear /srv/new.img 0\n"
    waiting = "$ until nbdtarget table web | grep linear; do sleep 0.05; done\n"
    assert told in page
    page = page.replace(told, waiting + told.partition("\n")[2])
    run_page(WITH_WEB.replace("DISK", "old.img") + page, tmp_path)
    assert (tmp_path / "new.img").read_bytes() == bytes(16 << 20)


@needs("nbdinfo")
def test_how_to_resize_a_disk(tmp_path: Path) -> None:
    page = (HOW_TO / "resize.md").read_text()
    run_page(WITH_WEB.replace("DISK", "web.img") + page, tmp_path)


@pytest.mark.parametrize(
    "shown", ["two\n", "one\nthree\n", "", "one\ntwo\nthree\n", "…\none\n"]
)
def test_page_that_shows_something_else_is_refused(tmp_path: Path, shown: str) -> None:
    page = f"```console\n$ printf 'one\\ntwo\\n'\n{shown}```\n"
    with pytest.raises(Difference):
        run_page(page, tmp_path)


@pytest.mark.parametrize(
    "shown", ["one\ntwo\n", "…\n", "o…\n…\n", "…\ntwo\n", "…e\ntwo\n…\n"]
)
def test_page_that_shows_what_is_printed_is_taken(tmp_path: Path, shown: str) -> None:
    run_page(f"```console\n$ printf 'one\\ntwo\\n'\n{shown}```\n", tmp_path)


def test_every_page_of_the_tutorials_with_commands_is_run_or_says_that_it_is_not() -> (
    None
):
    assert shutil.which("bash")
    run = {"first-clone", "first-cache", "power-cuts"}
    for path in sorted(TUTORIALS.glob("*.md")):
        hows = {block.how for block in blocks_of(path.read_text())}
        assert path.stem in run or hows <= {"no"}, path
