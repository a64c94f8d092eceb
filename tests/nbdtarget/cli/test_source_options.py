# SPDX-License-Identifier: Apache-2.0
"""Options about a clone's source."""

import pytest
import typer

from nbdtarget.cli.source_options import NO_SOURCE_OPTIONS, SourceSaid


def test_words_of_the_command() -> None:
    said = SourceSaid(url_command="sign 'a b' --for 5m")
    assert said.url_words("https://h/a") == ("sign", "a b", "--for", "5m")
    assert NO_SOURCE_OPTIONS.url_words("anything") == ()


@pytest.mark.parametrize(
    ("command", "source", "says"),
    [
        ("sign", "/srv/a.img", "is for a SOURCE that is a URL"),
        ("sign 'a", "https://h/a", "No closing quotation"),
        (" ", "https://h/a", "names no program"),
    ],
)
def test_mistakes(command: str, source: str, says: str) -> None:
    with pytest.raises(typer.BadParameter, match=says):
        SourceSaid(url_command=command).url_words(source)
