# SPDX-License-Identifier: Apache-2.0
"""The page on metrics has every metric of the server, and no other."""

from scripts.metrics_reference import PAGE, with_list


def test_page_has_the_metrics_of_the_code() -> None:
    text = PAGE.read_text()
    assert with_list(text) == text, "run `make docs-reference`"
