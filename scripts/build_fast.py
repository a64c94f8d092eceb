# SPDX-License-Identifier: Apache-2.0
"""Build the compiled fast path into the virtual environment that runs this.

    python -m scripts.build_fast [--to FOLDER]

Cython makes C of the `.pyx` files in `nbdtarget/fast`, and the C compiler that Python was built with (or
`cc`, or what the environment variable CC names) makes an extension module of each. `.pxi` files are parts of a `.pyx` file, which includes them. CFLAGS is passed on,
for example for AddressSanitizer. Nothing is written into the source tree. Exit status 1, and one line that says
why, if something is missing; nbdtarget then runs without the fast path.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["BuildError", "build", "main"]

FOLDER: Final = Path(__file__).resolve().parent.parent / "nbdtarget/fast"
SOURCES: Final = sorted(FOLDER.glob("*.pyx"))
FLAGS: Final = ("-O2", "-fPIC", "-shared", "-D_GNU_SOURCE", "-Wall")
# A function that is called in only one place remains a function. Otherwise GCC moves the rare cases of requests into the function that serves
# each of them, which then needs twice the stack, and more instructions for each WRITE.
FLAGS_OF: Final = {"nbdtarget_fast": ("-fno-inline-functions-called-once",)}
OUTPUT_LINES_MAX: Final = 12  # of a compiler that fails


class BuildError(Exception):
    """The extension module cannot be built here. The text says why."""


def compiler() -> list[str]:
    """Return the C compiler's command. Raises: BuildError."""
    for line in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc"):
        words = shlex.split(line or "")
        if words and shutil.which(words[0]):
            return words
    raise BuildError("no C compiler was found")


def headers() -> Path:
    """Return the folder of Python's headers. Raises: BuildError."""
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").exists():
        raise BuildError(f"Python's headers are missing: there is no {folder}/Python.h")
    return folder


def run(command: list[str], what: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        lines = done.stdout.splitlines()[-OUTPUT_LINES_MAX:]
        raise BuildError(f"{what} failed:\n" + "\n".join(lines))


def build(folder: Path) -> list[Path]:
    """Build the extension modules into `folder`; return their paths. Raises: BuildError."""
    include, command = headers(), compiler()
    flags = [
        *FLAGS,
        *shlex.split(os.environ.get("CFLAGS", "")),
        f"-I{include}",
        f"-I{FOLDER}",
    ]
    targets = []
    for source in SOURCES:
        target = folder / f"{source.stem}{sysconfig.get_config_var('EXT_SUFFIX')}"
        with tempfile.TemporaryDirectory() as scratch:
            c_file = Path(scratch, f"{source.stem}.c")
            built = Path(scratch, target.name)
            cython = [sys.executable, "-m", "cython", "-I", str(source.parent)]
            # They are modules of no package, and one of them uses another.
            cython += ["--module-name", source.stem, str(source), "-o", str(c_file)]
            run(cython, "cython")
            of_module = [*flags, *FLAGS_OF.get(source.stem, ())]
            line = [*command, *of_module, str(c_file), "-o", str(built)]
            run(line, "the C compiler")
            # In one step, so that no process ever sees half a module.
            beside = target.with_suffix(".new")
            shutil.copy(built, beside)
            beside.replace(target)
        targets.append(target)
    return targets


def main() -> int:
    parser = argparse.ArgumentParser(prog="build_fast", description=__doc__)
    parser.add_argument("--to", type=Path, help="default: this Python's site-packages")
    folder: Path = parser.parse_args().to or Path(sysconfig.get_paths()["platlib"])
    try:
        build(folder)
    except BuildError as error:
        print(f"the fast path is not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
