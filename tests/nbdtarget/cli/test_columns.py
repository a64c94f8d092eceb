# SPDX-License-Identifier: Apache-2.0
"""Reports in columns, held against what dmsetup prints for the same devices."""

import re

import pytest

from nbdtarget.cli.columns import FIELDS, describe_fields, report
from nbdtarget.common.errors import NbdTargetError
from tests.support.command_line import line

DEVICES = [
    line("top", 3, deps=("/dev/mapper/b",), mapped_deps=("b",)),
    line("a", 0, inactive=True, deps=("/srv/a",)),
    line(
        "b",
        1,
        uuid="UUID-B",
        open_count=2,
        nr_targets=2,
        deps=("/srv/b", "/srv/a"),
        used_by=("top", "top2"),
    ),
    line("n", 2, live=False, nr_targets=0),
    line("top2", 4, read_only=True, deps=("/dev/mapper/b",), mapped_deps=("b",)),
]


def test_the_default_report() -> None:
    assert report(DEVICES) == [
        "Name             Maj Min Stat Open Targ Event  UUID                            ",
        "a                253   0 LI-w    0    1      0                                 ",
        "b                253   1 L--w    2    2      0 UUID-B                          ",
        "n                253   2 ---w    0    0      0                                 ",
        "top              253   3 L--w    0    1      0                                 ",
        "top2             253   4 L--r    0    1      0                                 ",
    ]


def test_a_separator_ends_the_padding() -> None:
    assert report(DEVICES[:1], separator=",") == [
        "Name,Maj,Min,Stat,Open,Targ,Event,UUID",
        "top,253,3,L--w,0,1,0,",
    ]
    assert report(DEVICES[:1], headings=False) == ["top:253:3:L--w:0:1:0:"]
    assert report(DEVICES[:1], headings=False, separator="|") == [
        "top|253|3|L--w|0|1|0|"
    ]


def test_columns_of_choice() -> None:
    fields = "name,tables_loaded,suspended,readonly,segments,events,attr"
    assert report(DEVICES, fields=fields) == [
        "Name             Tables Suspended Read-only Targ Event  Stat",
        "a                Both   Active    Writeable    1      0 LI-w",
        "b                Live   Active    Writeable    2      0 L--w",
        "n                None   Active    Writeable    0      0 ---w",
        "top              Live   Active    Writeable    1      0 L--w",
        "top2             Live   Active    Read-only    1      0 L--r",
    ]
    loaded = line("s", 5, state="SUSPENDED", live=False, inactive=True)
    assert report([loaded], fields=fields, separator=" ")[1] == (
        "s Inactive Suspended Writeable 1 0 -Isw"
    )


def test_a_column_grows_with_its_values() -> None:
    fields = "name,devs_used,device_count,device_ref_count,names_using_dev"
    assert report(DEVICES, fields=fields) == [
        "Name             DevNamesUsed     #Devs #Refs RefNames",
        "a                                     1     0         ",
        "b                                     2     2 top,top2",
        "n                                     0     0         ",
        "top              b                    1     0         ",
        "top2             b                    1     0         ",
    ]
    assert report(DEVICES[1:2], fields="devno,name") == [
        "DevNo Name            ",
        "253:0 a               ",
    ]


def test_more_columns_than_the_default_ones() -> None:
    head = report([], fields="+devs_used")[0]
    assert head.endswith("UUID                             DevNamesUsed    ")


def test_sorting() -> None:
    def names(sort: str) -> list[str]:
        return report(DEVICES, fields="name", headings=False, sort=sort)

    assert names("-name") == ["top2", "top", "n", "b", "a"]
    assert names("open,name") == ["a", "n", "top", "top2", "b"]
    assert names("-open,-name") == ["b", "top2", "top", "n", "a"]


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("name=a", ["a"]),
        ("name!=a", ["b", "n", "top", "top2"]),
        ("segments>1", ["b"]),
        ("segments<1", ["n"]),
        ("segments >= 1 && minor<=1", ["a", "b"]),
        ("name=~^top,readonly=Read-only", ["top2"]),
        ("uuid='UUID-B'", ["b"]),
        ('uuid=""', ["a", "n", "top", "top2"]),
        ("minor=9", []),
    ],
)
def test_selection(select: str, names: list[str]) -> None:
    assert report(DEVICES, fields="name", select=select, headings=False) == names


@pytest.mark.parametrize(
    ("select", "reason"),
    [
        ("", "'' is not FIELD=VALUE"),
        ("name", "'name' is not FIELD=VALUE"),
        ("nosuch=1", "Unrecognised field: nosuch"),
        ("name>a", "name is not a number"),
        ("minor=x", "'x' is not a number"),
        ("name=~(", "missing"),
    ],
)
def test_a_bad_selection_is_refused(select: str, reason: str) -> None:
    with pytest.raises(NbdTargetError, match=re.escape(reason)):
        report(DEVICES, select=select)


def test_prefixes_for_shells() -> None:
    assert report(
        DEVICES[2:3], fields="name,open", headings=False, name_prefixes=True
    ) == ["DM_NAME='b':DM_OPEN='2'"]


def test_an_unknown_field_is_named() -> None:
    for words in ({"fields": "name,nosuch"}, {"sort": "nosuch"}):
        with pytest.raises(NbdTargetError, match="Unrecognised field: nosuch"):
            report(DEVICES, **words)  # type: ignore[arg-type]


def test_every_field_has_its_help_and_a_value() -> None:
    text = describe_fields()
    assert len(text.splitlines()) == len(FIELDS)
    everything = report(DEVICES, fields=",".join(FIELDS), separator="|")
    assert len(everything) == 1 + len(DEVICES)


def test_prefixes_have_no_headings_and_no_padding() -> None:
    fields = "name,vg_name"
    assert report(DEVICES[2:3], fields=fields, name_prefixes=True) == [
        "DM_NAME='b' DM_VG_NAME=''"
    ]


def test_parts_and_forms_of_names_as_recorded() -> None:
    devices = [
        line("a b", 0),
        line("a\\x20c", 1),
        line("plain-name", 2, uuid="CRYPT-xx"),
        line("vg--a-lv--b-real", 3, uuid="LVM-bbbb-real"),
        line("vg0-lv0", 4, uuid="LVM-x"),
    ]
    fields = "subsystem,vg_name,lv_name,lv_layer,mangled_name,unmangled_name"
    assert report(devices, fields=fields) == [
        "Subsys VG   LV   LVLayer MangledName      UnmangledName   ",
        "                         a\\x20b           a b             ",
        "                         a\\x20c           a c             ",
        "CRYPT                    plain-name       plain-name      ",
        "LVM    vg-a lv-b real    vg--a-lv--b-real vg--a-lv--b-real",
        "LVM    vg0  lv0          vg0-lv0          vg0-lv0         ",
    ]
    assert report(devices[3:], fields="name," + fields, headings=False)[0] == (
        "vg--a-lv--b-real:LVM:vg-a:lv-b:real:vg--a-lv--b-real:vg--a-lv--b-real"
    )
