# SPDX-License-Identifier: Apache-2.0
"""Build a Debian package that carries all that it needs but Python: `make deb`.

    python -m scripts.build_deb [--out dist] [--version 0.1.0-1]

The libraries of requirements.lock and nbdtarget itself, with the compiled fast path, go into /usr/lib/nbdtarget; so the package fits
the releases whose Python has the version of the one that builds it. Beside it are the command, the units, the man pages (`make docs`
comes first), completion for three shells, and an example of a configuration file. `contrib/debian` has the scripts.
"""

import argparse
import gzip
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from nbdtarget import __version__

__all__ = ["DebError", "build_deb", "main"]

ROOT: Final = Path(__file__).resolve().parent.parent
DEBIAN: Final = ROOT / "contrib/debian"
MAN: Final = ROOT / "build/docs/man"
LIBRARY: Final = "usr/lib/nbdtarget"
COMPLETIONS: Final = {
    "bash": "usr/share/bash-completion/completions/nbdtarget",
    "zsh": "usr/share/zsh/vendor-completions/_nbdtarget",
    "fish": "usr/share/fish/vendor_completions.d/nbdtarget.fish",
}
# Isolated, so that neither the directory of the caller nor PYTHONPATH can put other modules in the way.
COMMAND: Final = f"""\
#!/usr/bin/python3 -I
import sys

sys.path.insert(0, "/{LIBRARY}")

from nbdtarget.cli.app import main

main()
"""
PIP: Final = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


class DebError(Exception):
    """The package could not be built; the text says why."""


def build_deb(out: Path, version: str) -> Path:
    """Build the package into the folder `out`, and return its path. Raises: DebError."""
    if not shutil.which("dpkg-deb"):
        raise DebError("there is no dpkg-deb: packages are built on Debian")
    if not list(MAN.glob("*.1")):
        raise DebError(f"there are no man pages in {MAN}: make docs")
    with tempfile.TemporaryDirectory() as name:
        work, tree = Path(name), Path(name) / "tree"
        _install_program(work, tree)
        _install_units(tree)
        _install_documents(tree)
        _install_completions(tree)
        _set_modes(tree)
        architecture = _run("dpkg", "--print-architecture").strip()
        _write_control(tree, version, architecture)
        out.mkdir(parents=True, exist_ok=True)
        package = out / f"nbdtarget_{version}_{architecture}.deb"
        _run("dpkg-deb", "--root-owner-group", "--build", str(tree), str(package))
    return package


def _install_program(work: Path, tree: Path) -> None:
    library = tree / LIBRARY
    into = ["install", "--no-compile", "--target", str(library)]
    _run(*PIP, *into, "--require-hashes", "-r", str(ROOT / "requirements.lock"))
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(work)]
    _run(sys.executable, *build, str(ROOT))
    (wheel,) = work.glob("*.whl")
    # The commands of libraries are nothing for a user's path.
    shutil.rmtree(library / "bin")
    _run(*PIP, *into, "--no-deps", "--no-index", str(wheel))
    shutil.rmtree(library / "bin")
    command = tree / "usr/bin/nbdtarget"
    command.parent.mkdir(parents=True)
    command.write_text(COMMAND)


def _install_units(tree: Path) -> None:
    units = tree / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for unit in (ROOT / "contrib/systemd").glob("nbdtarget*"):
        shutil.copy(unit, units)
    (tree / "etc/nbdtarget").mkdir(parents=True)


def _install_documents(tree: Path) -> None:
    for page in MAN.glob("*.[0-9]"):
        _write_gzip(tree / f"usr/share/man/man{page.suffix[1:]}", page)
    documents = tree / "usr/share/doc/nbdtarget"
    _write_gzip(documents, ROOT / "CHANGELOG.md", "changelog.gz")
    shutil.copy(DEBIAN / "copyright", documents)
    shutil.copytree(ROOT / "contrib/examples", documents / "examples")
    for drop_in in (ROOT / "contrib/systemd").glob("*.d/*"):
        shutil.copy(drop_in, documents / "examples" / drop_in.parent.name)


def _write_gzip(folder: Path, source: Path, name: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Without the time, so that the same source makes the same package.
    packed = gzip.compress(source.read_bytes(), mtime=0)
    (folder / (name or f"{source.name}.gz")).write_bytes(packed)


def _install_completions(tree: Path) -> None:
    for shell, path in COMPLETIONS.items():
        target = tree / path
        target.parent.mkdir(parents=True)
        script = "from nbdtarget.cli.app import main; main()"
        target.write_text(_run(sys.executable, "-c", script, "completion", shell))


def _set_modes(tree: Path) -> None:
    for path in tree.rglob("*"):
        is_program = path.is_dir() or path.parent == tree / "usr/bin"
        path.chmod(0o755 if is_program else 0o644)
    tree.chmod(0o755)


def _write_control(tree: Path, version: str, architecture: str) -> None:
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    _, _, glibc = os.confstr("CS_GNU_LIBC_VERSION").partition(" ")  # type: ignore[union-attr]
    major, minor, _ = platform.python_version_tuple()
    words = {
        "VERSION": version,
        "ARCHITECTURE": architecture,
        "SIZE": str(size // 1024),
        "PYTHON": f"{major}.{minor}",
        "NEXT_PYTHON": f"{major}.{int(minor) + 1}",
        "GLIBC": glibc,
    }
    control = (DEBIAN / "control.in").read_text()
    for word, value in words.items():
        control = control.replace(f"@{word}@", value)
    folder = tree / "DEBIAN"
    folder.mkdir()
    (folder / "control").write_text(control)
    sums = [
        f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(tree)}\n"
        for path in files
    ]
    (folder / "md5sums").write_text("".join(sums))
    for name in ("postinst", "prerm", "postrm"):
        shutil.copy(DEBIAN / name, folder)
        (folder / name).chmod(0o755)


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise DebError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--version", default=f"{__version__}-1")
    options = parser.parse_args(argv)
    try:
        package = build_deb(options.out, options.version)
    except DebError as error:
        sys.exit(f"build_deb: {error}")
    print(package)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
