# SPDX-License-Identifier: Apache-2.0
"""Functions that make fixtures for pytest, for other sizes, scopes and servers than those of the plugin.

    from nbdtarget.testing import factories

    big_disk = factories.powercut_disk(size="10G", tear_size=4096)

Each returns a fixture; the name that it is assigned to is the fixture's name. Disks are removed at the end of the
test, also if a client is still attached.
"""

import errno as errnos
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import pytest

if TYPE_CHECKING:
    from nbdtarget.api.blocking import BlockingDisk, BlockingServer
    from nbdtarget.testing.attached import AttachedDisk, Via
    from nbdtarget.testing.disks import FlakyDisk, SlowDisk

__all__ = [
    "CONTROL_INI",
    "IMAGE_INI",
    "SIZE_DEFAULT",
    "SIZE_INI",
    "clone_of",
    "flaky_disk",
    "nbd_file",
    "nbd_server",
    "powercut_disk",
    "scratch_disk",
    "slow_disk",
]

SIZE_INI: Final = "nbdtarget_disk_size"
CONTROL_INI: Final = "nbdtarget_control"
IMAGE_INI: Final = "nbdtarget_image"
SIZE_DEFAULT: Final = "64M"

Scope = Literal["session", "package", "module", "class", "function"]
# The imports of the server take 0.3 s: a session that uses no disk does not pay for them.
_numbers = itertools.count(1)


def nbd_server(
    *,
    listen: Sequence[str] = (),
    control: str | None = None,
    scope: Scope = "session",
) -> Callable[..., "Iterator[BlockingServer]"]:
    """Return a fixture: a server in a thread of the test process.

    Args: control: a control socket: use that running server instead. None: what the setting nbdtarget_control says.
    """

    @pytest.fixture(scope=scope)
    def nbd_server_fixture(
        request: pytest.FixtureRequest,
    ) -> "Iterator[BlockingServer]":
        from nbdtarget.api.blocking import BlockingServer

        address = control or _setting(request, CONTROL_INI, "")
        if address:
            server = BlockingServer.connect(address)
        else:
            server = BlockingServer(listen=listen)
        with server:
            yield server

    return nbd_server_fixture


def powercut_disk(
    *,
    size: int | str | None = None,
    tear_size: int | None = None,
    disk: str | None = None,
    server: str = "nbd_server",
    scope: Scope = "function",
) -> Callable[..., "Iterator[BlockingDisk]"]:
    """Return a fixture: a disk whose power can be cut.

    Args:
        size: bytes, or for example "1G"; None: what the setting nbdtarget_disk_size says.
        tear_size: 512 or 4096: where a write may tear; None: 512.
        disk: what holds the data; None: memory.
        server: the fixture of the server.
    """
    words = () if tear_size is None else (2, "tear_size", tear_size)

    @pytest.fixture(scope=scope)
    def powercut_disk_fixture(
        request: pytest.FixtureRequest,
    ) -> "Iterator[BlockingDisk]":
        yield from _made(request, server, "powercut", *words, size=size, disk=disk)

    return powercut_disk_fixture


def flaky_disk(
    *,
    size: int | str | None = None,
    server: str = "nbd_server",
    scope: Scope = "function",
) -> Callable[..., "Iterator[FlakyDisk]"]:
    """Return a fixture: a disk in memory that fails when told to. Args: as of `powercut_disk`."""

    @pytest.fixture(scope=scope)
    def flaky_disk_fixture(request: pytest.FixtureRequest) -> "Iterator[FlakyDisk]":
        from nbdtarget.testing.disks import FlakyDisk

        for disk in _made(request, server, "linear", size=size):
            yield FlakyDisk(disk)

    return flaky_disk_fixture


def slow_disk(
    *,
    size: int | str | None = None,
    delay_ms: int = 10,
    server: str = "nbd_server",
    scope: Scope = "function",
) -> Callable[..., "Iterator[SlowDisk]"]:
    """Return a fixture: a disk in memory on which each request takes so many milliseconds. Args: as of `powercut_disk`."""

    @pytest.fixture(scope=scope)
    def slow_disk_fixture(request: pytest.FixtureRequest) -> "Iterator[SlowDisk]":
        from nbdtarget.testing.disks import SlowDisk

        for disk in _made(request, server, "linear", size=size):
            slow = SlowDisk(disk)
            slow.set_delay(delay_ms)
            yield slow

    return slow_disk_fixture


