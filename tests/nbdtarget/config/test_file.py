# SPDX-License-Identifier: Apache-2.0
"""A configuration file: read whole, or refused with every mistake and its line."""

from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.unix_socket import SocketOptions
from nbdtarget.config.file import Config, ConfigError, parse, read
from nbdtarget.config.render import listen_address, render_config, render_devices
from nbdtarget.server.limits import Limits
from nbdtarget.server.tls import TlsOptions
from nbdtarget.targets.registry import TARGET_TYPES

TYPES = ", ".join(sorted(TARGET_TYPES))


def parsed(text: str, *existing: str) -> Config:
    return parse(text, "/etc/disks.toml", TARGET_TYPES, existing)


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    return [line.removeprefix("/etc/disks.toml:") for line in caught.value.lines()]


def test_an_empty_file_is_a_server_without_devices() -> None:
    config = parsed("")
    assert config == Config(
        "/etc/disks.toml", "/etc", (), None, None, None, SocketOptions(), Limits(), ()
    )


def test_a_whole_file() -> None:
    config = parsed(
        """
        listen = ["unix:nbd.sock", "tcp:[::1]:10809"]
        control = "run/control.sock"
        [limits]
        connections_max = 3
        handshake_timeout_s = 2
        payload_max = "2M"
        [device.top]
        table = "0 8 linear /dev/mapper/low 8"
        readonly = true
        [device.low]
        uuid = "LOW"
        table = ["0 8 zero", "8 8 error"]
        [device.later]
        """
    )
    assert config.listen == ("unix:/etc/nbd.sock", "tcp:[::1]:10809")
    assert config.control == "/etc/run/control.sock"
    assert config.limits == Limits(
        connections_max=3,
        handshake_timeout_s=2.0,
        payload_max=2 << 20,
    )
    by_name = {device.name: device for device in config.devices}
    assert list(by_name).index("low") < list(by_name).index("top")
    assert by_name["top"].read_only
    assert by_name["low"].uuid == "LOW"
    assert [spec.type_name for spec in by_name["low"].specs] == ["zero", "error"]
    assert by_name["later"].specs == ()


def test_commands_that_print_urls() -> None:
    config = parsed('url_commands = { "https://h/a" = ["sign", "a b"] }')
    assert config.url_commands == {"https://h/a": ["sign", "a b"]}
    lines = mistakes('[url_commands]\n"https://" = ["x"]\n"https://h/a" = []\n')
    assert lines == [
        "2: `url_commands': https://: the URL names no host",
        "3: the command names no program",
    ]


def test_every_mistake_is_named_with_its_line() -> None:
    found = mistakes(
        """listen = ["unix:/run/a", "ftp:x",
          "unix:/run/a"]
contrl = "/run/c"
[limits]
connections_max = 0
requests_in_flight_max = 5000
payload_max = "big"
[device.a]
table = '''
0 8 zero
# nothing
9 8 zerro
8 zero
'''
colour = "red"
[device.b]
uuid = "U"
readonly = 1
table = ["0 8 zero",
         "8 0 zero"]
[device.c]
uuid = "U"
[device."d/e"]
table = "0 8 linear /dev/mapper/nowhere 0"
[device.f]
table = '''

'''
"""
    )
    assert found == [
        "1: `listen': ftp:x: is not an address to listen on: write unix:PATH,"
        " tcp:HOST:PORT or vsock:CID:PORT, for example tcp:127.0.0.1:10809",
        "2: `listen': unix:/run/a is named twice",
        "3: unknown key `contrl' (did you mean `control'?)",
        "5: `limits.connections_max': must be 1 to 2147483647",
        "6: `limits': requests_in_flight_max 5000 is more than requests_total_max 4096",
        "7: `limits.payload_max': not a size: 'big' (write 4096, 64K, 1G, …)",
        "12: zerro: Gap in table: line 3 starts at sector 9 instead of 8",
        f"12: zerro: unknown target type: there are {TYPES}",
        "13: Invalid format on line 4 of table: expected `start length type args…'",
        "15: unknown key `device.a.colour'",
        "18: `device.b.readonly': Expected `bool`, got `int`",
        "20: zero-length target on line 2 of table",
        "22: the UUID of device b: each device needs one of its own, or none",
        "23: Device name 'd/e' is not allowed",
        "24: /dev/mapper/nowhere: no device of this name is in the file or on the server",
        "27: Empty table",
    ]


