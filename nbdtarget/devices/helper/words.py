# SPDX-License-Identifier: Apache-2.0
"""Names of disks that a helper opens: text in, a checked command line out.

    qemu:FORMAT:WHAT          qemu-nbd opens WHAT, a path or one of PROTOCOLS, in FORMAT. Nothing is ever probed
    rbd:[POOL/]…              the same as qemu:raw:rbd:…, see `rbd_name.py`
    nbdkit:PLUGIN?KEY=VALUE   nbdkit's PLUGIN with these parameters, joined by `&`; `filter=NAME` adds a filter, outermost first
    helper:NAME               the command that the configuration file has in [helper.NAME]

An image on a web server or in an object store (`REMOTE`) is opened by ourselves, pinned and asked for again as any such image, and qemu-nbd reads
it from us (`container.py`). So options of that image stand in WHAT, with a mark that is encoded: `qemu:qcow2:https://h/x.qcow2%23source-timeout=60`.

WHAT and VALUE are %-decoded, so `%23` is a `#`, `%25` a `%` and `%26` a `&`. Behind a `#` stand options of ours, joined by `&`:

    connections=NUMBER   of NBD, between this server and its helper; 4
    source-timeout=SECONDS  how long a read waits for a helper that is started again; a day, and 0 is for ever
    allow=references     qemu: the image may name other files: a backing file, a data file, extents
    key-file=FILE        qemu:luks: the file that has the passphrase

*What is refused, and why.* A user who may load a table could otherwise run programs and write files with the rights of this
server. So plugins that run scripts or commands, filters that write files, and parameters that name a command are left out:
of nbdkit, only what `PLUGINS` and `FILTERS` list is started, and of QEMU's protocols those of `PROTOCOLS`. `json:` is not among
them, because a look at the image could not tell what it opens. Everything else can be a `helper:NAME`. Passwords do not stand in
a table, where many can read them, nor in the arguments of a process: `password=+FILE` reads one from a file.

Pure: nothing is opened, and no program is looked for.
"""

import difflib
import os
import re
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import unquote

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.numbers import maybe_number
from nbdtarget.common.redaction import has_secrets, redacted
from nbdtarget.devices.helper.rbd_name import RbdImage, parse_rbd, parse_rbd_of_qemu
from nbdtarget.devices.ranged.options import (
    SOURCE_TIMEOUT_S,
    SOURCE_TIMEOUT_S_MAX,
    absolute_options,
)

__all__ = [
    "CONNECTIONS",
    "CONNECTIONS_MAX",
    "FILTERS",
    "FORMATS",
    "HELPER_NAME",
    "PLUGINS",
    "PROTOCOLS",
    "REMOTE",
    "SPARE_CONNECTIONS",
    "ConfiguredName",
    "HelperName",
    "NbdkitName",
    "QemuName",
    "absolute_nbdkit",
    "absolute_qemu",
    "absolute_rbd",
    "container_of",
    "parse_configured",
    "parse_nbdkit",
    "parse_qemu",
    "parse_rbd_name",
    "qemu_name",
]

CONNECTIONS: Final = 4
CONNECTIONS_MAX: Final = 16
# More than are used: while old ones end, new ones are made, and the size is asked over one of its own.
SPARE_CONNECTIONS: Final = 4