def clone_of(
    *, server: str = "nbd_server"
) -> Callable[..., "Iterator[Callable[..., BlockingDisk]]"]:
    """Return a fixture: a function that makes clones of an image. Nothing is copied before it is read, written or idle.

    The function takes what `BlockingServer.clone` takes, without `dest`: the clone is a file in the test's `tmp_path`.
    """

    @pytest.fixture
    def clone_of_fixture(
        request: pytest.FixtureRequest, tmp_path: Path
    ) -> "Iterator[Callable[..., BlockingDisk]]":
        host: BlockingServer = request.getfixturevalue(server)
        made: list[BlockingDisk] = []

        def clone(image: Any, **options: Any) -> "BlockingDisk":
            name = options.pop("name", None) or f"clone-{next(_numbers)}"
            disk = host.clone(image, tmp_path / f"{name}.img", name=name, **options)
            made.append(disk)
            return disk

        yield clone
        for disk in made:
            _remove(disk)

    return clone_of_fixture


def scratch_disk(
    *,
    image: str | None = None,
    size_max: int | str | None = None,
    server: str = "nbd_server",
) -> Callable[..., "Iterator[BlockingDisk]"]:
    """Return a fixture: a writable copy of an image in memory, which is pristine at the beginning of each test.

    The copy is made once for a test process, and reset after each test.

    Args:
        image: None: what the setting nbdtarget_image says. A relative path starts at the root directory of pytest.
        size_max: bytes that a test may write; None: as many as the image has.
    """
    made: dict[tuple[BlockingServer, str], BlockingDisk] = {}

    @pytest.fixture
    def scratch_disk_fixture(
        request: pytest.FixtureRequest,
    ) -> "Iterator[BlockingDisk]":
        host: BlockingServer = request.getfixturevalue(server)
        given = image or _setting(request, IMAGE_INI, "")
        if not given:
            pytest.fail(
                f"scratch_disk: say what it is a copy of: the setting {IMAGE_INI}, or"
                " factories.scratch_disk(image=...)"
            )
        path = str(request.config.rootpath / given)
        if (host, path) not in made:
            name = f"scratch-{next(_numbers)}"
            made[host, path] = host.scratch(path, name=name, size_max=size_max)
        disk = made[host, path]
        yield disk
        disk.reset()

    return scratch_disk_fixture


def nbd_file() -> Callable[..., "Iterator[Callable[..., AttachedDisk]]"]:
    """Return a fixture: a function that attaches a disk as a file. Where that is impossible, it skips the test and says why."""

    @pytest.fixture
    def nbd_file_fixture() -> "Iterator[Callable[..., AttachedDisk]]":
        from nbdtarget.testing.attached import AttachedDisk, AttachError, why_not

        attached: list[AttachedDisk] = []

        def attach(disk: "BlockingDisk", *, via: "Via | None" = None) -> AttachedDisk:
            ways: list[Via] = ["kernel", "nbdfuse"] if via is None else [via]
            reasons = {each: why_not(each) for each in ways}
            if all(reasons.values()):
                said = "; ".join(f"{each}: {why}" for each, why in reasons.items())
                pytest.skip(f"no disk can be attached as a file: {said}")
            found = AttachedDisk(disk, via=via)
            attached.append(found)
            return found

        yield attach
        failures = []
        for each in reversed(attached):
            try:
                each.detach()
            except AttachError as error:
                failures.append(str(error))
        if failures:
            pytest.fail("; ".join(failures))

    return nbd_file_fixture


def _made(
    request: pytest.FixtureRequest,
    server: str,
    target: str,
    *words: str | int,
    size: int | str | None,
    disk: str | None = None,
) -> "Iterator[BlockingDisk]":
    host: BlockingServer = request.getfixturevalue(server)
    if size is None and disk is None:
        size = _setting(request, SIZE_INI, SIZE_DEFAULT)
    name = f"{target}-{next(_numbers)}"
    made = host.create(name, target, *words, size=size, disk=disk)
    yield made
    _remove(made)


def _setting(request: pytest.FixtureRequest, name: str, default: str) -> str:
    """Return a setting; the default, if the plugin that declares it is not loaded (`-p no:nbdtarget`)."""
    try:
        return str(request.config.getini(name))
    except ValueError:
        return default


def _remove(disk: "BlockingDisk") -> None:
    """Remove it; a client that the test has left attached gets errors."""
    from nbdtarget.common.errors import TableError

    try:
        disk.remove()
    except TableError as error:
        if error.errno != errnos.EBUSY:
            raise
        disk.remove(force=True)
