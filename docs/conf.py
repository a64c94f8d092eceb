# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds the site and the man pages: `make docs`.

The pages are Markdown (MyST), so that they can be read in the repository as they are. A man page is made from
each page of a command, from the page on the configuration file and from the chapter on table lines.
"""

import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent.parent))

from docutils import nodes
from pygments.lexers.special import TextLexer

from nbdtarget import __version__
from scripts.command_reference import pages

project: Final = "nbdtarget"
author: Final = "the authors of nbdtarget"
project_copyright: Final = "the authors of nbdtarget. Apache License 2.0"
version = release = __version__

extensions: Final = ["myst_parser"]
source_suffix: Final = {".md": "markdown"}
exclude_patterns: Final = ["Thumbs.db", ".DS_Store"]
root_doc: Final = "index"
nitpicky: Final = True
highlight_language: Final = "none"

myst_enable_extensions: Final = ["deflist", "colon_fence"]
myst_heading_anchors: Final = 4
# The fence of a diagram is drawn where the repository is browsed; on the site it is text.
myst_fence_as_directive: Final[set[str]] = set()

html_theme: Final = "furo"
html_title: Final = f"nbdtarget {release}"
html_copy_source: Final = False
html_show_sphinx: Final = False
html_static_path: Final[list[str]] = []

_COMMANDS: Final = "reference/commands"
_AUTHORS: Final[list[str]] = []

man_show_urls: Final = False
man_pages: Final = [
    *(
        (f"{_COMMANDS}/{page.name}", page.name, page.plain_summary, _AUTHORS, 1)
        for page in pages()
    ),
    (
        "reference/configuration",
        "nbdtarget.toml",
        "configuration file of nbdtarget serve",
        _AUTHORS,
        5,
    ),
    (
        "reference/tables/index",
        "nbdtarget-tables",
        "table lines, messages and status of nbdtarget's targets",
        _AUTHORS,
        7,
    ),
]


class MermaidLexer(TextLexer):
    """Diagrams are shown as they are written."""

    name = "Mermaid"
    aliases: Final = ["mermaid"]


def _for_the_format(app: Any, doctree: nodes.document, docname: str) -> None:
    """Drop HTML comments, which a man page would show, and links where nothing can be clicked; name drawings."""
    for raw in list(doctree.findall(nodes.raw)):
        if raw.astext().lstrip().startswith("<!--"):
            raw.parent.remove(raw)
    for drawing in list(doctree.findall(nodes.literal_block)):
        if drawing.get("language") == "mermaid":
            at = drawing.parent.index(drawing) + 1
            note = "A drawing in Mermaid's notation: it is drawn where the repository is browsed."
            drawing.parent.insert(at, nodes.paragraph("", "", nodes.emphasis("", note)))
    if app.builder.format == "man":
        for link in list(doctree.findall(nodes.reference)):
            if link.get("internal") or not link.get("refuri"):
                link.replace_self(link.children)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_lexer("mermaid", MermaidLexer)
    app.connect("doctree-resolved", _for_the_format)
