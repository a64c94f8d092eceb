# SPDX-License-Identifier: Apache-2.0
"""Put this working tree and its console scripts into the virtual environment that runs this.

What `pip install --editable` does, without a build backend: `make run` then needs the locked
packages and nothing else. A `.pth` file makes the packages importable and each entry of
`[project.scripts]` becomes a small program beside the interpreter.
"""

import site
import sys
import tomllib
from pathlib import Path
from typing import Final

__all__ = ["main"]

ROOT: Final = Path(__file__).resolve().parent.parent

# The packages nbdtarget_protocol and nbdtarget_metadata stand in folders of their own.
PACKAGE_FOLDERS: Final = ("protocol", "metadata")

SCRIPT: Final = """\
#!{python}
import sys

from {module} import {function}

sys.exit({function}())
"""


def main() -> int:
    if sys.prefix == sys.base_prefix:
        print("link_project: run me with a virtual environment's python")
        return 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = Path(site.getsitepackages()[0])
    folders = (ROOT, *(ROOT / name for name in PACKAGE_FOLDERS))
    (packages / f"{project['name']}-tree.pth").write_text(
        "".join(f"{folder}\n" for folder in folders)
    )
    for name, target in project["scripts"].items():
        module, _, function = target.partition(":")
        script = Path(sys.prefix, "bin", name)
        script.write_text(
            SCRIPT.format(python=sys.executable, module=module, function=function)
        )
        script.chmod(0o755)
    return 0


if __name__ == "__main__":
    sys.exit(main())