FORMATS: Final = (
    "raw",
    "qcow2",
    "vmdk",
    "vhdx",
    "vdi",
    "vpc",
    "luks",
    "qcow",
    "qed",
    "parallels",
    "dmg",
    "bochs",
    "cloop",
)
REMOTE: Final = ("http", "https", "s3", "gs", "az")
PROTOCOLS: Final = (
    "rbd",
    *REMOTE,
    "ftp",
    "ftps",
    "ssh",
    "iscsi",
    "nfs",
    "nbd",
    "nbd+unix",
)
PLUGINS: Final = (
    "file",
    "curl",
    "ssh",
    "nfs",
    "nbd",
    "split",
    "partitioning",
    "floppy",
    "memory",
    "pattern",
    "random",
    "sparse-random",
    "full",
    "null",
    "zero",
)
FILTERS: Final = (
    "blocksize",
    "blocksize-policy",
    "bzip2",
    "cache",
    "cacheextents",
    "cow",
    "ddrescue",
    "delay",
    "error",
    "ext2",
    "extentlist",
    "gzip",
    "limit",
    "luks",
    "multi-conn",
    "nocache",
    "noextents",
    "noparallel",
    "offset",
    "partition",
    "qcow2dec",
    "rate",
    "readahead",
    "retry",
    "retry-request",
    "scan",
    "swab",
    "tar",
    "truncate",
    "xz",
)
# Parameters of these plugins that name a command or a descriptor, and those whose value is a secret.
_COMMAND_KEYS: Final = frozenset(
    {"command", "arg", "fd", "socket-fd", "header-script", "cookie-script", "tar"}
)
_SECRET_KEYS: Final = frozenset(
    {"password", "proxy-password", "cookie", "passphrase", "tls-psk"}
)
_HEADER_KEYS: Final = frozenset({"header"})
_PATH_KEYS: Final = frozenset({"file"})
HELPER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # in helper:NAME
_KEYS: Final = ("connections", "source-timeout")
_KEY: Final = re.compile(r"[a-z][a-z0-9-]*")
_USER: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)@")
_PROTOCOL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


@dataclass(frozen=True, slots=True)
class HelperName:
    """A name that was taken apart.

    Attributes:
        name: as the user wrote it.
        program: that opens the disk.
        connections: of NBD.
        source_timeout_s: how long a read waits while the helper is away; 0: for ever.
    """

    name: str
    program: str
    connections: int
    source_timeout_s: float = field(default=SOURCE_TIMEOUT_S, kw_only=True)

    @property
    def shown(self) -> str:
        """The name without what may be secret in a URL, for people and metadata."""
        decoded = unquote(self.name)
        return redacted(decoded if has_secrets(decoded) else self.name)

    @property
    def identity(self) -> Hashable:
        """Equal for each way to write the name of one disk."""
        raise NotImplementedError  # each kind of helper says it

    @property
    def ids(self) -> tuple[str, ...]:
        """Return the facts that tell the disk from others, as "key=value", for metadata."""
        raise NotImplementedError  # each kind of helper says it

    @property
    def file(self) -> str:
        """The path of the file that the disk lies in; empty: in none, or in one that is not known."""
        return ""

    @property
    def argv(self) -> tuple[str, ...]:
        """The program and its arguments; it finds the listening socket by itself."""
        raise NotImplementedError  # each kind of helper says it


@dataclass(frozen=True, slots=True)
class QemuName(HelperName):
    """`qemu:FORMAT:WHAT`.

    Attributes:
        what: an absolute path, or a URI of QEMU's.
        is_path: `what` is a path.
        allows_references: the image may name other files.
        container: the name of the disk of ours in which the image lies; empty: QEMU opens it by itself.
        container_socket: of an NBD server that has the container, as the helper calls it.
        rbd: what of Ceph the image is; None: it is none of Ceph's.
    """

    format: str
    what: str
    is_path: bool
    allows_references: bool = False
    key_file: str = ""
    container: str = ""
    container_socket: str = ""
    rbd: RbdImage | None = None

    @property
    def file(self) -> str:
        return self.what if self.is_path else ""

    def in_container(self, socket: str) -> "QemuName":
        """Return the name of the same image, which is read from this socket."""
        return replace(self, container_socket=socket)

    @property
    def identity(self) -> Hashable:
        if self.rbd is not None:
            return ("qemu", self.format, self.rbd)
        what = os.path.realpath(self.what) if self.is_path else self.what
        return ("qemu", self.format, what)

    @property
    def ids(self) -> tuple[str, ...]:
        image = str(self.rbd) if self.rbd is not None else redacted(self.what)
        return (f"format={self.format}", f"image={image}")

    @property
    def argv(self) -> tuple[str, ...]:
        # -t: it stays when the last client leaves. -e: several connections. -r: nothing is written.
        nr = self.connections + SPARE_CONNECTIONS
        words = ("--read-only", "--persistent", f"--shared={nr}")
        secret = f"secret,id=key,file={_option(self.key_file)}"
        key_words = ("--object", secret) if self.key_file else ()
        return (self.program, *words, *key_words, *self.image_words)

    @property
    def image_words(self) -> tuple[str, ...]:
        """How qemu-nbd and qemu-img are told which image it is, and in which format."""
        driver = f"driver={self.format}"
        if self.key_file:
            file = f"key-secret=key,file.driver=file,file.filename={_option(self.what)}"
        elif self.rbd is not None:
            options = {"driver": "rbd", **self.rbd.qemu_options()}
            file = ",".join(f"file.{k}={_option(v)}" for k, v in options.items())
        elif self.container:
            file = f"file.driver=nbd,file.server.type=unix,file.server.path={_option(self.container_socket)}"
        else:
            return (f"--format={self.format}", "--", self.what)
        return ("--image-opts", "--", f"{driver},{file}")


