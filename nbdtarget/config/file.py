# SPDX-License-Identifier: Apache-2.0
"""The configuration file: text in, a checked `Config` out, or every mistake with its line.

    listen = ["unix:/run/nbd.sock", "tcp:127.0.0.1:10809"]
    control = "/run/nbdtarget/control.sock"
    socket_mode = "0660"         # with socket_group, socket_owner; control_mode, …
    socket_group = "disk"
    stop_timeout = 60            # seconds; 0: for ever
    tls = "require"              # off, on; with tls_certificates, tls_verify_peer, tls_psk
    tls_certificates = "/etc/pki/nbdtarget"
    access = ["rw uid:root"]     # who may attach exports that have no rules of their own

    [limits]
    connections_max = 64         # of TCP, and as many of unix sockets
    peer_connections_max = 16    # of one address
    payload_max = "64M"          # or a number of bytes

    [helper.vault]               # what the disk helper:vault is opened by
    command = ["nbdkit", "-f", "-r", "sh", "/etc/vault.sh"]

    [device.disk]
    uuid = "CLONE-disk"          # optional
    readonly = false             # optional
    rotational = true            # optional: what clients are told; else as the disks below are
    access = ["rw cert:backup", "ro net:192.0.2.0/24"]   # optional; see `nbdtarget.common.access`
    table = '''
    0 2097152 clone /srv/disk.meta /srv/disk.img nbd://far/disk 128
    '''

An element of `listen` may be a table, for a listener with TLS of its own:
`{ address = "tcp:[::]:10809", tls = "require" }`.

Theory of operation. Everything that can be judged without opening a device is judged here, on
the whole file, before anything is opened: syntax, unknown keys, types, addresses, bounds, names,
each line of each table, which device stands on which. Relative paths mean the file's own
directory. Devices come out in an order in which they can be made: what stands on
`/dev/mapper/NAME` comes after NAME.
"""

import difflib
import tomllib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from nbdtarget.common.access import parse_rules
from nbdtarget.common.errors import (
    ConstructorError,
    ListenError,
    NbdTargetError,
    ResolveError,
    TableError,
)
from nbdtarget.common.units import SECTOR, parse_size
from nbdtarget.common.unix_socket import SocketOptions
from nbdtarget.common.words import split_words
from nbdtarget.config.limits import LIMIT_KEYS, SIZE_KEYS, limits_of, out_of_range
from nbdtarget.config.lines import Path as KeyPath
from nbdtarget.config.lines import value_lines
from nbdtarget.control.paths import control_address
from nbdtarget.devices.helper.words import HELPER_NAME
from nbdtarget.devices.http.url_command import check_url
from nbdtarget.dm.names import check_name, check_uuid
from nbdtarget.dm.open_devices import MAPPER
from nbdtarget.dm.table import TargetSpec, scan_table
from nbdtarget.server.address import parse_address
from nbdtarget.server.limits import Limits
from nbdtarget.server.tls import TLS_UNSAID, VERIFIES_WITHOUT_TLS, TlsOptions
from nbdtarget.targets.base import Target
from nbdtarget_protocol.handshake import TlsMode

__all__ = ["Config", "ConfigError", "DeviceConfig", "Mistake", "parse", "read"]

FILE_SIZE_MAX: Final = 16 << 20
LISTEN_MAX: Final = 64

_FILE_KEYS: Final[dict[str, Any]] = {
    "listen": list[str | dict[str, Any]] | str,
    "access": list[str],
    "tls": str,
    "tls_certificates": str,
    "tls_verify_peer": bool,
    "tls_psk": str,
    "control": str,
    "control_token_file": str,
    "control_read_token_file": str,
    "metrics": str,
    "metrics_devices": bool,
    "state": str,
    "control_starts_programs": bool,
    "stop_timeout": float,
    **dict.fromkeys(SocketOptions._fields, str),
    "limits": dict[str, Any],
    "url_commands": dict[str, list[str]],
    "device": dict[str, dict[str, Any]],
    "helper": dict[str, dict[str, Any]],
}
_DEVICE_KEYS: Final[dict[str, Any]] = {
    "table": list[str] | str,
    "uuid": str,
    "readonly": bool,
    "rotational": bool,
    "access": list[str],
}
_HELPER_KEYS: Final[dict[str, Any]] = {"command": list[str]}
_TLS_KEYS: Final = ("tls", "tls_certificates", "tls_verify_peer", "tls_psk")
_LISTEN_KEYS: Final[dict[str, Any]] = {
    "address": str,
    **{key: _FILE_KEYS[key] for key in _TLS_KEYS},
}
_SECONDS_MAX: Final = 86400.0 * 365


