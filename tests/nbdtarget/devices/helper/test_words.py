# SPDX-License-Identifier: Apache-2.0
"""Names of disks that a helper opens: what they mean, what is refused, and the command line that comes of them."""

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper.words import (
    absolute_nbdkit,
    absolute_qemu,
    absolute_rbd,
    parse_configured,
    parse_nbdkit,
    parse_qemu,
    parse_rbd_name,
    qemu_name,
)


def test_image_in_a_format() -> None:
    words = parse_qemu("qemu:qcow2:/srv/50%25%23 1.qcow2")
    assert (words.format, words.what) == ("qcow2", "/srv/50%# 1.qcow2")
    assert words.is_path
    assert not words.allows_references
    assert words.argv == (
        "qemu-nbd",
        "--read-only",
        "--persistent",
        "--shared=8",
        "--format=qcow2",
        "--",
        "/srv/50%# 1.qcow2",
    )
    assert words.ids == ("format=qcow2", "image=/srv/50%# 1.qcow2")


def test_path_that_looks_like_an_option_stays_a_path() -> None:
    assert parse_qemu("qemu:raw:--object=x").argv[-2:] == ("--", "--object=x")


def test_options_of_ours_stand_behind_the_mark() -> None:
    words = parse_qemu("qemu:vmdk:/x.vmdk#allow=references&connections=12")
    assert words.allows_references
    assert words.connections == 12
    assert "--shared=16" in words.argv
    assert words.what == "/x.vmdk"


@pytest.mark.parametrize(
    "what",
    [
        "ftp://host/a%3Fb",
        "ssh://user@host/disk.img",
        "nbd+unix:///disk?socket=/run/x",
    ],
)
def test_protocols_of_qemu(what: str) -> None:
    words = parse_qemu(f"qemu:raw:{what}")
    assert not words.is_path
    assert words.argv[-1] == what.replace("%3F", "?")


def test_luks_needs_its_key_and_commas_are_kept_apart() -> None:
    words = parse_qemu("qemu:luks:/a,b#key-file=/k,1")
    assert words.argv[-5:] == (
        "--object",
        "secret,id=key,file=/k,,1",
        "--image-opts",
        "--",
        "driver=luks,key-secret=key,file.driver=file,file.filename=/a,,b",
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qemu:", "write qemu:FORMAT:WHAT"),
        ("qemu:qcow2", "write qemu:FORMAT:WHAT"),
        ("qemu:/srv/x.qcow2:", "write qemu:FORMAT:WHAT"),
        ("qemu:qcow3:/x", "did you mean `qcow"),
        ("qemu:qcow2:", "write a path, or one of rbd:"),
        ('qemu:raw:json:{"driver":"file"}', "write a path, or one of"),
        ("qemu:raw:nvme://0", "write a path, or one of"),
        ("qemu:raw:fat:rw:/etc", "write a path, or one of"),
        ("qemu:raw:rbd:pool", "write rbd:POOL/IMAGE"),
        ("qemu:raw:rbd:p/i:log_file=/etc/x", "write rbd:POOL/IMAGE"),
        ("qemu:raw:rbd:p/i:key=secret", "write rbd:POOL/IMAGE"),
        ("qemu:raw:/x#connections=0", "connections is a number from 1 to 16"),
        ("qemu:raw:/x#connections=x", "connections is a number from 1 to 16"),
        ("qemu:raw:/x#source-timeout=-1", "source-timeout is a number from 0"),
        ("qemu:raw:rbd:a/b/c/d", "write rbd:POOL/IMAGE"),
        ("qemu:raw:/x#conections=4", "did you mean `connections'"),
        ("qemu:raw:/x#allow=all", "allow=references"),
        ("qemu:luks:/x", "belong together"),
        ("qemu:raw:/x#key-file=/k", "belong together"),
        ("qemu:luks:ssh://h/x#key-file=/k", "by its path only"),
        ("qemu:raw:/x%00y", "a character that no name"),
        ("qemu:raw:/x%0Ay", "a character that no name"),
    ],
)
def test_refused_names_of_qemu(name: str, reason: str) -> None:
    with pytest.raises(ResolveError) as caught:
        parse_qemu(name)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(name)


def test_plugin_with_parameters_and_filters() -> None:
    name = "nbdkit:file?file=/a%26b&filter=xz&filter=cache&fadvise=sequential"
    words = parse_nbdkit(name)
    assert words.argv == (
        "nbdkit",
        "--readonly",
        "--foreground",
        "--filter=xz",
        "--filter=cache",
        "file",
        "file=/a&b",
        "fadvise=sequential",
    )
    assert words.ids[0] == "plugin=file"
    assert "file=/a&b" in words.ids[1]