def test_words_that_no_device_makes_right_are_mistakes_of_the_file() -> None:
    found = mistakes(
        """[device.a]
table = '''
0 8 zero
8 8 linear missing.img here
'''
[device.b]
table = "0 8 clone m d s 12"
[device.c]
table = "0 8 clone m d s 8 1 hydrate_never"
[device.d]
table = "0 8 cache m c o 64 0 lru 0"
[device.e]
table = "0 8 cache m c o 64 1 writebak default 0"
"""
    )
    assert found[0] == "4: linear: Invalid device sector"
    assert found[1].startswith("7: clone: Region size is not a power of 2: `12' is not")
    assert found[2].startswith("9: clone: Invalid feature argument")
    assert found[3].startswith("11: cache: Error creating cache's policy")
    assert found[4].startswith("13: cache: Unrecognised cache feature requested")


def test_devices_that_stand_on_each_other() -> None:
    loop = "\n".join(
        f'[device.{name}]\ntable = "0 8 linear /dev/mapper/{below} 0"'
        for name, below in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a"))
    )
    (only,) = mistakes(loop)
    assert only.split(": ", 1)[1].count(" stands on ") == 3
    (only,) = mistakes('[device.a]\ntable = "0 8 linear /dev/mapper/a 0"')
    assert only == "2: a device cannot stand on itself: a stands on a"


def test_what_is_missing_below_stands_on_its_own_line() -> None:
    found = mistakes(
        """[device.a]
table = '''

# /dev/mapper/none
0 8 zero
8 8 linear /dev/mapper/none 0
16 8 linear /dev/mapper/none 8
'''
[device.b]
table = [
    "0 8 zero",
    "8 8 linear /dev/mapper/nil 0",
    "16 8 linear /dev/mapper/b 0",
]
[device.c]
table = "0 8 zero\\n8 8 nosuch"
"""
    )
    assert found == [
        "6: /dev/mapper/none: no device of this name is in the file or on the server",
        "12: /dev/mapper/nil: no device of this name is in the file or on the server",
        "13: a device cannot stand on itself: b stands on b",
        f"16: nosuch: unknown target type: there are {TYPES}",
    ]


def test_a_device_that_is_there_already_may_be_stood_on() -> None:
    text = '[device.a]\ntable = "0 8 linear /dev/mapper/there 0"'
    assert parsed(text, "there").devices[0].stands_on() == {"there"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = ", "1: not TOML: Invalid value"),
        ("a = 1\na = 2\n", "2: not TOML: Cannot overwrite a value"),
        ('[x]\ny = "', "2: not TOML: Unterminated string"),
        ("device = 3", "1: `device': Expected `object`, got `int`"),
        ("[device]\na = 3", "1: `device': Expected `object`, got `int`"),
        ("listen = 3", "1: `listen': Expected `str | array`, got `int`"),
        ("listen = [3]", "1: `listen': Expected `str | object`, got `int`"),
        ("listen = [{}]", "1: `listen': a listener needs an `address'"),
        (
            "listen = [\n{ address = 'unix:s', tsl = 'on' }]",
            "2: unknown key `listen.0.tsl' (did you mean `tls'?)",
        ),
        (
            "listen = [{ address = 'unix:s', tls = 'on' }]",
            "1: `listen': tls on: needs the directory of the certificates (--tls-certificates DIR, or"
            " tls_certificates in the configuration file)",
        ),
        ("tls = 'yes'", "1: `tls': tls yes: is none of off, on and require"),
        (
            "access = ['rw any',\n'alice']",
            "2: `access': rule `alice': begins with none of rw, ro and none, as in `rw cert:alice'",
        ),
        (
            "[helper.x]\ncommand = []",
            "1: `command' names a program and its arguments",
        ),
        ("[helper.x]", "1: `command' names a program and its arguments"),
        (
            "[helper.'a b']\ncommand = ['x']",
            "1: the name of a helper has letters, digits, `.', `-' and `_'",
        ),
        (
            "[helper.x]\ncomand = ['x']",
            "2: unknown key `helper.x.comand' (did you mean `command'?)",
        ),
        (
            "[device.a]\naccess = ['rw uid:nobody-at-all']",
            "2: `access': rule `rw uid:nobody-at-all': there is no user nobody-at-all",
        ),
        (f"a = {'[' * 5000}{']' * 5000}", "1: not TOML: nested too deeply"),
        (r'control = "a\u0000"', "1: `control': has a NUL character"),
        (
            r'control_token_file = "\u0000"',
            "1: `control_token_file': has a NUL character",
        ),
        (r'listen = ["unix:\u0000"]', "1: `listen': has a NUL character"),
        (
            "limits.payload_max = 4096",
            "1: `limits.payload_max': must be 65536 to 4294967295",
        ),
        (
            "limits.backlog_max = 1_000_000_000_000",
            "1: `limits.backlog_max': must be 1 to 2147483647",
        ),
        (
            "limits.stall_timeout_s = inf",
            "1: `limits.stall_timeout_s': must be 0.001 to 31536000",
        ),
        (
            "limits.stall_timeout_s = nan",
            "1: `limits.stall_timeout_s': must be 0.001 to 31536000",
        ),
    ],
)
def test_what_is_no_configuration(text: str, reason: str) -> None:
    assert mistakes(text) == [reason]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NbdTargetError, match="No such file or directory"):
        read(str(tmp_path / "none"), TARGET_TYPES)
    with pytest.raises(NbdTargetError, match="Is a directory"):
        read(str(tmp_path), TARGET_TYPES)
    marked = tmp_path / "marked"
    marked.write_bytes(b'\xef\xbb\xbf[device.a]\r\ntable = "0 8 zero"\r\n')
    assert [device.name for device in read(str(marked), TARGET_TYPES).devices] == ["a"]
    binary = tmp_path / "binary"
    binary.write_bytes(b"a = 1\nb = '\xff'")
    with pytest.raises(ConfigError, match=f"{binary}:2: not UTF-8"):
        read(str(binary), TARGET_TYPES)


