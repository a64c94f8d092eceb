# SPDX-License-Identifier: Apache-2.0
"""The words that a person gives to allow something reach the target, and no other way does."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from nbdtarget.cli.app import run
from nbdtarget.common.permissions import (
    MOVED,
    OTHER_DISK,
    OVERWRITE,
    Permission,
    permissions,
)
from nbdtarget.control.api import ControlServer
from nbdtarget.control.messages import Create, Load
from nbdtarget.control.verbs import Verbs
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.base import Target, TargetContext
from tests.support.dm import RamOpener

ALL: frozenset[Permission] = frozenset((OVERWRITE, MOVED, OTHER_DISK))


class AskingTarget(Target):
    """Keeps what its table was loaded with."""

    type_name = "asking"
    version = (0, 0, 1)
    given: list[frozenset[Permission]] = []  # noqa: RUF012 (tests clear it)

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "AskingTarget":
        cls.given.append(ctx.permissions)
        return cls(ctx)


@pytest.fixture
def registry() -> Registry:
    AskingTarget.given = []
    return Registry(RamOpener(), types={"asking": AskingTarget})


def test_options_become_words() -> None:
    assert permissions() == frozenset()
    assert permissions(overwrite=True) == {OVERWRITE}
    assert permissions(overwrite=True, moved=True, accept_other_disk=True) == ALL


async def test_registry_hands_words_to_the_target_of_this_table_only(
    registry: Registry,
) -> None:
    await registry.create("x", "0 8 asking", permissions=ALL)
    await registry.load("x", "0 8 asking", permissions=frozenset((MOVED,)))
    await registry.load("x", "0 8 asking")
    assert AskingTarget.given == [ALL, {MOVED}, frozenset()]


async def test_replacement_by_the_target_itself_allows_nothing(
    registry: Registry,
) -> None:
    device = await registry.create("x", "0 8 asking", permissions=ALL)
    assert device.active is not None
    device.active.targets[0].ctx.request_replacement("asking", [])
    await device.events.wait(None)
    assert AskingTarget.given == [ALL, frozenset()]


@pytest.mark.parametrize("request_type", [Create, Load])
def test_unknown_word_is_refused(request_type: type[Create] | type[Load]) -> None:
    body = b'{"name": "x", "table": "0 8 zero", "permissions": ["anything"]}'
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=request_type)


async def test_options_of_create_and_load_reach_the_target(
    registry: Registry, tmp_path: Path
) -> None:
    server = ControlServer(Verbs(registry), tmp_path / "s")
    await server.start()

    async def command(*words: str) -> None:
        argv = [*words, "--control", str(tmp_path / "s")]
        assert await asyncio.to_thread(run, argv) == 0

    try:
        await command("create", "a", "--table", "0 8 asking")
        await command("create", "b", "--table", "0 8 asking", "--overwrite")
        await command("create", "--concise", "c,,,rw,0 8 asking", "--moved")
        await command("load", "a", "--table", "0 8 asking", "--accept-other-disk")
    finally:
        await server.close()
    assert AskingTarget.given == [frozenset(), {OVERWRITE}, {MOVED}, {OTHER_DISK}]