def test_secret_is_read_from_a_file() -> None:
    name = "nbdkit:ssh?host=h&path=/x&password=%2B/etc/key"
    assert "password=+/etc/key" in parse_nbdkit(name).argv


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nbdkit:", "the plugin is one of file"),
        ("nbdkit:sh?script=/x", "[helper.NAME]"),
        ("nbdkit:eval?get_size=rm", "[helper.NAME]"),
        ("nbdkit:/tmp/evil.so", "the plugin is one of"),
        ("nbdkit:data?data=%3C(rm)", "the plugin is one of"),
        ("nbdkit:files?file=/x", "did you mean `file'"),
        ("nbdkit:nbd?command=rm", "`command' cannot stand in a name"),
        ("nbdkit:nbd?socket-fd=3", "`socket-fd' cannot stand in a name"),
        ("nbdkit:curl?url=http://h/&header-script=x", "cannot stand in a name"),
        ("nbdkit:curl?url=http://h/&header=X", "cannot stand in a name"),
        ("nbdkit:file?file=/x&filter=tar&tar=/bin/rm", "cannot stand in a name"),
        ("nbdkit:file?file=/x&filter=log", "the filter is one of"),
        ("nbdkit:file?file=/x&filter=../x", "the filter is one of"),
        ("nbdkit:ssh?password=geheim", "password=+FILE"),
        ("nbdkit:file?/x", "is not KEY=VALUE"),
        ("nbdkit:file?--run=x", "is not KEY=VALUE"),
        ("nbdkit:file?file=/x#allow=references", "unknown option"),
        (
            "nbdkit:file?file=/x#connections=1&connections=2",
            "option `connections' stands twice",
        ),
    ],
)
def test_refused_names_of_nbdkit(name: str, reason: str) -> None:
    with pytest.raises(ResolveError) as caught:
        parse_nbdkit(name)
    assert reason in str(caught.value)


def test_command_of_the_configuration_file() -> None:
    commands: dict[str, tuple[str, ...]] = {"vault": ("nbdkit", "sh", "/x")}
    words = parse_configured("helper:vault#connections=1", commands)
    assert words.argv == ("nbdkit", "sh", "/x")
    assert words.connections == 1
    assert words.ids == ("helper=vault",)
    with pytest.raises(ResolveError, match=r"no \[helper.x\]: there are vault"):
        parse_configured("helper:x", commands)
    with pytest.raises(ResolveError, match="there is none"):
        parse_configured("helper:x", {})


@pytest.mark.parametrize(
    ("name", "absolute"),
    [
        ("qemu:qcow2:a.qcow2", "qemu:qcow2:/d 1/a.qcow2"),
        ("qemu:qcow2:../a%23.qcow2", "qemu:qcow2:/a%23.qcow2"),
        ("qemu:qcow2:/x/a.qcow2#allow=references", None),
        ("qemu:raw:rbd:pool/image", None),
        ("qemu:qcow2:s3://b/k%2520.qcow2", None),
        ("qemu:luks:a#key-file=k", "qemu:luks:/d 1/a#key-file=/d 1/k"),
        ("qemu:nothing", None),
    ],
)
def test_relative_paths_of_qemu(name: str, absolute: str | None) -> None:
    assert absolute_qemu(name, "/d 1") == (absolute or name)
    assert absolute_qemu(absolute or name, "/e") == (absolute or name)


@pytest.mark.parametrize(
    ("name", "absolute"),
    [
        ("nbdkit:file?file=a%26b&filter=xz", "nbdkit:file?file=/d/a%26b&filter=xz"),
        ("nbdkit:split?file=a&file=/b#connections=2", None),
        ("nbdkit:memory?size=1M", "nbdkit:memory?size=1M"),
        ("nbdkit:null", "nbdkit:null"),
    ],
)
def test_relative_paths_of_nbdkit(name: str, absolute: str | None) -> None:
    expected = absolute or "nbdkit:split?file=/d/a&file=/b#connections=2"
    assert absolute_nbdkit(name, "/d") == expected


def test_names_of_one_disk_have_one_identity() -> None:
    one = parse_qemu("qemu:raw:/x/../y#connections=1")
    other = parse_qemu("qemu:raw:/y")
    assert one.identity == other.identity
    assert one.identity != parse_qemu("qemu:qcow2:/y").identity


