# SPDX-License-Identifier: Apache-2.0
"""help, splitname, mangle, setgeometry, deps -o and the verbs about udev, beside dmsetup's.

Recorded from dmsetup 1.02.185 on a 6.12 kernel.
"""

import json
import os
import stat

import pytest

from nbdtarget.cli.app import run
from tests.support.command_line import CommandLine


def test_help_is_what_the_options_print(cli: CommandLine) -> None:
    assert cli("help") == cli("--help")
    assert cli("help", "load") == cli("load", "--help")
    assert cli("help", "metadata") == cli("metadata", "--help")
    assert "\n  lv_layer         - LVM device layer.\n" in cli("help", "-c")
    assert "No such command 'nosuch'" in cli("help", "nosuch", status=2)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vg0-lv0", "vg0:lv0:"),
        ("vg--a-lv--b-real", "vg-a:lv-b:real"),
        ("foo", "foo::"),
        ("vg-lv-a-b", "vg:lv:a"),
        ("vg--a", "vg-a::"),
        ("a-", "a-::"),
        ("/dev/mapper/vg0-lv0", "/dev/mapper/vg0:lv0:"),
        ("vg-lv--real", "vg:lv-real:"),
        ("vg---a-lv", "vg-:a:lv"),
        ("a--b--c-d", "a-b-c:d:"),
    ],
)
def test_splitname_as_recorded(cli: CommandLine, name: str, parts: str) -> None:
    assert cli("splitname", name, "--noheadings") == f"{parts}\n"


def test_splitname_reports_as_recorded(cli: CommandLine) -> None:
    head = "VG   LV   LVLayer"
    assert cli("splitname", "vg0-lv0") == f"{head}\nvg0  lv0         \n"
    assert cli("splitname", "foo", "FOO") == f"{head}\n                 \n"
    name = "vg0-lv0-real"
    assert cli("splitname", name, "-c") == f"{head}\nvg0  lv0  real   \n"
    assert cli("splitname", name, "-o", "lv_name") == "LV  \nlv0 \n"
    assert cli("splitname", name, "-o", "+subsystem") == (
        f"{head} Subsys\nvg0  lv0  real    LVM   \n"
    )
    prefixed = "DM_VG_NAME='vg0' DM_LV_NAME='lv0' DM_LV_LAYER='real'\n"
    assert cli("splitname", name, "--nameprefixes") == prefixed
    assert cli("splitname", name, "--noheadings", "--separator", " ") == (
        "vg0 lv0 real\n"
    )


@pytest.mark.usefixtures("registry")
def test_mangle_as_recorded(cli: CommandLine) -> None:
    for name in ("lin", "a\\x20c", "x y"):
        cli("create", name, "--notable")
    cli("create", "u", "--notable", "--uuid", "CRYPT-xx")
    assert cli("mangle", "lin") == "lin: [no UUID]: name already in correct form\n"
    assert cli("mangle") == (
        "a\\x20c: [no UUID]: name already in correct form\n"
        "lin: [no UUID]: name already in correct form\n"
        "u: CRYPT-xx: name and UUID already in correct form\n"
        "x y: renaming to x\\x20y\n"
    )
    assert "x\\x20y\t(253:2)\n" in cli("ls")
    assert "Device does not exist" in cli("mangle", "nosuch", status=1)
    cli("create", "m\\x20 y", "--notable")
    assert "mixed mangled and unmangled" in cli("mangle", "m\\x20 y", status=1)


@pytest.mark.usefixtures("registry")
def test_setgeometry_as_recorded(cli: CommandLine) -> None:
    cli("create", "lin", "--table", "0 2048 linear /a 0")
    cli("create", "bare", "--notable")
    for words in ("10 2 3 0", "10 2 3 60"):
        assert cli("setgeometry", "lin", *words.split()) == ""
    assert cli("setgeometry", "bare", "10", "2", "3", "0") == ""
    for words in ("100000 2 3 0", "10 300 3 0", "10 2 300 0", "10 2 3 61", "a 2 3 0"):
        line = cli("setgeometry", "lin", *words.split(), status=1)
        assert "Invalid argument" in line
    line = cli("setgeometry", "nosuch", "10", "2", "3", "0", status=1)
    assert "No such device or address" in line
    fields = ("info", "-c", "--noheadings", "-o", "name,geometry")
    assert cli(*fields) == "bare:10,2,3,0\nlin:10,2,3,60\n"
    (device,) = json.loads(cli("info", "lin", "--json"))["devices"]
    assert device["geometry"] == [10, 2, 3, 60]
    cli("load", "lin", "--table", "0 2048 linear /b 0")
    cli("resume", "lin")
    assert "lin:10,2,3,60" in cli(*fields)
    cli("load", "lin", "--table", "0 4096 linear /b 0")
    cli("resume", "lin")
    assert "lin:\n" in cli(*fields)