class Mistake(NamedTuple):
    """A mistake on a line; `line` counts from 1."""

    line: int
    reason: str


class ConfigError(NbdTargetError):
    """The file cannot be used. `mistakes` has all of them, in the file's order."""

    def __init__(self, path: str, mistakes: Iterable[Mistake]) -> None:
        self.path = path
        self.mistakes = sorted(mistakes)
        super().__init__(path, self.mistakes)

    def lines(self) -> list[str]:
        """One line for each mistake: `FILE:LINE: reason`."""
        return [f"{self.path}:{line}: {reason}" for line, reason in self.mistakes]

    def __str__(self) -> str:
        return "; ".join(self.lines())


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """One device. `specs` is its table; empty: it is made without one."""

    name: str
    table: str
    specs: tuple[TargetSpec, ...]
    uuid: str = ""
    read_only: bool = False
    rotational: bool | None = None
    access: tuple[str, ...] | None = None

    def stands_on(self) -> set[str]:
        """The names of the mapped devices that the table names."""
        return {
            word.removeprefix(MAPPER)
            for spec in self.specs
            for word in spec.args
            if word.startswith(MAPPER)
        }


@dataclass(frozen=True, slots=True)
class Config:
    """A whole file. `directory`: absolute, where its relative paths are meant.

    Args:
        listen_tls: by address, what a listener says of its own.
        access: rules of exports that have none of their own; None: there are none.
        url_commands: by the URL of a source, the words of a command that prints it anew.
        helpers: the commands of `helper:NAME`, by NAME.
        control_starts_programs: tables that come over a control socket on TCP may name disks which a program opens.
    """

    path: str
    directory: str
    listen: tuple[str, ...]
    control: str | None
    control_token_file: str | None
    stop_timeout: float | None
    sockets: SocketOptions
    limits: Limits
    devices: tuple[DeviceConfig, ...]
    control_read_token_file: str | None = None
    metrics: str | None = None
    metrics_devices: bool | None = None
    tls: TlsOptions = TLS_UNSAID
    listen_tls: Mapping[str, TlsOptions] = field(default_factory=dict)
    access: tuple[str, ...] | None = None
    state: str | None = None
    url_commands: Mapping[str, list[str]] = field(default_factory=dict)
    helpers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    control_starts_programs: bool = False

    @property
    def access_by_export(self) -> dict[str, tuple[str, ...]]:
        """The rules of the devices that have some."""
        return {
            device.name: device.access
            for device in self.devices
            if device.access is not None
        }


def read(
    path: str, types: Mapping[str, type[Target]], existing: Container[str] = ()
) -> Config:
    """Read and check a file.

    Args:
        types: by their names in tables.
        existing: names of mapped devices that are there already.
    Raises: ConfigError; NbdTargetError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_SIZE_MAX + 1)
    except OSError as error:
        raise NbdTargetError(f"{path}: {error.strerror or error}") from None
    if len(data) > FILE_SIZE_MAX:
        raise NbdTargetError(f"{path}: more than {FILE_SIZE_MAX} bytes")
    try:
        text = data.decode(
            "utf-8-sig"
        )  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            path, [Mistake(line, "not UTF-8: save the file in that encoding")]
        ) from None
    return parse(text, path, types, existing)


def parse(
    text: str,
    path: str,
    types: Mapping[str, type[Target]],
    existing: Container[str] = (),
) -> Config:
    """Check the text of a file; `read` says how. Raises: ConfigError, with every mistake."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, [_syntax_mistake(text, error)]) from None
    except RecursionError:
        raise ConfigError(path, [Mistake(1, "not TOML: nested too deeply")]) from None
    reader = _Reader(document, value_lines(text), types, existing)
    config = reader.config(path)
    if reader.mistakes:
        raise ConfigError(path, reader.mistakes)
    return config