@pytest.mark.parametrize(
    "name",
    [
        "qemu:raw:ftps://me:hidden@h/a",
        "qemu:qcow2:ssh://me:hidden@h/a",
        "qemu:raw:iscsi://me%25hidden@h/a/1",
        "nbdkit:curl?url=https://me:hidden@h/a",
        "nbdkit:curl?url=https%3A//me%3Ahidden@h/a",
    ],
    ids=range(5),
)
def test_passwords_of_urls_are_refused(name: str) -> None:
    with pytest.raises(ResolveError, match="a password cannot stand in a name") as told:
        parse_qemu(name) if name.startswith("qemu") else parse_nbdkit(name)
    assert "hidden" not in str(told.value)


@pytest.mark.parametrize(
    "name",
    [
        "nbdkit:curl?url=https%3A//h/a%3Fsig=hidden",
        "nbdkit:curl?url=https://h/a%3Fsig=hidden&timeout=5",
    ],
    ids=range(2),
)
def test_signatures_are_used_and_not_shown(name: str) -> None:
    words = parse_nbdkit(name)
    assert "hidden" in "".join(words.argv)
    assert "hidden" not in words.shown + "".join(words.ids)
    assert "https://h/a" in words.shown
    assert parse_qemu("qemu:raw:/a?b").shown == "qemu:raw:/a?b"


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hidden@h/a.qcow2",
        "https://h/a.qcow2%3Fsig=hidden",
        "https://h/a.qcow2?sig=hidden",
        "s3://bucket/a.qcow2%23endpoint=http://h:9000",
    ],
    ids=range(4),
)
def test_image_on_the_web_is_a_container_of_ours(url: str) -> None:
    words = parse_qemu(f"qemu:qcow2:{url}#source-timeout=60")
    assert words.container == words.what == url.replace("%3F", "?").replace("%23", "#")
    assert not words.is_path
    assert words.source_timeout_s == 60
    argv = words.in_container("/proc/self/fd/70").argv
    assert argv[-2:] == (
        "--",
        "driver=qcow2,file.driver=nbd,file.server.type=unix,file.server.path=/proc/self/fd/70",
    )
    # No process gets to know the URL.
    assert "hidden" not in "".join((*argv, words.shown, *words.ids))


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        ("rbd:pool/image@snap#conf=/etc/c,1.conf&id=me", True),
        ("qemu:raw:rbd:pool/image@snap:id=me:conf=/etc/c,1.conf", False),
    ],
)
def test_image_of_ceph(name: str, is_ours: bool) -> None:
    words = parse_rbd_name(name) if is_ours else parse_qemu(name)
    assert words.argv[-2:] == (
        "--",
        "driver=raw,file.driver=rbd,file.pool=pool,file.image=image,file.snapshot=snap,"
        "file.conf=/etc/c,,1.conf,file.user=me",
    )
    assert words.ids == ("format=raw", "image=rbd:pool/image@snap")
    assert (
        words.identity
        == parse_rbd_name("rbd:pool/image@snap#id=me&conf=/etc/c,1.conf").identity
    )
    assert words.identity != parse_rbd_name("rbd:pool/image#id=me").identity


def test_relative_path_of_the_configuration_of_ceph() -> None:
    assert (
        absolute_rbd("rbd:a/b#id=x&conf=c.conf", "/d 1")
        == "rbd:a/b#id=x&conf=/d 1/c.conf"
    )
    assert absolute_rbd("rbd:a/b#conf=/c%23.conf", "/d") == "rbd:a/b#conf=/c%23.conf"
    assert absolute_rbd("rbd:a/b", "/d") == "rbd:a/b"


def test_name_of_an_image_is_encoded_once() -> None:
    name = qemu_name("qcow2", "https://h/50%25#pin=size&ca=/c")
    assert parse_qemu(name).container == "https://h/50%25#pin=size&ca=/c"
    assert absolute_qemu(name, "/d") == name
    relative = qemu_name("qcow2", "https://h/x#ca=c.pem")
    assert (
        parse_qemu(absolute_qemu(relative, "/d")).container == "https://h/x#ca=/d/c.pem"
    )


def test_file_that_a_helper_opens() -> None:
    assert parse_qemu("qemu:qcow2:/x/a").file == "/x/a"
    assert parse_nbdkit("nbdkit:file?file=/x&filter=xz").file == "/x"
    assert parse_nbdkit("nbdkit:split?file=/x&file=/y").file == ""
    assert parse_nbdkit("nbdkit:null").file == ""
    assert parse_qemu("qemu:raw:ssh://h/x").file == ""
