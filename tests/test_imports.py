# SPDX-License-Identifier: Apache-2.0
"""No module imports another that imports it, directly or by way of others, not even for its types.

The contracts of import-linter in pyproject.toml say which room may import which; they look at rooms, and
this looks at modules.
"""

import ast
from collections.abc import Mapping, Set
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "nbdtarget": ROOT / "nbdtarget",
    "nbdtarget_metadata": ROOT / "metadata" / "nbdtarget_metadata",
    "nbdtarget_protocol": ROOT / "protocol" / "nbdtarget_protocol",
}

Graph = Mapping[str, Set[str]]


def modules() -> dict[str, Path]:
    found = {}
    for package, directory in PACKAGES.items():
        for path in directory.rglob("*.py"):
            parts = [package, *path.relative_to(directory).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    return found


def imported(source: str, names: Set[str]) -> set[str]:
    """The modules, out of `names`, that a source imports anywhere: in functions and for types, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in names else node.module)
    return found & names


def reachable(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        for module in graph[left.pop()] - found:
            found.add(module)
            left.append(module)
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Sets of modules each of which reaches all the others, in the order of their names."""
    reached = {module: reachable(graph, module) for module in graph}
    found = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return sorted(map(list, found))


def test_a_circle_is_found_and_what_only_leads_into_it_is_not_part_of_it() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set[str]()}
    assert circles(graph) == [["b", "c"]]


def test_imports_are_found_in_functions_and_for_types() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "from p import a, x\n"
        "if TYPE_CHECKING:\n"
        "    from p.b import B\n"
        "def f():\n"
        "    import p.c\n"
    )
    names = {"p", "p.a", "p.b", "p.c", "p.d"}
    assert imported(source, names) == {"p", "p.a", "p.b", "p.c"}


def test_modules_import_each_other_in_no_circle() -> None:
    found = modules()
    graph = {
        name: imported(path.read_text(), found.keys()) - {name}
        for name, path in found.items()
    }
    assert len(graph) > 200
    assert circles(graph) == []
