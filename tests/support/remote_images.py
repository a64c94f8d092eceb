# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of remote images: the image, the kinds of URLs that lead to it, and ways in which its server misbehaves."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.ranged import device as device_module
from nbdtarget.devices.ranged import fetcher as fetcher_module
from nbdtarget.devices.ranged import retry
from nbdtarget.devices.ranged.device import RangedDevice
from nbdtarget.devices.resolve import open_device
from tests.support.image_server import Answer, ImageServer, Request, image_of
from tests.support.patience import PATIENCE_S

__all__ = [
    "IMAGE",
    "KIB",
    "KINDS",
    "MIB",
    "Misbehaviour",
    "change",
    "device_on",
    "hang_up",
    "hasten",
    "name_on",
    "once",
    "one_attempt",
    "raw",
    "refused",
]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
IMAGE: Final = image_of(3 * MIB)
KINDS: Final = ("http", "s3", "gs", "az")
SECRET: Final = "topsecret"
_PROXIES: Final = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")

Misbehaviour = Callable[[Answer], None]


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test wait for time to pass, or use credentials or proxies of the machine."""
    monkeypatch.setattr(retry, "RETRY_S_MIN", 0.0001)
    monkeypatch.setattr(retry, "RETRY_S_MAX", 0.0001)
    monkeypatch.setattr(fetcher_module, "RENEW_S_MIN", 0.0)
    monkeypatch.setattr(device_module, "OPEN_S_MAX", PATIENCE_S)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for name in (*_PROXIES, "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for opening an image is over after the first attempt."""

    async def is_over(_: float) -> None:
        raise TimeoutError

    monkeypatch.setattr(device_module, "sleep", is_over)


def name_on(server: ImageServer, kind: str = "http", options: str = "") -> str:
    """Return a URL of one of `KINDS` for the server's image. Args: options: begin with `&`."""
    endpoint = server.url("").rstrip("/")
    match kind:
        case "http":
            return f"{server.url()}#{options.removeprefix('&')}"
        case "s3":
            region = f"region=us-east-1&endpoint={endpoint}"
            return f"s3://bucket/dir/a%20b.img#{region}{options}"
        case "gs":
            anonymous = f"anonymous=yes&endpoint={endpoint}"
            return f"gs://bucket/dir/a%20b.img#{anonymous}{options}"
        case "az":
            account = f"anonymous=yes&account=me&endpoint={endpoint}/me"
            return f"az://container/dir/a%20b.img#{account}{options}"
    raise ValueError(kind)


@asynccontextmanager
async def device_on(name: str) -> AsyncIterator[RangedDevice]:
    device = await open_device(name, read_only=True)
    assert isinstance(device, RangedDevice)
    try:
        yield device
    finally:
        await device.close()


async def refused(name: str) -> str:
    """Return why the image is refused: one line, without a secret."""
    with pytest.raises(ResolveError) as caught:
        await open_device(name, read_only=True)
    text = str(caught.value)
    assert "\n" not in text
    assert SECRET not in text
    return text


def change(
    status: int = 0, body: bytes | None = None, **headers: str
) -> Callable[[Answer], None]:
    """Answer with another status, body or headers. An empty header is left out; `_` in a name is `-`."""

    def changed(answer: Answer) -> None:
        answer.status = status or answer.status
        answer.body = answer.body if body is None else body
        answer.headers |= {
            key.replace("_", "-"): value for key, value in headers.items()
        }

    return changed


def hang_up(after: int) -> Callable[[Answer], None]:
    """Hang up after so many bytes of the body."""

    def changed(answer: Answer) -> None:
        answer.sends = after

    return changed


def raw(text: bytes) -> Callable[[Answer], None]:
    """Send these bytes instead of an answer, and hang up."""

    def changed(answer: Answer) -> None:
        answer.text = text

    return changed


def once(
    changed: Callable[[Answer], object], nr: int = 1
) -> Callable[[Request, Answer], None]:
    """Change the answer to request number `nr`, counted from the opening, which is 0."""
    counted = iter(range(1 << 30))

    def behave(_: Request, answer: Answer) -> None:
        if next(counted) == nr:
            changed(answer)

    return behave
