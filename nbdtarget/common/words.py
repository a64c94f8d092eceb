# SPDX-License-Identifier: Apache-2.0
"""The words of table lines and messages: split and quoted as device-mapper does it.

Words are separated by white space; a backslash takes the next character as it is, so a
path with a blank in it is one word: `/srv/my\\ disks/a.img`.
"""

from collections.abc import Iterable

__all__ = ["join_words", "printable", "quote_word", "split_words"]


def split_words(text: str) -> list[str]:
    """Split `text` into words; a trailing lone backslash is dropped, as the kernel does."""
    if "\\" not in text:
        return text.split()
    words: list[str] = []
    word: list[str] | None = None
    characters = iter(text)
    for character in characters:
        if character.isspace():
            if word is not None:
                words.append("".join(word))
                word = None
            continue
        if word is None:
            word = []
        if character == "\\":
            word.append(next(characters, ""))
        else:
            word.append(character)
    if word is not None:
        words.append("".join(word))
    return words


def quote_word(word: str) -> str:
    """Return `word` such that `split_words` gives it back as one word."""
    if not any(character.isspace() or character == "\\" for character in word):
        return word
    return "".join(
        "\\" + character if character.isspace() or character == "\\" else character
        for character in word
    )


def join_words(words: Iterable[str]) -> str:
    """The inverse of `split_words`, for words that are not empty."""
    return " ".join(quote_word(word) for word in words)


def printable(text: str, length_max: int) -> str:
    """Return `text` as it may stand in a log or a message: no control characters, and not longer than that.

    Newlines are control characters, too. A text that is too long loses its middle.
    """
    if len(text) > length_max:
        half = length_max // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