@dataclass(frozen=True, slots=True)
class NbdkitName(HelperName):
    """`nbdkit:PLUGIN?KEY=VALUE`.

    Attributes:
        filters: the outermost first.
        parameters: keys and values, decoded, in their order.
    """

    plugin: str
    filters: tuple[str, ...]
    parameters: tuple[tuple[str, str], ...]

    @property
    def identity(self) -> Hashable:
        return ("nbdkit", self.plugin, self.filters, self.parameters)

    @property
    def file(self) -> str:
        is_file = self.plugin == "file"
        return dict(self.parameters).get("file", "") if is_file else ""

    @property
    def ids(self) -> tuple[str, ...]:
        words = [f"filter={each}" for each in self.filters]
        words += [f"{key}={redacted(value)}" for key, value in self.parameters]
        return (f"plugin={self.plugin}", f"parameters={'&'.join(words)}")

    @property
    def argv(self) -> tuple[str, ...]:
        # Without --exit-with-parent: it would take SIGTERM in place of the SIGKILL that `launch.py` has asked for, and an
        # nbdkit that waits in accept() does not end at SIGTERM.
        return (
            self.program,
            "--readonly",
            "--foreground",
            *(f"--filter={each}" for each in self.filters),
            self.plugin,
            *(f"{key}={value}" for key, value in self.parameters),
        )


@dataclass(frozen=True, slots=True)
class ConfiguredName(HelperName):
    """`helper:NAME`, with the command of the configuration file."""

    helper: str
    command: tuple[str, ...]

    @property
    def identity(self) -> Hashable:
        return ("helper", self.helper)

    @property
    def ids(self) -> tuple[str, ...]:
        return (f"helper={self.helper}",)

    @property
    def argv(self) -> tuple[str, ...]:
        return self.command


def parse_qemu(name: str) -> QemuName:
    """Take `qemu:FORMAT:WHAT` apart. Raises: ResolveError."""
    head, _, fragment = name.partition("#")
    _, _, rest = head.partition(":")
    format_, colon, what = rest.partition(":")
    if not colon or format_ not in FORMATS:
        hint = _near(format_, FORMATS) if colon else ""
        raise ResolveError(
            name,
            f"write qemu:FORMAT:WHAT, where FORMAT is one of {', '.join(FORMATS)}{hint}",
        )
    what = _decoded(name, what)
    protocol = _protocol(what)
    if not what or (protocol is not None and protocol not in PROTOCOLS):
        raise ResolveError(
            name,
            "write a path, or one of " + ", ".join(f"{each}:" for each in PROTOCOLS),
        )
    rbd = parse_rbd_of_qemu(name, what) if protocol == "rbd" else None
    is_remote = protocol in REMOTE
    if (
        not is_remote
    ):  # the password of such a URL is with us, and in no process's arguments
        _check_url(name, what)
    options = _options(name, fragment, (*_KEYS, "allow", "key-file"))
    if options.get("allow", "references") != "references":
        raise ResolveError(name, "allow=references is all that can be allowed")
    key_file = options.get("key-file", "")
    if (format_ == "luks") is not bool(key_file):
        raise ResolveError(name, "qemu:luks:PATH and #key-file=FILE belong together")
    if key_file and protocol is not None:
        raise ResolveError(name, "a LUKS volume is opened by its path only")
    return QemuName(
        name,
        "qemu-nbd",
        _connections(name, options),
        format_,
        what,
        protocol is None,
        "allow" in options,
        key_file,
        container=what if is_remote else "",
        rbd=rbd,
        source_timeout_s=_source_timeout_s(name, options),
    )


