# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget metadata size`: how large a clone's metadata is."""

import json

import pytest

from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import NR_REGIONS_MAX
from tests.support.metadata_tool import Tool


@pytest.mark.parametrize(
    ("argv", "out"),
    [
        (["--nr-regions", "100"], "4160 sectors"),
        (["--device-size", "6400K", "--region-size", "64K"], "4160 sectors"),
        (["--nr-regions", "100", "-n"], "4160"),
        (["--nr-regions", "100", "-u", "bytes"], "2129920 bytes"),
        (["--nr-regions", "100", "-u", "k"], "2080 kibibytes"),
        (["--nr-regions", "100", "-u", "m", "-n"], "3"),
        (["--nr-regions", "100", "--unit", "K"], "2130 kilobytes"),
        (["--nr-regions", "100", "--smallest", "-n", "-u", "b"], "163840"),
    ],
)
def test_size_exactly(tool: Tool, argv: list[str], out: str) -> None:
    assert tool("size", *argv) == (out + "\n", "")


def test_size_is_what_creation_makes(tool: Tool) -> None:
    argv = ["size", "--device-size", "1T", "--region-size", "4K", "--json"]
    answer = json.loads(tool(*argv)[0])
    assert answer == {
        "nr_regions": 1 << 28,
        "smallest": CloneMetadata.device_size_min(1 << 28),
        "preferred": CloneMetadata.device_size_for(1 << 28),
    }


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--device-size", "1G"],
        ["--region-size", "64K"],
        ["--nr-regions", "5", "--region-size", "64K"],
        ["--nr-regions", "5", "--device-size", "1G"],
        ["--nr-regions", "x"],
        ["--nr-regions", "5", "--unit", "parsecs"],
        ["--device-size", "x", "--region-size", "64K"],
    ],
    ids=" ".join,
)
def test_size_argument_combinations(tool: Tool, argv: list[str]) -> None:
    out, err = tool("size", *argv, status=2)
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device-size", "1G", "--region-size", "2K"], "Invalid region size"),
        (["--device-size", "1G", "--region-size", "2G"], "Invalid region size"),
        (["--device-size", "1G", "--region-size", "12K"], "not a power of 2"),
        (["--device-size", "0", "--region-size", "4K"], "at least one region"),
        (["--nr-regions", "-1"], "at least one region"),
        (["--device-size", "1P", "--region-size", "4K"], "Too many regions"),
        (["--nr-regions", str(NR_REGIONS_MAX + 1)], "Too many regions"),
        (["--nr-regions", str(10**30)], "Too many regions"),
    ],
)
def test_sizes_that_no_clone_has(tool: Tool, argv: list[str], words: str) -> None:
    assert words in tool.fails("size", *argv)


def test_size_of_the_largest_clone(tool: Tool) -> None:
    out, _ = tool("size", "--nr-regions", str(NR_REGIONS_MAX), "-n", "-u", "b")
    assert int(out) == CloneMetadata.device_size_for(NR_REGIONS_MAX)
