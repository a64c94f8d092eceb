# SPDX-License-Identifier: Apache-2.0
"""Every name that a user can type or read has an entry in the reference. The failure tells the page on which one is missing."""

import re
from dataclasses import fields
from typing import Any, get_args

import pytest

from nbdtarget.cli.columns import FIELDS
from nbdtarget.common.permissions import Permission, option_of
from nbdtarget.config import file as configuration
from nbdtarget.config.limits import LIMIT_KEYS
from nbdtarget.control import messages, paths
from nbdtarget.control.bodies import BODY_BYTES_MAX, OTHER_BODY_BYTES_MAX
from nbdtarget.control.doorkeeper import CONNECTIONS_MAX
from nbdtarget.devices.bulk import CHUNK_BYTES, CHUNKS_PER_STREAM
from nbdtarget.devices.nbd.uri import CONNECTIONS, EXPORT_NAME_MAX
from nbdtarget.devices.nbd.uri import CONNECTIONS_MAX as NBD_CONNECTIONS_MAX
from nbdtarget.devices.registry import SCHEMES
from nbdtarget.dm import names, registry
from nbdtarget.dm import table as dm_table
from nbdtarget.dm.statistics import AREAS_MAX
from nbdtarget.monitor.device_map import CELLS_MAX, LOOK_BYTES
from nbdtarget.monitor.event_log import CLIENT_EVENTS_MAX, EVENTS_MAX
from nbdtarget.policies.mq import KEYS as MQ_KEYS
from nbdtarget.policies.registry import ALIASES, POLICY_TYPES
from nbdtarget.server.address import UNIX_PATH_MAX
from nbdtarget.server.block_status import NAMESPACE
from nbdtarget.server.limits import Limits
from nbdtarget.targets.background_copier import WINDOW_BYTES, WINDOWS_MAX
from nbdtarget.targets.base import Target
from nbdtarget.targets.cache import table as cache_table
from nbdtarget.targets.cache.extents import CACHE
from nbdtarget.targets.clone import table as clone_table
from nbdtarget.targets.clone.extents import HYDRATION
from nbdtarget.targets.powercut.volatile_cache import Fate
from nbdtarget.targets.registry import TARGET_TYPES
from nbdtarget_protocol.consts import BASE_ALLOCATION
from nbdtarget_protocol.handshake import CONTEXTS_MAX
from tests.support.reference_pages import (
    DOCS,
    PACKAGE,
    dictionary_keys,
    matched_words,
    words_of,
)

CLONE = "reference/tables/clone.md"
CACHE_PAGE = "reference/tables/cache.md"
INDEX = "reference/tables/index.md"
OTHERS = ("reference/tables/simple.md", "reference/tables/testing.md")


def pages_of(module: str) -> tuple[str, ...]:
    """The pages on which the words of a module of targets must stand."""
    if module.startswith("targets/clone/"):
        return (CLONE,)
    return (CACHE_PAGE,) if module.startswith("targets/cache/") else OTHERS


def check(names: set[str], *pages: str) -> None:
    assert names, "nothing was found in the source: mend the test"
    missing = sorted(names - words_of(*pages))
    assert missing == [], f"without an entry in docs/{' or docs/'.join(pages)}"


# Words of the table lines of targets that declare theirs nowhere.
TYPED = matched_words("targets", lambda name: "feature" in name)
TOLD = dictionary_keys("targets", "status_fields")


@pytest.mark.parametrize("target", TARGET_TYPES.values(), ids=TARGET_TYPES)
def test_messages_of_targets(target: type[Target]) -> None:
    names = {message.split()[0] for message in target.messages}
    pages = pages_of(f"targets/{target.type_name}/")
    assert sorted(names - words_of(*pages)) == []


def test_messages_are_declared() -> None:
    # The test above would find nothing missing if this were not so.
    assert "then_linear" in TARGET_TYPES["clone"].messages
    assert "pin BLOCKS..." in TARGET_TYPES["cache"].messages
    assert "enable" in TARGET_TYPES["dust"].messages


@pytest.mark.parametrize("module", sorted(name for name in TYPED if TYPED[name]))
def test_features_of_small_targets(module: str) -> None:
    check(TYPED[module], *pages_of(module))


def test_features_of_clone_and_cache() -> None:
    check(set(clone_table.FEATURES), CLONE)
    check(set(cache_table.FEATURES), CACHE_PAGE)


def test_keys_of_clone_and_cache() -> None:
    check(set(clone_table.NUMBERS), CLONE)
    check({*cache_table.CORE_KEYS, *MQ_KEYS}, CACHE_PAGE)


def test_fates_of_a_power_cut() -> None:
    check({fate.value for fate in Fate}, *OTHERS)


@pytest.mark.parametrize("module", sorted(name for name in TOLD if TOLD[name]))
def test_status_fields_of_targets(module: str) -> None:
    check(TOLD[module], *pages_of(module))


