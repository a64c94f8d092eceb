# SPDX-License-Identifier: Apache-2.0
"""Who may attach to which export: rules, each of which is one line.

    rw cert:backup-*.example.org         a client whose certificate has this name
    ro cert:* net:192.0.2.0/24           any verified certificate, from this network
    rw uid:alice                         a process of this user, over a unix socket
    ro gid:disk                          a process of this group; supplementary groups count
    none any

Theory of operation. A rule is an access (`rw`, `ro`, `none`) and conditions, which must all hold:

    cert:GLOB    a name in the client's certificate: subject CN or any SAN, as it is written there. The listener
                 must verify certificates (--tls-verify-peer), otherwise no client has a name
    uid:USER, gid:GROUP    of the client's process when it connected, as the kernel tells (SO_PEERCRED, SO_PEERGROUPS)
    net:NETWORK  the address of a TCP client; ADDRESS or ADDRESS/BITS
    vsock:CID    the virtual machine of this number, over vsock; 1 is this machine itself
    tls          the connection is encrypted
    unix, vsock, any    any client of a unix socket, or of vsock; any client at all

The first rule that holds decides, and a client for which none holds may not attach. An export that has no rules takes those
of the server (`default`), and if there are none either, everybody who can connect may read and write.

An export that a client may not attach does not exist for it: it is not in LIST, and asking for it by name is
answered as for an export that does not exist.
"""

import grp
import ipaddress
import pwd
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.numbers import ID_MAX, maybe_number

__all__ = ["Access", "AccessRules", "Identity", "Rule", "parse_rule", "parse_rules"]

RULES_MAX: Final = 1000  # of one export


class Access(Enum):
    """The rights of a client on an export."""

    NONE = "none"
    READ = "ro"
    WRITE = "rw"


@dataclass(frozen=True, slots=True)
class Identity:
    """The facts about a client that rules may ask for.

    Args:
        address: of TCP; else "".
        uid, gids: of the process at the other end of a unix socket; else None and empty.
        cid: of vsock; else None.
        is_encrypted: through TLS.
        names: in its certificate, if that was verified.
    """

    address: str = ""
    uid: int | None = None
    gids: tuple[int, ...] = ()
    is_encrypted: bool = False
    names: tuple[str, ...] = ()
    cid: int | None = None

    def __str__(self) -> str:
        """Return the facts that a rule can ask for, for the log."""
        shown = [f"cert:{name}" for name in self.names]
        if self.uid is not None:
            shown.append(f"uid:{self.uid}")
        if self.address:
            shown.append(f"net:{self.address}")
        if self.cid is not None:
            shown.append(f"vsock:{self.cid}")
        return " ".join(shown) or "unknown"