def _syntax_mistake(text: str, error: tomllib.TOMLDecodeError) -> Mistake:
    """The parser ends its message with "(at line N, column M)" or "(at end of document)"."""
    reason, _, where = str(error).rpartition(" (at ")
    words = where.replace(",", "").split()
    if words[:1] == ["line"]:
        return Mistake(int(words[1]), f"not TOML: {reason}")
    return Mistake(text.count("\n") + 1, f"not TOML: {reason or error}")


class _Reader:
    """One reading. Goes on after a mistake, with what is right of the rest."""

    def __init__(
        self,
        document: dict[str, Any],
        lines: dict[KeyPath, int],
        types: Mapping[str, type[Target]],
        existing: Container[str],
    ) -> None:
        self.mistakes: list[Mistake] = []
        self._listen_tls: dict[str, TlsOptions] = {}
        self._existing = existing
        self._document = document
        self._lines = lines
        self._types = types

    def config(self, path: str) -> Config:
        keys = self._known((), self._document, _FILE_KEYS)
        devices = self._devices(keys.get("device", {}))
        directory = Path(path).absolute().parent
        control = keys.get("control")
        metrics = keys.get("metrics")
        tls = self._tls((), keys, directory)
        listen = self._listeners(keys.get("listen", []), directory, tls)
        return Config(
            path=path,
            directory=str(directory),
            listen=self._listen(listen, directory),
            control=None if control is None else self._control(control, directory),
            control_token_file=_path(keys, "control_token_file", directory),
            control_read_token_file=_path(keys, "control_read_token_file", directory),
            stop_timeout=self._seconds("stop_timeout", keys),
            metrics=None
            if metrics is None
            else self._control(metrics, directory, "metrics"),
            metrics_devices=keys.get("metrics_devices"),
            sockets=self._sockets(keys),
            limits=self._limits(keys.get("limits", {})),
            devices=self._in_order(devices),
            tls=tls,
            listen_tls=self._listen_tls,
            access=self._access((), keys),
            state=_path(keys, "state", directory),
            url_commands=self._url_commands(keys.get("url_commands", {})),
            helpers=self._helpers(keys.get("helper", {})),
            control_starts_programs=keys.get("control_starts_programs", False),
        )

    def _url_commands(self, values: dict[str, list[str]]) -> dict[str, list[str]]:
        for url, words in values.items():
            try:
                check_url(url)
            except ResolveError as error:
                self._mistake(("url_commands", url), f"`url_commands': {error}")
            if not words:
                self._mistake(("url_commands", url), "the command names no program")
        return values

    def _mistake(self, path: KeyPath, reason: str) -> None:
        self.mistakes.append(Mistake(self._lines[path], reason))

    def _known(
        self, path: KeyPath, values: dict[str, Any], keys: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the values whose key is known and whose type is right."""
        known = {}
        for key, value in values.items():
            where = ".".join(str(part) for part in (*path, key))
            if key not in keys:
                near = difflib.get_close_matches(key, keys, 1)
                hint = f" (did you mean `{near[0]}'?)" if near else ""
                self._mistake((*path, key), f"unknown key `{where}'{hint}")
                continue
            texts = value if isinstance(value, list) else [value]
            if any(isinstance(text, str) and "\0" in text for text in texts):
                self._mistake((*path, key), f"`{where}': has a NUL character")
                continue
            try:
                known[key] = msgspec.convert(value, keys[key])
            except msgspec.ValidationError as error:
                reason = str(error).partition(" - at ")[0]
                self._mistake((*path, key), f"`{where}': {reason}")
        return known

    def _tls(self, path: KeyPath, keys: dict[str, Any], directory: Path) -> TlsOptions:
        """Return the TLS options of the file, or of one listener in it."""
        files = {
            key: None if keys.get(key) is None else str(directory / keys[key])
            for key in ("tls_certificates", "tls_psk")
        }
        options = TlsOptions(
            keys.get("tls"),
            files["tls_certificates"],
            keys.get("tls_verify_peer"),
            files["tls_psk"],
        )
        try:
            _ = options.tls_mode
        except NbdTargetError as error:
            self._mistake((*path, "tls"), f"`tls': {error}")
            return TlsOptions()
        return options

    def _listeners(
        self,
        listen: list[str | dict[str, Any]] | str,
        directory: Path,
        default: TlsOptions,
    ) -> list[str] | str:
        """The addresses, and what each says of TLS."""
        if isinstance(listen, str):
            return listen
        addresses = []
        for nr, each in enumerate(listen):
            if isinstance(each, str):
                addresses.append(each)
                continue
            path: KeyPath = ("listen", nr)
            known = self._known(path, each, _LISTEN_KEYS)
            address = known.get("address")
            if address is None:
                self._mistake(path, "`listen': a listener needs an `address'")
                address = f"tcp:127.0.0.1:{nr}"  # nothing is opened any more
            options = self._tls(path, known, directory)
            merged = options.or_else(default)
            try:
                merged.check()
                if options.verify_peer and merged.tls_mode is TlsMode.OFF:
                    raise NbdTargetError(VERIFIES_WITHOUT_TLS)
            except NbdTargetError as error:
                self._mistake(path, f"`listen': {error}")
            self._listen_tls[_absolute(address, directory)] = options
            addresses.append(address)
        return addresses

    def _helpers(
        self, helpers: dict[str, dict[str, Any]]
    ) -> dict[str, tuple[str, ...]]:
        found = {}
        for name, values in helpers.items():
            path: KeyPath = ("helper", name)
            if not HELPER_NAME.fullmatch(name):
                reason = "the name of a helper has letters, digits, `.', `-' and `_'"
                self._mistake(path, reason)
            command = self._known(path, values, _HELPER_KEYS).get("command")
            if command and command[0]:
                found[name] = tuple(command)
            elif command is not None or not values:
                self._mistake(path, "`command' names a program and its arguments")
        return found

    def _access(self, path: KeyPath, keys: dict[str, Any]) -> tuple[str, ...] | None:
        rules = keys.get("access")
        if rules is None:
            return None
        for nr, rule in enumerate(rules):
            try:
                parse_rules([rule])
            except NbdTargetError as error:
                self._mistake((*path, "access", nr), f"`access': {error}")
        return tuple(rules)

    def _listen(self, listen: list[str] | str, directory: Path) -> tuple[str, ...]:
        is_list = isinstance(listen, list)
        addresses = listen if isinstance(listen, list) else [listen]
        if len(addresses) > LISTEN_MAX:
            self._mistake(("listen",), f"more than {LISTEN_MAX} addresses")
        absolute = []
        for nr, address in enumerate(addresses):
            path: KeyPath = ("listen", nr) if is_list else ("listen",)
            try:
                parse_address(address)
                address = _absolute(address, directory)
                parse_address(address)
            except ListenError as error:
                self._mistake(path, f"`listen': {error}")
                continue
            if address in absolute:
                self._mistake(path, f"`listen': {address} is named twice")
            absolute.append(address)
        return tuple(absolute)

    def _control(self, control: str, directory: Path, key: str = "control") -> str:
        try:
            address = control_address(control)
        except NbdTargetError as error:
            self._mistake((key,), f"`{key}': {error}")
            return control
        return str(directory / address) if isinstance(address, Path) else control

    def _sockets(self, keys: dict[str, Any]) -> SocketOptions:
        options = SocketOptions(*(keys.get(name) for name in SocketOptions._fields))
        for name in SocketOptions._fields:
            one = SocketOptions(**{name: keys.get(name)})
            try:
                _ = one.listen, one.control
            except NbdTargetError as error:
                self._mistake((name,), f"`{name}': {error}")
        return options

    def _seconds(self, key: str, values: dict[str, Any]) -> float | None:
        seconds: float | None = values.get(key)
        if seconds is not None and not 0 <= seconds <= _SECONDS_MAX:
            self._mistake((key,), f"`{key}': must be 0 to {_SECONDS_MAX:.16g}")
        return seconds

    def _limits(self, values: dict[str, Any]) -> Limits:
        path: KeyPath = ("limits",)
        known = self._known(path, self._sizes(path, values), LIMIT_KEYS)
        for key, value in list(known.items()):
            if reason := out_of_range(key, value):
                self._mistake((*path, key), f"`limits.{key}': {reason}")
                del known[key]
        found, key, reason = limits_of(known)
        if reason:
            self._mistake((*path, key), f"`limits': {reason}")
        return found

    def _sizes(self, path: KeyPath, values: dict[str, Any]) -> dict[str, Any]:
        """The values with each size that is written as text (64M) as a number of bytes."""
        sizes = {}
        for key, value in values.items():
            if key in SIZE_KEYS and isinstance(value, str):
                try:
                    sizes[key] = parse_size(value)
                except ValueError as error:
                    self._mistake((*path, key), f"`limits.{key}': {error}")
            else:
                sizes[key] = value
        return sizes

    def _devices(self, devices: dict[str, dict[str, Any]]) -> list[DeviceConfig]:
        made = []
        uuids: dict[str, str] = {}
        for name, values in devices.items():
            path: KeyPath = ("device", name)
            try:
                check_name(name)
            except TableError as error:
                self._mistake(path, error.reason)
            known = self._known(path, values, _DEVICE_KEYS)
            uuid = known.get("uuid", "")
            try:
                check_uuid(uuid)
            except TableError as error:
                self._mistake((*path, "uuid"), error.reason)
            if uuid and uuids.setdefault(uuid, name) != name:
                self._mistake(
                    (*path, "uuid"),
                    f"the UUID of device {uuids[uuid]}: each device needs one of its own, or none",
                )
            table, specs = self._table((*path, "table"), known.get("table"))
            read_only = known.get("readonly", False)
            rotational = known.get("rotational")
            access = self._access(path, known)
            made.append(
                DeviceConfig(name, table, specs, uuid, read_only, rotational, access)
            )
        return made

    def _table(
        self, path: KeyPath, table: list[str] | str | None
    ) -> tuple[str, tuple[TargetSpec, ...]]:
        if table is None:
            return "", ()
        text = "\n".join(table) if isinstance(table, list) else table
        specs, mistakes = scan_table(text, self._types)
        for line_nr, reason in mistakes:
            self._mistake(self._table_line(path, line_nr), reason)
        for spec in () if mistakes else specs:
            try:
                self._types[spec.type_name].check_words(spec.args)
            except ConstructorError as error:
                line = self._table_line(path, _line_of(text, spec))
                self._mistake(line, str(error))
        return text, tuple(specs)

    def _table_line(self, path: KeyPath, line_nr: int) -> KeyPath:
        """Where a line of a table stands, from 1: an element, or a line of a long string."""
        line = (*path, line_nr - 1)
        return line if line in self._lines else path

    def _in_order(self, devices: list[DeviceConfig]) -> tuple[DeviceConfig, ...]:
        """Lower devices first. A device that is missing, or that stands on itself, is a mistake."""
        by_name = {device.name: device for device in devices}
        below = {device.name: device.stands_on() for device in devices}
        for name, lower in below.items():
            for missing in sorted(lower - below.keys()):
                if missing not in self._existing and not Path(MAPPER, missing).exists():
                    reason = f"{MAPPER}{missing}: no device of this name is in the file or on the server"
                    self._mistake(self._line_with(by_name[name], missing), reason)
        sorter = TopologicalSorter(
            {name: lower & below.keys() for name, lower in below.items()}
        )
        try:
            order = list(sorter.static_order())
        except CycleError as error:
            cycle = error.args[1]
            reason = f"a device cannot stand on itself: {' stands on '.join(reversed(cycle))}"
            self._mistake(self._line_with(by_name[cycle[-1]], cycle[-2]), reason)
            return ()
        return tuple(by_name[name] for name in order)

    def _line_with(self, device: DeviceConfig, lower: str) -> KeyPath:
        """Where the table of `device` first names the mapped device `lower`."""
        path = ("device", device.name, "table")
        for line_nr, line in enumerate(device.table.split("\n"), 1):
            words = split_words(line)
            if MAPPER + lower in words and not words[0].startswith("#"):
                return self._table_line(path, line_nr)
        raise AssertionError(f"{device.name} does not name {lower}")


def _path(keys: Mapping[str, Any], key: str, directory: Path) -> str | None:
    return str(directory / keys[key]) if key in keys else None


def _absolute(address: str, directory: Path) -> str:
    """The address, with the path of a unix socket as the file means it."""
    family, _, path = address.partition(":")
    return f"unix:{directory / path}" if family == "unix" and path else address


def _line_of(table: str, spec: TargetSpec) -> int:
    """The line of a table, from 1, where the target stands."""
    begin = str(spec.begin // SECTOR)
    for line_nr, line in enumerate(table.split("\n"), 1):
        if line.split()[:1] == [begin]:
            return line_nr
    return 1
