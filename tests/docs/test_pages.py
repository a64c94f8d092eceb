# SPDX-License-Identifier: Apache-2.0
"""Pages about the code name what exists: files, modules, functions, and code that is quoted."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "metadata/FORMAT.md",
    *sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs").rglob("*.md")
        if "commands" not in path.parts  # they are made from the commands themselves
    ),
]
ROOMS = ("nbdtarget", "nbdtarget_protocol", "nbdtarget_metadata", "tests", "scripts")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
WORD = re.compile(r"`([^`\n]+)`")
FILE = re.compile(
    r"(?:nbdtarget|protocol|metadata|tests|scripts|docs|findings)/[\w./-]*"
)
DOTTED = re.compile(rf"(?:{'|'.join(ROOMS)})(?:\.\w+)+")


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def words_of(page: str) -> list[str]:
    """Return the texts in backticks that stand outside of blocks of code."""
    return WORD.findall(FENCE.sub("", text_of(page)))


def is_there(dotted: str) -> bool:
    """Whether this is a module, or something that can be reached from one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if found:
            thing: object = importlib.import_module(name)
            for attribute in parts[end:]:
                if not hasattr(thing, attribute):
                    return False
                thing = getattr(thing, attribute)
            return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    named = [word for word in words_of(page) if FILE.fullmatch(word)]
    missing = [
        word for word in named if "NAME" not in word and not (ROOT / word).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files_that_exist(page: str) -> None:
    folder = (ROOT / page).parent
    links = LINK.findall(FENCE.sub("", text_of(page)))
    missing = [
        link
        for link in links
        if not re.match(r"[a-z]+:|#", link)
        and not (folder / link.partition("#")[0]).exists()
        and not (folder / f"{link.partition('#')[0]}.md").exists()
    ]
    assert missing == []


def test_files_are_found_in_the_pages() -> None:
    # The test above would find nothing missing if this were not so.
    named = set(words_of("docs/architecture.md")) | set(words_of("CONTRIBUTING.md"))
    assert {"tests/crash", "nbdtarget/dm/table.py", "metadata/FORMAT.md"} <= named


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_functions_that_a_page_names_exist(page: str) -> None:
    dotted = [word.partition("(")[0] for word in words_of(page)]
    missing = [
        word
        for word in dotted
        if DOTTED.fullmatch(word)
        and not word.endswith((".md", ".toml", ".service", ".socket"))
        and not (ROOT / word).exists()
        and not is_there(word)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_make_has_what_a_page_tells_to_make(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = set(
        re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", text_of(page), re.MULTILINE)
    )
    made = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert wanted - made == set()


def test_is_there_tells_what_is_there_from_what_is_not() -> None:
    assert is_there("nbdtarget.bio")
    assert is_there("nbdtarget.bio.Bio.own")
    assert not is_there("nbdtarget.bio.Bio.disown")
    assert not is_there("nbdtarget.nowhere")


def test_code_that_extending_quotes_stands_in_the_source() -> None:
    sources = [
        path.read_text()
        for folder in ("docs/examples", "nbdtarget/policies", "nbdtarget/devices")
        for path in (ROOT / folder).glob("*.py")
    ]
    sources.append((ROOT / "nbdtarget/targets/registry.py").read_text())
    blocks = [
        code for kind, code in FENCE.findall(text_of("docs/extending.md")) if kind
    ]
    assert len(blocks) >= 9
    assert [
        code for code in blocks if not any(code in source for source in sources)
    ] == []


def packages() -> set[str]:
    """Every package of the product, by its dotted name."""
    found = set()
    for base in ("", "protocol", "metadata"):
        for path in (ROOT / base).glob("nbdtarget*/**/__init__.py"):
            found.add(".".join(path.parent.relative_to(ROOT / base).parts))
    return found


def test_architecture_names_every_package() -> None:
    assert len(packages()) > 15
    assert packages() - set(words_of("docs/architecture.md")) == set()


def test_every_example_is_run() -> None:
    tests = (ROOT / "tests/docs/test_extending.py").read_text()
    examples = sorted((ROOT / "docs/examples").glob("*.py"))
    assert examples
    for path in examples:
        assert f"from docs.examples.{path.stem} import" in tests
        assert f"(examples/{path.name})" in text_of("docs/extending.md")