def qemu_name(format_: str, what: str) -> str:
    """Return the name of an image in a format. Args: what: a path or a URL, not encoded."""
    return f"qemu:{format_}:{_quoted(what)}"


def container_of(name: str) -> str:
    """Return the URL of the file that an image lies in; of every other disk the name itself."""
    if not name.startswith("qemu:"):
        return name
    try:
        return parse_qemu(name).container or name
    except ResolveError:
        return name


def parse_rbd_name(name: str) -> QemuName:
    """Take `rbd:POOL/IMAGE@SNAPSHOT` apart. Raises: ResolveError."""
    head, _, fragment = name.partition("#")
    options = _options(name, fragment, (*_KEYS, "conf", "id"))
    what = _decoded(name, head.partition(":")[2])
    image = parse_rbd(name, what, options.get("conf", ""), options.get("id", ""))
    return QemuName(
        name,
        "qemu-nbd",
        _connections(name, options),
        "raw",
        what,
        is_path=False,
        rbd=image,
        source_timeout_s=_source_timeout_s(name, options),
    )


def parse_nbdkit(name: str) -> NbdkitName:
    """Take `nbdkit:PLUGIN?KEY=VALUE` apart. Raises: ResolveError."""
    head, _, fragment = name.partition("#")
    _, _, rest = head.partition(":")
    plugin, _, query = rest.partition("?")
    if plugin not in PLUGINS:
        raise ResolveError(
            name,
            f"the plugin is one of {', '.join(PLUGINS)}{_near(plugin, PLUGINS)};"
            " others can stand in the configuration file, as [helper.NAME]",
        )
    filters = []
    parameters = []
    for item in query.split("&"):
        if not item:
            continue
        key, equals, value = item.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise ResolveError(name, f"`{item}' is not KEY=VALUE")
        value = _decoded(name, value)
        if key == "filter":
            filters.append(value)
        else:
            _check_parameter(name, key, value)
            parameters.append((key, value))
    for each in filters:
        if each not in FILTERS:
            raise ResolveError(
                name,
                f"the filter is one of {', '.join(FILTERS)}{_near(each, FILTERS)}",
            )
    options = _options(name, fragment, _KEYS)
    return NbdkitName(
        name,
        "nbdkit",
        _connections(name, options),
        plugin,
        tuple(filters),
        tuple(parameters),
        source_timeout_s=_source_timeout_s(name, options),
    )


def parse_configured(name: str, commands: dict[str, tuple[str, ...]]) -> ConfiguredName:
    """Take `helper:NAME` apart. Raises: ResolveError.

    Args: commands: of the configuration file, by NAME.
    """
    head, _, fragment = name.partition("#")
    _, _, helper = head.partition(":")
    command = commands.get(helper)
    if command is None:
        there = (
            f"there are {', '.join(sorted(commands))}" if commands else "there is none"
        )
        raise ResolveError(
            name,
            f"the configuration file has no [helper.{helper}]: {there}",
        )
    options = _options(name, fragment, _KEYS)
    return ConfiguredName(
        name,
        command[0],
        _connections(name, options),
        helper,
        command,
        source_timeout_s=_source_timeout_s(name, options),
    )


def absolute_qemu(name: str, directory: str) -> str:
    """Return the name with the paths in it as they are called from anywhere."""
    head, mark, fragment = name.partition("#")
    scheme, _, rest = head.partition(":")
    format_, colon, what = rest.partition(":")
    if colon and what and _protocol(unquote(what)) is None:
        path = os.path.normpath(os.path.join(directory, _unquoted(what)))
        what = _quoted(path)
    elif _protocol(unquote(what)) in REMOTE:
        what = _quoted(absolute_options(_unquoted(what), directory))
    items = [
        f"key-file={_quoted(os.path.join(directory, _unquoted(item[9:])))}"
        if item.startswith("key-file=")
        else item
        for item in fragment.split("&")
    ]
    return f"{scheme}:{format_}{colon}{what}{mark}{'&'.join(items)}"


