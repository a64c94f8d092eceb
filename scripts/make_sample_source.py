# SPDX-License-Identifier: Apache-2.0
"""Make a disk image worth cloning, in a second: an ext4 file system with files in it.

    python -m scripts.make_sample_source FILE [--size MIB]

Where mkfs.ext4 is missing, the image is patterned data between holes instead. It is sparse
either way, so a clone of it has holes to skip.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.support.sample_disk import make_sample_source

__all__ = ["main"]

MIB: Final = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a sample disk image.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", type=int, default=256, help="MiB (256)")
    options = parser.parse_args(argv)
    if options.file.exists():
        return 0
    options.file.parent.mkdir(parents=True, exist_ok=True)
    kind = make_sample_source(options.file, size=options.size * MIB)
    print(f"made {options.file}: {options.size} MiB, {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
