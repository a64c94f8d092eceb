# SPDX-License-Identifier: Apache-2.0
"""How fast a qcow2 image becomes a raw disk: a clone of `qemu:qcow2:IMAGE`, against `qemu-img convert`.

    python -m scripts.bench_qcow2 [--size MIB] [--repeat N] [--only KIND]...

The kinds of images, which `--only` chooses, are `plain` (incompressible data) and `compressed` (hexadecimal digits, in compressed
clusters). All sides take turns, in alternating order, and each ratio is of one round:

    clone        the whole command `nbdtarget clone … --exit-when-hydrated`: it starts Python and the helper, copies, and ends when the copy is durable
    convert      `qemu-img convert` as it is called by default: it ends without any sync, and a power cut may take all of the copy
    durable      `qemu-img convert -t writeback`, which syncs the copy once at its end

`start` is what the clone takes for an image of one region. Afterwards the copies must be equal.
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from scripts.bench_hydration import MIB, Copy, make_source, timed
from scripts.fast_path import warn_if_pure
from tests.support.processes import NBDTARGET

__all__ = ["KINDS", "main"]

KINDS: Final = ("plain", "compressed")
REGION: Final = 64 << 10


def make_image(work: Path, kind: str, size: int) -> Path:
    """Make an image; the raw file that it is made from is removed."""
    raw, image = work / "raw", work / f"{kind}-{size}.qcow2"
    if kind == "plain":
        make_source(raw, size=size, holes=False)
    else:
        with raw.open("wb") as file:
            for at in range(0, size, MIB):
                file.write(os.urandom(min(MIB, size - at) // 2).hex().encode())
    options = ["-c"] if kind == "compressed" else []
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options]
    subprocess.run([*command, str(raw), str(image)], check=True)
    raw.unlink()
    return image


def convert(image: Path, work: Path, *options: str) -> Copy:
    dest = work / "convert.img"
    dest.unlink(missing_ok=True)
    os.sync()
    command = ["qemu-img", "convert", *options, "-f", "qcow2", "-O", "raw"]
    return timed([*command, str(image), str(dest)])


def clone(image: Path, work: Path, name: str = "clone") -> Copy:
    dest, metadata = work / f"{name}.img", work / f"{name}.meta"
    for path in (dest, metadata):
        path.unlink(missing_ok=True)
    os.sync()
    argv = [NBDTARGET, "clone", f"qemu:qcow2:{image}", str(dest)]
    argv += ["--metadata", str(metadata), "--exit-when-hydrated"]
    argv += [
        "--listen",
        f"unix:{work / 'clone.sock'}",
        "--control",
        str(work / "clone.control"),
    ]
    # The byte code is there, as where it is installed.
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(work / "pycache")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return timed(argv, env)


def measure(work: Path, kind: str, size: int, repeat: int) -> dict[str, float]:
    image, tiny = make_image(work, kind, size), make_image(work, kind, REGION)
    clone(tiny, work, "tiny")  # compiles
    sides: list[tuple[str, Callable[[], Copy]]] = [
        ("clone", lambda: clone(image, work)),
        ("convert", lambda: convert(image, work)),
        ("durable", lambda: convert(image, work, "-t", "writeback")),
        ("start", lambda: clone(tiny, work, "tiny")),
    ]
    found: dict[str, list[Copy]] = {name: [] for name, _ in sides}
    for round_nr in range(repeat):
        for name, copy in sides if round_nr % 2 == 0 else reversed(sides):
            found[name].append(copy())
    if not filecmp.cmp(work / "convert.img", work / "clone.img", shallow=False):
        raise AssertionError(f"{kind}: the copies differ")

    def ratio(side: str) -> float:
        pairs = zip(found[side], found["clone"], strict=True)
        return statistics.median(theirs.wall_s / ours.wall_s for theirs, ours in pairs)

    seconds = {
        f"{kind}_{name}_s": statistics.median(each.wall_s for each in copies)
        for name, copies in found.items()
    }
    cpu_s = {
        f"{kind}_{name}_cpu_s": statistics.median(each.cpu_s for each in found[name])
        for name in ("clone", "durable")
    }
    ratios = {f"{kind}_times_{side}": ratio(side) for side in ("convert", "durable")}
    return seconds | cpu_s | ratios


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A qcow2 image becomes a raw disk.")
    parser.add_argument("--size", type=int, default=1024, help="MiB (1024)")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--only", action="append", choices=KINDS)
    parser.add_argument("--dir", help="where the images go (a temporary directory)")
    options = parser.parse_args(argv)
    warn_if_pure()
    missing = [tool for tool in ("qemu-img", "qemu-nbd") if shutil.which(tool) is None]
    if missing:
        print(f"{' and '.join(missing)}: not installed")
        return 1
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(
        prefix="nbdtarget-bench-", dir=options.dir
    ) as name:
        for kind in options.only or KINDS:
            size = options.size * MIB
            figures |= measure(Path(name), kind, size, options.repeat)
    print(
        json.dumps({key: round(value, 3) for key, value in figures.items()}, indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