Condition = Callable[[Identity], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `text` is what the user wrote, with single blanks."""

    text: str
    access: Access = field(compare=False)
    conditions: tuple[Condition, ...] = field(compare=False, repr=False)

    def holds(self, client: Identity) -> bool:
        return all(condition(client) for condition in self.conditions)

    @property
    def wants_certificate(self) -> bool:
        """Whether it can only hold where certificates are verified."""
        return any(word.startswith("cert:") for word in self.text.split())


RuleTexts = dict[str, tuple[str, ...]]  # the lines of each export


def _texts_of(by_export: dict[str, tuple[Rule, ...]]) -> RuleTexts:
    return {
        name: tuple(rule.text for rule in rules) for name, rules in by_export.items()
    }


class AccessRules:
    """The rules of a server; see the module head. They may change at any time, for connections to come.

    Attributes:
        default: of exports that have no rules of their own; None: everybody may read and write.
        by_export: of the configuration file.
        by_command: these win over those of the file.
        kept: of devices that the file named when it was read before, and that are served although it does not any more.
    """

    def __init__(
        self,
        default: Sequence[Rule] | None = None,
        by_export: dict[str, tuple[Rule, ...]] | None = None,
    ) -> None:
        self.default = None if default is None else tuple(default)
        self.by_export = by_export or {}
        self.by_command: dict[str, tuple[Rule, ...]] = {}
        self.kept: dict[str, tuple[Rule, ...]] = {}

    def of(self, export: str) -> tuple[Rule, ...] | None:
        """The rules that hold for an export; None: there are none."""
        for rules in (self.by_command, self.by_export, self.kept):
            if export in rules:
                return rules[export]
        return self.default

    def access(self, export: str, client: Identity) -> Access:
        """Return the rights of a client on an export, whether it exists or not."""
        rules = self.of(export)
        if rules is None:
            return Access.WRITE
        for rule in rules:
            if rule.holds(client):
                return rule.access
        return Access.NONE

    def renamed(self, old: str, new: str) -> None:
        """An export has another name: who may attach it does not change by that."""
        rules = self.of(old)
        self.by_command.pop(old, None)
        if rules is not None and rules != self.of(new):
            self.by_command[new] = rules

    def texts(self) -> tuple[RuleTexts, RuleTexts]:
        """The rules that commands have set, and those that were kept, for another process, which reads the file itself."""
        return _texts_of(self.by_command), _texts_of(self.kept)

    def take_texts(self, by_command: RuleTexts, kept: RuleTexts) -> None:
        """Take what `texts` returned in another process. Raises: NbdTargetError."""
        self.by_command = {
            name: parse_rules(rules) for name, rules in by_command.items()
        }
        self.kept = {name: parse_rules(rules) for name, rules in kept.items()}

    def all_rules(self) -> Iterable[Rule]:
        """Return all rules: the default ones, and those of each export."""
        yield from self.default or ()
        for each in (self.by_export, self.by_command, self.kept):
            for rules in each.values():
                yield from rules


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """Parse the rules of one export. Raises: NbdTargetError."""
    if len(texts) > RULES_MAX:
        raise NbdTargetError(f"more than {RULES_MAX} rules")
    return tuple(parse_rule(text) for text in texts)


def parse_rule(text: str) -> Rule:
    """Parse a rule. Raises: NbdTargetError: one sentence."""
    words = text.split()
    try:
        access = Access(words[0] if words else "")
    except ValueError:
        raise NbdTargetError(
            f"rule `{text}': begins with none of rw, ro and none, as in `rw cert:alice'"
        ) from None
    if not words[1:]:
        reason = f"rule `{text}': says nothing about the client: write `{text} any'"
        raise NbdTargetError(reason)
    try:
        conditions = tuple(_condition(word) for word in words[1:])
    except ValueError as error:
        raise NbdTargetError(f"rule `{text}': {error}") from None
    return Rule(" ".join(words), access, conditions)


def _condition(word: str) -> Condition:
    """Raises: ValueError."""
    kind, colon, value = word.partition(":")
    if not colon and kind in _WORDS:
        return _WORDS[kind]
    if colon and value and kind in _KINDS:
        return _KINDS[kind](value)
    raise ValueError(
        f"`{word}' is none of cert:GLOB, uid:USER, gid:GROUP, net:NETWORK, vsock:CID, tls, unix, vsock and any"
    )


def _of_certificate(glob: str) -> Condition:
    return lambda client: any(fnmatchcase(name, glob) for name in client.names)


def _of_user(user: str) -> Condition:
    uid = maybe_number(user, ID_MAX)
    if uid is None:
        try:
            uid = pwd.getpwnam(user).pw_uid
        except KeyError:
            raise ValueError(f"there is no user {user}") from None
    return lambda client: client.uid == uid


def _of_group(group: str) -> Condition:
    gid = maybe_number(group, ID_MAX)
    if gid is None:
        try:
            gid = grp.getgrnam(group).gr_gid
        except KeyError:
            raise ValueError(f"there is no group {group}") from None
    return lambda client: gid in client.gids


def _of_network(text: str) -> Condition:
    network = ipaddress.ip_network(text)  # its ValueError is a sentence

    def holds(client: Identity) -> bool:
        if not client.address:
            return False
        address = ipaddress.ip_address(client.address.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return address in network

    return holds


def _of_machine(text: str) -> Condition:
    cid = maybe_number(text, ID_MAX)
    if cid is None:
        raise ValueError(f"{text} is not the number of a machine (CID)")
    return lambda client: client.cid == cid


_WORDS: Final[dict[str, Condition]] = {
    "any": lambda _: True,
    "tls": lambda client: client.is_encrypted,
    "unix": lambda client: client.uid is not None,
    "vsock": lambda client: client.cid is not None,
}
_KINDS: Final[dict[str, Callable[[str], Condition]]] = {
    "cert": _of_certificate,
    "uid": _of_user,
    "gid": _of_group,
    "net": _of_network,
    "vsock": _of_machine,
}
