# SPDX-License-Identifier: Apache-2.0
"""`stats`, beside what dmsetup 1.02.185 printed on a 6.12 kernel for the same commands."""

import pytest

from nbdtarget.cli import stats
from nbdtarget.cli.stats_report import parse_region, report_table
from tests.support.command_line import CommandLine


@pytest.fixture
def devices(cli: CommandLine, registry: object) -> None:
    """big, lin, tiny and two."""
    cli("create", "lin", "--table", "0 2048 linear /a 0")
    cli("create", "big", "--table", "0 65000 linear /b 0")
    lines = ("0 1024 linear /a 2048", "1024 1024 zero")
    cli("create", "two", "--table", lines[0], "--table", lines[1])
    cli("create", "tiny", "--table", "0 1 zero")


CREATED = "{}: Created new region with {} area(s) as region ID {}\n"


REGIONS = [
    ("", 1, "0+2048 2048 dmstats -"),
    ("--start 64 --length 64", 1, "64+64 64 dmstats -"),
    ("--start 64k --length 7", 1, "128+7 7 dmstats -"),
    ("--start 1m --length 64k", 1, "2048+128 128 dmstats -"),
    (
        "--start 0 --length 64k --programid prog --userdata data",
        1,
        "0+128 128 prog data",
    ),
    ("--length 100", 1, "0+100 100 dmstats -"),
    ("--areas 0", 1, "0+2048 2048 dmstats -"),
    ("--areasize 0", 1, "0+2048 2048 dmstats -"),
    ("--areas 4", 4, "0+2048 512 dmstats -"),
    ("--areasize 128k", 8, "0+2048 256 dmstats -"),
    ("--areas 10 --length 96", 10, "0+96 10 dmstats -"),
    ("--areasize 7 --length 96", 14, "0+96 7 dmstats -"),
    (
        "--bounds 10us,1ms",
        1,
        "0+2048 2048 dmstats - precise_timestamps histogram:10000,1000000",
    ),
    ("--bounds 1000000,2000000", 1, "0+2048 2048 dmstats - histogram:1,2"),
    ("--bounds 1s", 1, "0+2048 2048 dmstats - histogram:1000"),
    ("--precise", 1, "0+2048 2048 dmstats - precise_timestamps"),
]


@pytest.mark.long
@pytest.mark.usefixtures("devices")
def test_regions_are_made_as_recorded(cli: CommandLine) -> None:
    for words, nr_areas, listed in REGIONS:
        created = cli("stats", "create", "lin", *words.split())
        assert created == CREATED.format("lin", nr_areas, 0)
        assert cli("message", "lin", "0", "@stats_list") == f"0: {listed}\n"
        cli("message", "lin", "0", "@stats_delete", "0")


@pytest.mark.usefixtures("devices")
def test_several_devices_and_a_region_for_each_target(cli: CommandLine) -> None:
    created = cli("stats", "create", "lin", "two", "--areas", "2")
    assert created == CREATED.format("lin", 2, 0) + CREATED.format("two", 2, 0)
    assert cli("stats", "create", "--alldevices").splitlines() == [
        "big: Created new region with 1 area(s) as region ID 0",
        "lin: Created new region with 1 area(s) as region ID 1",
        "tiny: Created new region with 1 area(s) as region ID 0",
        "two: Created new region with 1 area(s) as region ID 1",
    ]
    created = cli("stats", "create", "--segments", "two")
    assert created == CREATED.format("two", 1, 2) + CREATED.format("two", 1, 3)
    assert cli("message", "two", "0", "@stats_list").splitlines()[2:] == [
        "2: 0+1024 1024 dmstats -",
        "3: 1024+1024 1024 dmstats -",
    ]
    # dmstats makes a region beyond the end of the device here.
    cli("stats", "create", "lin", "--start", "100")
    assert "2: 100+1948 1948 dmstats -" in cli("message", "lin", "0", "@stats_list")


@pytest.mark.usefixtures("devices")
def test_list_as_recorded(cli: CommandLine) -> None:
    assert cli("stats", "list") == ""
    for words in (
        "lin --start 64 --length 64",
        "lin --start 64k --length 7",
        "lin --length 64k --programid prog",
        "lin --areas 10 --length 96",
        "lin --areas 2",
        "tiny",
        "lin --bounds 10us,1ms",
    ):
        cli("stats", "create", *words.split())
    assert cli("stats", "list", "lin", "tiny").splitlines() == [
        "Name             GrpID RgID ObjType RgStart RgSize #Areas ArSize  ProgID ",
        "lin                  -    0 region   32.00k 32.00k      1  32.00k dmstats",
        "lin                  -    1 region   64.00k  3.50k      1   3.50k dmstats",
        "lin                  -    3 region        0 48.00k     10   5.00k dmstats",
        "lin                  -    4 region        0  1.00m      2 512.00k dmstats",
        "lin                  -    5 region        0  1.00m      1   1.00m dmstats",
        "tiny                 -    0 region        0   512b      1    512b dmstats",
    ]
    assert cli("stats", "list", "--programid", "prog").splitlines() == [
        "Name             GrpID RgID ObjType RgStart RgSize #Areas ArSize ProgID",
        "lin                  -    2 region        0 64.00k      1 64.00k prog  ",
    ]
    assert len(cli("stats", "list", "--allprograms").splitlines()) == 8
    line = cli("stats", "list", "--noheadings", "lin").splitlines()[2]
    assert line == "lin:-:3:region:0:48.00k:10:5.00k:dmstats"
    lines = cli("stats", "list", "--histogram", "lin").splitlines()
    assert lines[0].endswith(" ArSize  #Bins Histogram Bounds")
    assert lines[-1].endswith("  1.00m 3     0s,10us,1ms     ")


