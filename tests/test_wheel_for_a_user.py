# SPDX-License-Identifier: Apache-2.0
"""The wheel, used by a developer without root: the ten lines of pytest find the planted bug, and pass when it is mended.

Everything is done by a user who may do nothing: the environment, the installation, the disks. Root becomes `nobody` for that; another user is
one already.
"""

import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.testing.attached import why_not
from tests.support.places import ROOT
from tests.support.pytest_page import BUG, MENDED

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(why_not("nbdfuse")), reason=why_not("nbdfuse")),
]

USER = "nobody"
# Anybody may open /dev/fuse where udev has made it. Where it has not, as in containers, that is so for this command alone.
BECOME = """
mkdir -p dev
mount -t tmpfs dev dev
mknod -m 666 dev/fuse c 10 229
mount --bind dev/fuse /dev/fuse
exec setpriv --reuid "$0" --regid "$(id -g "$0")" --clear-groups "$@"
"""
SECONDS_MAX = 600  # of one step, on a busy machine
# The interpreter of this run may lie in root's home.
PYTHONS = (sys.executable, os.path.realpath(sys.executable), "/usr/bin/python3")
PACKAGES = next(path for path in sys.path if path.endswith("site-packages"))


class Account:
    """Someone who runs programs in a folder of their own, and can write nowhere else."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        words = [*map(str, command)]
        if os.geteuid() == 0:
            become = "unshare", "--mount", "sh", "-ec", BECOME, USER
            words = [*become, *words]
        return subprocess.run(
            words,
            cwd=self.home,
            env={"HOME": str(self.home), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS_MAX,
        )

    def must(self, *command: str | Path) -> str:
        done = self.run(*command)
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def account() -> Iterator[Account]:
    with tempfile.TemporaryDirectory(prefix="nbdtarget-user-") as name:
        found = Account(Path(name))
        if os.geteuid() == 0:
            user = pwd.getpwnam(USER)
            os.chown(name, user.pw_uid, user.pw_gid)
        can = found.run("test", "-w", "/dev/fuse", "-a", "!", "-w", "/etc/passwd")
        if can.returncode:
            why = can.stdout.strip() or "/dev/fuse may not be opened"
            pytest.skip(f"{USER} cannot attach disks here: {why}")
        yield found


@pytest.fixture(scope="module")
def python(account: Account) -> Path:
    """The user's own environment, with our wheel. The libraries come from here, for a test needs no network."""
    looks = f"import sys, venv; sys.path.append({PACKAGES!r}); import msgspec, pytest"
    wanted = f"{looks}; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    for each in PYTHONS:
        if account.run(each, "-c", wanted).returncode == 0:
            break
    else:
        pytest.skip(f"no Python of this version that {USER} may run with {PACKAGES}")
    home = account.home / "venv"
    account.must(each, "-m", "venv", "--without-pip", home)
    (packages,) = home.glob("lib/python*/site-packages")
    # A .pth inside of this folder is not read, so the link to this tree does not leak in.
    (packages / "libraries.pth").write_text(f"{PACKAGES}\n")
    return home / "bin/python"


@pytest.fixture(scope="module")
def installed(account: Account, python: Path) -> Path:
    """The same, when the wheel is installed."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    command = [*build, "--outdir", str(account.home), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = account.home.glob("*.whl")
    wheel.chmod(0o644)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    account.must(*pip, "--no-deps", "--no-index", wheel)
    where = account.must(python, "-c", "import nbdtarget; print(nbdtarget.__file__)")
    assert where.startswith(str(account.home))
    return python


def printed_by(account: Account, python: Path, suite: str) -> str:
    (account.home / "test_record.py").write_text(suite)
    # The plugins of our own suite stay away; ours is found by its entry point.
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:asyncio")
    return account.run(python, "-m", "pytest", *options, "test_record.py").stdout


def test_ten_lines_find_the_bug(account: Account, installed: Path) -> None:
    printed = printed_by(account, installed, BUG)
    assert "E       AssertionError: assert b'" in printed
    assert "1 failed" in printed


def test_with_fsync_it_passes(account: Account, installed: Path) -> None:
    assert "1 passed" in printed_by(account, installed, MENDED)


def test_torture_says_who_may_mount(account: Account, installed: Path) -> None:
    command = installed.parent / "nbdtarget"
    done = account.run(command, "torture", "--check", "true", "--", "true")
    assert done.returncode != 0
    (line,) = done.stdout.splitlines()
    assert "root" in line
    assert "virtual machine" in line