def absolute_rbd(name: str, directory: str) -> str:
    """Return the name with the path of `conf=` as it is called from anywhere."""
    head, mark, fragment = name.partition("#")
    items = [
        f"conf={_quoted(os.path.join(directory, _unquoted(item[5:])))}"
        if item.startswith("conf=")
        else item
        for item in fragment.split("&")
    ]
    return f"{head}{mark}{'&'.join(items)}"


def absolute_nbdkit(name: str, directory: str) -> str:
    """Return the name with the paths in it as they are called from anywhere."""
    head, mark, fragment = name.partition("#")
    plugin, question, query = head.partition("?")
    items = []
    for item in query.split("&"):
        key, equals, value = item.partition("=")
        if key in _PATH_KEYS and value:
            path = os.path.normpath(os.path.join(directory, _unquoted(value)))
            value = _quoted(path)
        items.append(f"{key}{equals}{value}")
    return f"{plugin}{question}{'&'.join(items)}{mark}{fragment}"


def _check_url(name: str, text: str) -> None:
    """Refuse a URL with a password. iSCSI has a % between user and password."""
    match = _USER.match(text)
    if match and (":" in match[1] or "%" in match[1]):
        raise ResolveError(
            f"{name.partition(':')[0]}:***",
            "a password cannot stand in a name, which many can read; it can stand in the configuration file, in a"
            " [helper.NAME]",
        )


def _check_parameter(name: str, key: str, value: str) -> None:
    _check_url(name, value)
    if key in _COMMAND_KEYS or key in _HEADER_KEYS:
        raise ResolveError(
            name,
            f"`{key}' cannot stand in a name; it can stand in the configuration file, in a"
            " [helper.NAME]",
        )
    if key in _SECRET_KEYS and not value.startswith("+"):
        raise ResolveError(
            name,
            f"a secret cannot stand in a name, which many can read: {key}=+FILE reads it from"
            " a file",
        )


def _options(name: str, fragment: str, keys: tuple[str, ...]) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in fragment.split("&"):
        if not item:
            continue
        key, _, value = item.partition("=")
        if key not in keys:
            raise ResolveError(
                name,
                f"unknown option `{key}' behind the #: write {', '.join(keys)}{_near(key, keys)}",
            )
        if key in options:
            raise ResolveError(name, f"option `{key}' stands twice behind the #")
        options[key] = _decoded(name, value)
    return options


def _connections(name: str, options: dict[str, str]) -> int:
    text = options.get("connections")
    if text is None:
        return CONNECTIONS
    connections = maybe_number(text, CONNECTIONS_MAX)
    if not connections:
        reason = f"connections is a number from 1 to {CONNECTIONS_MAX}, not {text}"
        raise ResolveError(name, reason)
    return connections


def _source_timeout_s(name: str, options: dict[str, str]) -> float:
    text = options.get("source-timeout")
    if text is None:
        return SOURCE_TIMEOUT_S
    seconds = maybe_number(text, SOURCE_TIMEOUT_S_MAX)
    if seconds is None:
        reason = (
            f"source-timeout is a number from 0 to {SOURCE_TIMEOUT_S_MAX}, not {text}"
        )
        raise ResolveError(name, reason)
    return float(seconds)


def _decoded(name: str, text: str) -> str:
    """Raises: ResolveError: not UTF-8, or with a NUL or a line break."""
    decoded = _unquoted(text)
    if not decoded.isprintable() and any(ord(each) < ord(" ") for each in decoded):
        raise ResolveError(name, "has a character that no name of a disk can have")
    return decoded


def _unquoted(text: str) -> str:
    return unquote(text, errors="surrogateescape")


def _quoted(path: str) -> str:
    """Encode what would be taken for a mark of the name."""
    for mark in "%#&":
        path = path.replace(mark, f"%{ord(mark):X}")
    return path


def _protocol(what: str) -> str | None:
    """Return the word before the first colon, if that is not part of a path."""
    match = _PROTOCOL.match(what)
    return match[1].lower() if match else None


def _option(value: str) -> str:
    """A value among QEMU's options, where a comma ends it."""
    return value.replace(",", ",,")


def _near(word: str, words: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, words, 1)
    return f" (did you mean `{near[0]}'?)" if near else ""