@pytest.mark.usefixtures("devices")
def test_print_clear_and_delete(cli: CommandLine) -> None:
    cli("stats", "create", "lin", "--start", "64", "--length", "64")
    cli("stats", "create", "lin", "--areas", "2", "--programid", "prog")
    cli("stats", "create", "two")
    zeroes = "0 0 0 0 0 0 0 0 0 0 0 0 0\n"
    halves = f"0+1024 {zeroes}1024+1024 {zeroes}"
    assert cli("stats", "print", "--regionid", "0", "lin", "two") == (
        f"64+64 {zeroes}0+2048 {zeroes}"
    )
    everything = ("stats", "print", "--allregions", "--allprograms")
    assert cli(*everything) == f"64+64 {zeroes}{halves}0+2048 {zeroes}"
    assert cli(*everything, "--clear", "lin") == f"64+64 {zeroes}{halves}"
    assert cli("stats", "clear", "--regionid", "0", "lin") == ""
    assert cli("stats", "clear", "--allregions", "--alldevices") == ""
    # A region of another program is not there unless it is asked for.
    line = cli("stats", "delete", "lin", "--regionid", "1", status=1)
    assert line == "nbdtarget: stats: lin: Region ID 1 does not exist\n"
    assert cli("stats", "delete", "lin", "two", "--allregions") == ""
    assert "prog" in cli("stats", "list", "--allprograms")
    assert cli("stats", "delete", "--alldevices", "--allregions", "--allprograms") == ""
    assert cli("stats", "list", "--allprograms") == ""


REFUSED = [
    ("create", "Please specify device(s) or use --alldevices."),
    ("create lin --areas 3 --areasize 4k", "one of --areas and --areasize"),
    ("create lin --segments --start 0", "Please specify --segments, or"),
    ("create lin --bounds 1x", "'1x' is not a time"),
    ("create lin --bounds 5ms,1ms", "boundaries must be in ascending order"),
    ("create lin --start x", "'x' is not a size"),
    ("create lin --length 100b", "not a multiple of a sector"),
    ("create nosuch", "Device does not exist"),
    ("print lin", "Please specify a --regionid or use --allregions."),
    ("print lin --regionid 99", "Region ID 99 does not exist"),
    ("clear lin", "Please specify a --regionid or use --allregions."),
    ("clear lin --regionid 99", "Region ID 99 does not exist"),
    ("delete lin", "Please specify a --regionid or use --allregions."),
    ("delete --alldevices", "Please specify a --regionid or use --allregions."),
    ("delete --allregions", "Please specify device(s) or use --alldevices."),
    ("delete lin --regionid 99", "Region ID 99 does not exist"),
    ("list --programid p --allprograms", "one of --programid and --allprograms"),
]


@pytest.mark.usefixtures("devices")
def test_what_is_refused(cli: CommandLine) -> None:
    for words, reason in REFUSED:
        assert reason in cli("stats", *words.split(), status=1)
    assert cli("stats", "list", "--allprograms") == ""


def test_report_of_recorded_counters() -> None:
    """The line that dmstats made of these counters; its RMrg/s and WMrg/s are always 0.00."""
    region = parse_region("lin", "1: 0+2048 2048 dmstats -")
    counters = "0+2048 4 3 512 4 8 7 64 8 0 12 12 4 8"
    assert report_table([(region, counters)], 1, headings=False) == [
        "lin:-:1:area:0:0:1.00m:3.00:7.00:4.00:8.00:256.00k:32.00k:24.00k"
        ":0.01:1.20:1.00:1.00:1.00"
    ]
    counters = "0+2048 0 0 0 0 8 0 64 4 0 4 4 0 4"
    assert report_table([(region, counters)], 2, headings=True) == [
        "Name             GrpID RgID ObjType ArID ArStart ArSize RMrg/s WMrg/s R/s "
        " W/s  RSz/s WSz/s  AvgRqSz QSize Util% AWait RdAWait WrAWait",
        "lin                  -    1 area       0       0  1.00m   0.00   0.00 0.00"
        " 4.00     0 16.00k   4.00k  0.00  0.20  0.50    0.00    0.50",
    ]


def test_report_of_nanoseconds() -> None:
    region = parse_region("lin", "4: 0+2048 2048 p a b precise_timestamps histogram:9")
    assert (region.program, region.bounds) == ("p", (9,))
    counters = "0+2048 4 3 512 4994244 8 7 64 2928715 0 7312560 7312560 4940528 2372032"
    (line,) = report_table([(region, f"{counters} 0:12")], 1, headings=False)
    assert line.endswith(":0.01:0.73:0.66:1.25:0.37")


@pytest.mark.usefixtures("devices")
def test_reports_follow_each_other(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(stats, "_wait", waits.append)
    assert cli("stats", "report") == ""
    cli("stats", "create", "lin", "--areas", "2")
    lines = cli("stats", "report", "--interval", "2", "--count", "2").splitlines()
    assert waits == [2]
    assert len(lines) == 7
    assert lines[:3] == lines[4:]
    assert lines[3] == ""


@pytest.mark.usefixtures("devices")
def test_a_message_keeps_an_escaped_blank(cli: CommandLine) -> None:
    cli("message", "lin", "0", r"@stats_create 0+64 8 p a\ b")
    assert cli("message", "lin", "0", "@stats_list") == "0: 0+64 8 p a b\n"