def test_what_is_written_out_reads_back() -> None:
    config = parsed(
        r"""
        [device."my \"disk\""]
        uuid = 'a\b'
        readonly = true
        table = '''
        0 8 linear /srv/it\ is 0
        8 8 zero'''
        [device.plain]
        table = "0 8 linear /srv/'''quotes 0"
        rotational = true
        [device.empty]
        rotational = false
        """
    )
    again = parsed(render_devices(config.devices))
    assert [
        (d.name, d.uuid, d.read_only, d.rotational, d.specs) for d in again.devices
    ] == [(d.name, d.uuid, d.read_only, d.rotational, d.specs) for d in config.devices]


def test_where_the_server_listens_is_written_out_too() -> None:
    config = parsed('[device.a]\ntable = "0 8 zero"\n')
    listen = ("unix:/run/n b.sock", "tcp:[::1]:10809")
    again = parsed(render_config(config.devices, listen))
    assert (again.listen, again.devices[0].specs) == (listen, config.devices[0].specs)


def test_nothing_is_written_of_listeners_that_are_not_known() -> None:
    assert parsed(render_config((), ())).listen == ()


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("nbd+unix:///{name}?socket=/run/n%20b.sock", "unix:/run/n b.sock"),
        ("nbd://127.0.0.1:10809/{name}", "tcp:127.0.0.1:10809"),
        ("nbd://[::1]:7/{name}", "tcp:[::1]:7"),
        ("nbd+vsock://2:10809/{name}", "vsock:any:10809"),
        ("nbds+vsock://1:4000000000/{name}", "vsock:1:4000000000"),
    ],
)
def test_uri_of_a_listener_becomes_the_address_to_listen_on(
    uri: str, address: str
) -> None:
    assert listen_address(uri) == address


def test_listeners_may_have_tls_of_their_own() -> None:
    config = parse(
        'tls = "require"\ntls_certificates = "pki"\n'
        'listen = ["unix:s", { address = "unix:t", tls = "off" },'
        ' { address = "tcp:[::1]:1", tls_verify_peer = true, tls_certificates = "/other" }]\n',
        "/etc/n/x.toml",
        {},
    )
    assert config.listen == ("unix:/etc/n/s", "unix:/etc/n/t", "tcp:[::1]:1")
    assert config.tls == TlsOptions("require", "/etc/n/pki")
    assert config.listen_tls == {
        "unix:/etc/n/t": TlsOptions("off"),
        "tcp:[::1]:1": TlsOptions(None, "/other", True),
    }


def test_helpers_are_commands_by_name() -> None:
    text = (
        "control_starts_programs = true\n[helper.vault]\ncommand = ['nbdkit', 'null']\n"
    )
    config = parse(text, "/x.toml", {})
    assert config.helpers == {"vault": ("nbdkit", "null")}
    assert config.control_starts_programs
    assert not parse("", "/x.toml", {}).control_starts_programs


def test_rules_are_those_of_a_device_or_of_all() -> None:
    text = 'access = ["none any"]\n[device.a]\naccess = ["rw uid:0"]\n[device.b]\n[device.c]\naccess = []\n'
    config = parse(text, "/x.toml", {})
    assert config.access == ("none any",)
    assert config.access_by_export == {"a": ("rw uid:0",), "c": ()}
