# SPDX-License-Identifier: Apache-2.0
"""The older version of the simulation, and that an upgrade which goes wrong is noticed."""

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from nbdtarget.targets.disks import DiskRecords, Finding, evidence_of
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.superblock import CACHE, CacheSuperblock
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import CLONE
from nbdtarget_metadata.disks import Comparison, Verdict, record_of
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, open_envelope
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    SUPERBLOCK_MAGIC,
    Superblock,
    SuperblockType,
)
from tests.sim.older import NR_FIELDS, older_version
from tests.sim.world import simulate
from tests.support.crash.images import run_over
from tests.support.places import FIXTURES

SEEDS_MAX = 60


def nr_fields(image: bytes) -> int:
    """Of the first copy of the superblock."""
    opened = open_envelope(
        SUPERBLOCK_MAGIC, 0, memoryview(image)[:BLOCK_SIZE], "block 0"
    )
    return len(msgspec.msgpack.decode(opened.body))


@pytest.mark.parametrize("kind", NR_FIELDS)
def test_older_version_writes_as_many_fields_as_its_fixture_has(kind: str) -> None:
    assert nr_fields((FIXTURES / f"{kind}-v1.img").read_bytes()) == NR_FIELDS[kind]


@pytest.mark.parametrize("kind", NR_FIELDS)
def test_superblock_of_the_older_version_is_read_without_a_record(kind: str) -> None:
    size = max(CloneMetadata.device_size_min(8), CacheMetadata.device_size_min(8))
    image = bytearray(size)
    uuid = bytes(range(16))
    with older_version():
        if kind == "clone":
            run_over(
                image,
                CloneMetadata.format(
                    device_size=size, region_size=4096, target_size=32768, uuid=uuid
                ),
            )
        else:
            run_over(
                image,
                CacheMetadata.format(
                    device_size=size,
                    block_size=32768,
                    origin_size=1 << 20,
                    nr_cblocks=8,
                    uuid=uuid,
                ),
            )
    assert nr_fields(bytes(image)) == NR_FIELDS[kind]
    metadata: CloneMetadata | CacheMetadata
    if kind == "clone":
        metadata = run_over(
            image,
            CloneMetadata.open(device_size=size, region_size=4096, target_size=32768),
        )
    else:
        metadata = run_over(
            image, CacheMetadata.open(device_size=size, block_size=32768)
        )
    assert metadata.recorded_disks == b""
    assert metadata.uuid == uuid


def fails(rig: str) -> bool:
    return any(simulate(seed, rig_name=rig).failure for seed in range(SEEDS_MAX))


look = DiskRecords.look


async def refuse_the_unknown(
    records: DiskRecords, roles: Iterable[str]
) -> list[Finding]:
    """Takes a disk of which nothing is recorded for another one."""
    findings = await look(records, roles)
    is_new = records._metadata.generation <= 1  # nothing could be recorded yet
    for role in () if is_new else records._roles:
        if role.name in roles and records.recorded(role.name) is None:
            found = await evidence_of(role)
            other = Comparison(Verdict.OTHER, "nothing is recorded of it")
            findings.append(
                Finding(role.name, record_of(role.name, found), found, other, "")
            )
    return findings


@pytest.mark.parametrize(
    "rig",
    [
        "clone",
        "cache",
        pytest.param("cache_over_backends", marks=pytest.mark.long),
    ],
)
def test_simulation_catches_an_upgrade_that_asks_for_a_word(
    rig: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiskRecords, "look", refuse_the_unknown)
    assert fails(rig)


def test_simulation_catches_an_upgrade_that_records_no_disks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DiskRecords, "_record", lambda records, disks: None)
    assert fails("clone")


class NeedsAllFields:
    """Decodes a superblock that has all fields, and no other."""

    def __init__(self, kind: SuperblockType[Any]) -> None:
        self._decoder = kind.decoder

    def decode(self, body: memoryview) -> Superblock:
        superblock: Superblock = self._decoder.decode(body)
        nr_wanted = 1 + len(superblock.__struct_fields__)
        if len(msgspec.msgpack.decode(body)) < nr_wanted:
            raise msgspec.ValidationError("a field is missing")
        return superblock


@pytest.mark.parametrize(("rig", "kind"), [("clone", CLONE), ("cache", CACHE)])
def test_simulation_catches_a_field_that_has_no_default(
    rig: str, kind: SuperblockType[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = NeedsAllFields(kind)
    decoder = kind.decoder
    object.__setattr__(kind, "decoder", strict)  # it is frozen
    try:
        assert fails(rig)
    finally:
        object.__setattr__(kind, "decoder", decoder)


def test_simulation_catches_a_missing_flag_that_is_taken_for_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The blocks that were dirty in the older version when it crashed are lost."""

    def gives_up(superblock: CacheSuperblock) -> bool:
        is_older = not superblock.disks
        return is_older and not superblock.flags & CLEAN_SHUTDOWN

    monkeypatch.setattr(CacheSuperblock, "gives_up_mappings", property(gives_up))
    assert fails("cache_over_clone")
