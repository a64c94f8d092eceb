# SPDX-License-Identifier: Apache-2.0
"""Install, use, update, remove and purge the Debian package in a clean Debian: `make deb-test`.

    python -m scripts.deb_test

Builds the package, and packs it again as a newer version. The clean Debian is the one of `make vm-test` (`scripts.vm.image`), unpacked into a temporary folder, in
which `deb_test.sh` runs with namespaces of its own. Needs root.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from nbdtarget import __version__
from scripts.build_deb import DebError, build_deb
from scripts.vm.image import ImageError, debian

__all__ = ["main"]

SCRIPT: Final = Path(__file__).with_name("deb_test.sh")
# The mounts are seen by the script alone, and go with it; so does every process that it starts.
ISOLATED: Final = """
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
exec chroot "$1" /usr/bin/env -i PATH=/usr/sbin:/usr/bin HOME=/tmp bash /tmp/deb_test.sh /tmp/old.deb /tmp/new.deb
"""


def _with_version(package: Path, version: str) -> Path:
    """Return the same package as another version."""
    tree, other = package.parent / "tree", package.parent / "other.deb"
    subprocess.run(["dpkg-deb", "--raw-extract", str(package), str(tree)], check=True)
    control = tree / "DEBIAN/control"
    text = re.sub("(?m)^Version: .*$", f"Version: {version}", control.read_text())
    control.write_text(text)
    pack = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(other)]
    subprocess.run(pack, check=True, stdout=subprocess.DEVNULL)
    return other


def main() -> int:
    try:
        archive = debian()
        with tempfile.TemporaryDirectory(prefix="deb-test-") as name:
            root, packages = Path(name) / "root", Path(name) / "packages"
            root.mkdir()
            unpack = ["tar", "-xpf", str(archive), "-C", str(root)]
            subprocess.run([*unpack, "--exclude=./dev/*"], check=True)
            old = build_deb(packages, f"{__version__}-1")
            new = _with_version(old, f"{__version__}-2")
            shutil.copy(old, root / "tmp/old.deb")
            shutil.copy(new, root / "tmp/new.deb")
            shutil.copy(SCRIPT, root / "tmp/deb_test.sh")
            print(f"{old.name}, {old.stat().st_size >> 10} KiB, in a clean Debian")
            isolate = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
            words = [*isolate, "sh", "-euc", ISOLATED, "sh", str(root)]
            status = subprocess.run(words, stdin=subprocess.DEVNULL).returncode
    except (ImageError, DebError) as error:
        sys.exit(f"deb-test: {error}")
    print("passed" if status == 0 else f"FAILED with {status}")
    return status


if __name__ == "__main__":
    sys.exit(main())