@pytest.mark.usefixtures("registry")
def test_deps_names_disks_in_the_form_that_was_chosen(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("create", "lin", "--table", "0 2048 linear /a 0")
    lines = ("0 1024 linear /dev/mapper/lin 0", "1024 1024 linear /b 0")
    cli("create", "top", "--table", lines[0], "--table", lines[1])
    cli("create", "bare", "--notable")
    assert cli("deps", "-o", "devname", "top", "lin", "bare") == (
        "top: 2 dependencies\t: (lin) (/b)\n"
        "lin: 1 dependencies\t: (/a)\n"
        "bare: 0 dependencies\t:\n"
    )
    assert cli("deps", "-o", "blkdevname", "top") == "2 dependencies\t: (dm-0) (/b)\n"
    assert cli("deps", "-o", "devno", "top") == "2 dependencies\t: (253, 0) (/b)\n"
    line = cli("deps", "-o", "nosuch", "top", status=1)
    assert line == (
        "nbdtarget: deps: Option not recognised: nosuch"
        " (there are: devno, devname, blkdevname)\n"
    )
    real_stat = os.stat

    def stat_of_a_disk(path: str, *args: object, **words: object) -> os.stat_result:
        if path != "/b":
            return real_stat(path, *args, **words)  # type: ignore[arg-type]
        fields = [stat.S_IFBLK, 0, 0, 1, 0, 0, 0, 0, 0, 0]
        return os.stat_result(fields, {"st_rdev": os.makedev(254, 16)})

    monkeypatch.setattr(os, "stat", stat_of_a_disk)
    assert cli("deps", "-o", "devno", "top") == "2 dependencies\t: (253, 0) (254, 16)\n"
    assert cli("deps", "-o", "devname", "top") == "2 dependencies\t: (lin) (b)\n"


HEAD = "Cookie       Semid      Value      Last semop time           Last change time\n"
DESTROYED = "0 semaphores with keys prefixed by 3405 (0xd4d) destroyed. 0 skipped.\n"


@pytest.mark.parametrize(
    ("words", "recorded"),
    [
        ("udevcookies", HEAD),
        ("udevcreatecookie", ""),
        ("udevcomplete_all -y", DESTROYED),
        ("udevcomplete_all 5", DESTROYED),
        ("udevcomplete 1", "DM_COOKIE_COMPLETED=0x1         \n"),
        ("udevcomplete 0x10d4000", "DM_COOKIE_COMPLETED=0x10d4000   \n"),
        ("udevreleasecookie 0xd4d1234", ""),
        ("mknodes", ""),
        ("mknodes lin", ""),
    ],
)
def test_verbs_about_udev_say_that_there_is_none(
    capsys: pytest.CaptureFixture[str], words: str, recorded: str
) -> None:
    assert run(words.split()) == 0
    out, err = capsys.readouterr()
    assert out == recorded
    assert err.startswith("nbdtarget: there is no udev and no device node here, so ")
    assert err.count("\n") == 1


def test_flags_of_udev_cookies_as_recorded(cli: CommandLine) -> None:
    assert cli("udevflags", "1") == ""
    assert cli("udevflags", "0x10d4000") == (
        "DM_UDEV_DISABLE_DM_RULES_FLAG='1'\n"
        "DM_UDEV_DISABLE_DISK_RULES_FLAG='1'\n"
        "DM_UDEV_DISABLE_OTHER_RULES_FLAG='1'\n"
        "DM_SUBSYSTEM_UDEV_FLAG0='1'\n"
    )
    flags = cli("udevflags", "12345678").splitlines()
    assert flags[2:] == [
        "DM_UDEV_LOW_PRIORITY_FLAG='1'",
        "DM_UDEV_DISABLE_LIBRARY_FALLBACK_FLAG='1'",
        "DM_UDEV_FLAG7='1'",
    ]
    for verb in ("udevflags", "udevcomplete"):
        for cookie in ("0", "abc"):
            assert "Incorrect cookie value" in cli(verb, cookie, status=1)
    assert "No udev transaction cookie" in cli("udevreleasecookie", status=1)


@pytest.mark.usefixtures("registry")
def test_measure_as_recorded(cli: CommandLine) -> None:
    cli("create", "lin", "--table", "0 2048 linear /a 0")
    lines = ("0 1024 linear /a 2048", "1024 1024 error")
    cli("create", "two", "--table", lines[0], "--table", lines[1])
    cli("create", "bare", "--notable")
    linear = "target_name=linear,target_version=1.4.0,device_name=/a,start"
    assert cli("measure", "lin", "two", "bare") == (
        f"lin: 0 2048 linear {linear}=0;\n"
        f"two: 0 1024 linear {linear}=2048;\n"
        "two: 1024 1024 error \n"
        "bare: \n"
    )
    assert cli("measure", "--target", "linear") == (
        f"lin: 0 2048 linear {linear}=0;\ntwo: 0 1024 linear {linear}=2048;\n"
    )
    cli("load", "lin", "--table", "0 4096 linear /a 0")
    assert cli("measure", "lin") == f"0 2048 linear {linear}=0;\n"
    assert cli("measure", "--inactive", "lin") == f"0 4096 linear {linear}=0;\n"


@pytest.mark.usefixtures("registry")
def test_target_version_as_recorded(
    cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "linear           v1.4.0\nzero             v1.2.0\n"
    assert cli("target-version", "linear", "zero") == lines
    assert run(["target-version", "linear", "nosuch", "zero"]) == 1
    out, err = capsys.readouterr()
    assert out == lines.splitlines(keepends=True)[0]
    assert "nosuch: Invalid argument" in err
