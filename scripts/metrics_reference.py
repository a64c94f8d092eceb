# SPDX-License-Identifier: Apache-2.0
"""The list of all metrics in docs/reference/metrics.md, from the families that the server has."""

import sys
from pathlib import Path
from typing import Final

from nbdtarget.monitor.families import DEVICE, SERVER, TARGET
from nbdtarget.monitor.family import Family

__all__ = ["PAGE", "with_list"]

PAGE: Final = Path(__file__).parent.parent / "docs/reference/metrics.md"
BEGIN: Final = "<!-- the list begins: made by `make docs-reference` -->"
END: Final = "<!-- the list ends -->"


def _section(title: str, about: str, families: tuple[Family, ...]) -> str:
    rows = [
        f"| `{each.name}` | {each.kind} | {', '.join(f'`{label}`' for label in each.labels)} |"
        f" {each.help} |"
        for each in families
    ]
    head = "| Metric | Type | Labels | Meaning |\n|---|---|---|---|\n"
    return f"## {title}\n\n{about}\n\n{head}" + "\n".join(rows) + "\n"


def with_list(text: str) -> str:
    """Return the page with the list that fits the code."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    sections = [
        _section("Of the server", "These are there with and without devices.", SERVER),
        _section(
            "Of devices",
            "`device` is the name of a device. Those of an operation that no client has asked for are missing.",
            DEVICE,
        ),
        _section(
            "Of clones and caches",
            "`start` is the first sector of the target in its table, mostly 0.",
            TARGET,
        ),
    ]
    return f"{before}{BEGIN}\n\n" + "\n".join(sections) + f"\n{END}{after}"


def main() -> int:
    """Rewrite the list."""
    PAGE.write_text(with_list(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