def test_status_fields_are_found_in_the_source() -> None:
    assert "dirty_bytes" in TOLD["targets/cache/report.py"]
    assert "source_open" in TOLD["targets/clone/target.py"]


def test_messages_to_a_device_itself() -> None:
    found = matched_words(
        "dm", lambda name: re.search("message|_create$", name) is not None
    )
    check(set[str]().union(*found.values()), INDEX)


def test_names_of_devices() -> None:
    text = (DOCS / INDEX).read_text()
    assert [
        each.syntax for each in SCHEMES.values() if f"`{each.syntax}`" not in text
    ] == []


def test_target_types() -> None:
    check(set(TARGET_TYPES), INDEX)
    titles = "".join((DOCS / page).read_text() for page in (CLONE, CACHE_PAGE, *OTHERS))
    untitled = [name for name in TARGET_TYPES if f"# The {name} target\n" not in titles]
    assert untitled == []


def test_policies() -> None:
    check({*POLICY_TYPES, *ALIASES}, CACHE_PAGE)


def test_keys_of_the_configuration_file() -> None:
    keys = {*configuration._FILE_KEYS, *configuration._DEVICE_KEYS}
    check({*keys, *LIMIT_KEYS}, "reference/configuration.md")


@pytest.mark.parametrize("key", sorted(LIMIT_KEYS))
def test_default_of_a_limit_is_the_one_that_the_page_tells(key: str) -> None:
    (default,) = (each.default for each in fields(Limits) if each.name == key)
    text = (DOCS / "reference/configuration.md").read_text()
    (entry,) = re.findall(rf"\n`[^\n]*\b{key}\b[^\n]*`\n: ([^\n]*)", text)
    value = str(default).lower() if type(default) is bool else f"{default:.0f}"
    assert re.search(rf"\b{value}\b", entry.rpartition("Default: ")[2])


@pytest.mark.parametrize(
    ("what", "limit"),
    [
        ("mapped devices of one server", registry.DEVICES_MAX),
        ("lines of one table", dm_table.TARGETS_MAX),
        ("name of a device", names.NAME_LENGTH_MAX),
        ("UUID of a device", names.UUID_LENGTH_MAX),
        ("path of a unix socket", UNIX_PATH_MAX),
        ("name of an export below, in a URI", EXPORT_NAME_MAX),
        ("connections to a server below, by `connections` in a URI", CONNECTIONS),
        (
            "connections to a server below, by `connections` in a URI",
            NBD_CONNECTIONS_MAX,
        ),
        (
            "memory of a background copy for each connection",
            CHUNKS_PER_STREAM * CHUNK_BYTES >> 20,
        ),
        (
            "copied in the background, and not yet written to the disk",
            WINDOWS_MAX * WINDOW_BYTES >> 20,
        ),
        ("configuration file", configuration.FILE_SIZE_MAX >> 20),
        ("addresses in `listen`", configuration.LISTEN_MAX),
        ("request to the control socket", BODY_BYTES_MAX >> 20),
        ("request to the control socket", OTHER_BODY_BYTES_MAX >> 10),
        ("connections to the control socket", CONNECTIONS_MAX),
        ("events that a server keeps", EVENTS_MAX),
        ("events that a server keeps", CLIENT_EVENTS_MAX),
        ("cells of a map of a device", CELLS_MAX),
        ("cells of a map of a device", LOOK_BYTES >> 20),
        ("areas of statistics in one device", AREAS_MAX),
        ("metadata contexts of one export", CONTEXTS_MAX),
    ],
)
def test_fixed_limit_is_the_one_that_the_page_tells(what: str, limit: int) -> None:
    text = (DOCS / "reference/limits.md").read_text()
    (entry,) = re.findall(rf"\n\| {what} \| (.*) \|", text)
    assert re.search(rf"\b{limit}\b", entry)


def test_columns_of_info() -> None:
    check(set(FIELDS), "reference/info.md")


@pytest.mark.parametrize("answer", [messages.InfoLine, messages.BelowLine])
def test_fields_of_devices(answer: Any) -> None:
    check(set(answer.__struct_fields__), "reference/info.md")


def test_verbs_of_the_control_socket() -> None:
    check(set(messages.VERBS), "reference/control.md")


def test_metadata_contexts() -> None:
    ours = {NAMESPACE + name for name in (HYDRATION, CACHE)}
    check({BASE_ALLOCATION, *ours}, "reference/nbd.md")


def test_permissions() -> None:
    options = {option_of(permission) for permission in get_args(Permission)}
    check(options, "reference/configuration.md")


def test_variables_of_the_environment() -> None:
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    asked = set(re.findall(r'environ\.get\("(\w+)"', source))
    check(
        {*asked, paths.CONTROL_VARIABLE, paths.TOKEN_VARIABLE, "NOTIFY_SOCKET"},
        "reference/files.md",
    )
