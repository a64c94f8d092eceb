# SPDX-License-Identifier: Apache-2.0
"""`draw`: the hit ratios over the sizes as a picture; PNG or SVG, by the name of the file."""

from pathlib import Path
from typing import Final

from nbdtarget.advise.advice import Advice
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import describe_bytes

__all__ = ["SUFFIXES", "draw"]

SUFFIXES: Final = (".png", ".svg")


def draw(advice: Advice, title: str, path: Path) -> None:
    """Write the picture.

    Raises: NbdTargetError: matplotlib is not installed, the suffix is neither, or the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise NbdTargetError(f"{path}: a picture is called .png or .svg")
    try:
        # The object, and not pyplot: that looks for a display.
        from matplotlib.figure import Figure
    except ImportError:
        raise NbdTargetError(
            "pictures need matplotlib: pip install 'nbdtarget[pictures]'"
        ) from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    sizes = [row.size for row in advice.rows]
    for name, values, style in (
        ("best possible", [row.best for row in advice.rows], "--"),
        (advice.policy, [row.policy for row in advice.rows], "-o"),
        ("LRU", [row.lru for row in advice.rows], ":s"),
    ):
        axes.plot(sizes, [100 * value for value in values], style, label=name)
    if advice.enough is not None and advice.enough != sizes[-1]:
        is_right = sizes.index(advice.enough) > len(sizes) // 2
        axes.axvline(advice.enough, color="0.6", linewidth=1)
        axes.annotate(
            f"more than {describe_bytes(advice.enough)} stops to help",
            (advice.enough, 2),
            # On the side where there is room for it.
            xytext=(-4, 0) if is_right else (4, 0),
            textcoords="offset points",
            ha="right" if is_right else "left",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [describe_bytes(size) for size in sizes], rotation=45)
    axes.minorticks_off()
    axes.set(title=title, xlabel="size of the cache", ylabel="hits, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise NbdTargetError(f"{path}: {error.strerror or error}") from None
