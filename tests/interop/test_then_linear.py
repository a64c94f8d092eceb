# SPDX-License-Identifier: Apache-2.0
"""A clone is swapped for `linear` under load, in the real program: no error, the right data."""

import json
import random
import time

import pytest

from tests.support.clients import CloneUnderTest, client, needs
from tests.support.patience import PATIENCE_S
from tests.support.plain_client import (
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    FLAG_FUA,
    PlainClient,
)
from tests.support.processes import NBDTARGET

pytestmark = pytest.mark.interop

SLOT = 4096
DEPTH = 24
CMD_CACHE = 5
SWAPPED = "linear in the place of sector 0 of the table"
OPTIONS = ("--then-linear", "--hydration-rate", "16M", "--hydrate-on-read", "-v")


def load_round(disk: PlainClient, image: bytearray, rng: random.Random) -> None:
    """`DEPTH` requests at once, each in a place of its own; all must be answered well."""
    wanted: dict[int, bytes | None] = {}
    for slot in rng.sample(range(len(image) // SLOT), DEPTH):
        at = slot * SLOT
        kind = rng.random()
        if kind < 0.5:
            flags = FLAG_FUA if kind < 0.1 else 0
            image[at : at + SLOT] = data = rng.randbytes(SLOT)
            wanted[disk.send(CMD_WRITE, at, payload=data, flags=flags)] = None
        elif kind < 0.9:
            wanted[disk.send(CMD_READ, at, SLOT)] = bytes(image[at : at + SLOT])
        elif kind < 0.95:
            wanted[disk.send(CMD_CACHE, at, SLOT)] = None
        else:
            wanted[disk.send(CMD_FLUSH)] = None
    while wanted:
        cookie, error, data = disk.receive()
        assert error == 0
        want = wanted.pop(cookie)
        assert want is None or data == want


def test_load_goes_on_through_the_swap(clone: CloneUnderTest, content: bytes) -> None:
    rng = random.Random(3)
    image = bytearray(content)
    with clone.serve(*OPTIONS), PlainClient(clone.socket) as disk:
        rounds_left, deadline = 50, time.monotonic() + PATIENCE_S
        while rounds_left:
            load_round(disk, image, rng)
            assert time.monotonic() < deadline, "it was never swapped"
            rounds_left -= SWAPPED in clone.log.read_text()
        assert disk.read(0, len(image)) == image
        disk.disconnect()
    assert clone.dest.read_bytes() == image
    # The same line goes on with the complete clone, and is done.
    client(*clone.argv("--then-linear", "--exit-when-hydrated"))
    assert clone.dest.read_bytes() == image


@pytest.mark.long
@needs("fio")
def test_fio_verifies_through_the_swap(clone: CloneUnderTest) -> None:
    with clone.serve(*OPTIONS):
        client(
            *["fio", "--name=verify", "--ioengine=nbd", f"--uri={clone.uri}"],
            *["--rw=randwrite", "--bs=4k", "--iodepth=16", "--randseed=5"],
            *["--rate_iops=2000", "--fsync=50", f"--aux-path={clone.work}"],
            *["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"],
        )
        deadline = time.monotonic() + PATIENCE_S
        while SWAPPED not in clone.log.read_text():
            assert time.monotonic() < deadline


def test_status_and_table_say_what_is_served(clone: CloneUnderTest) -> None:
    control = clone.work / "control.sock"

    def ask(*words: str) -> dict[str, object]:
        answer = json.loads(
            client(NBDTARGET, *words, "--json", "--control", str(control), "disk")
        )
        (line,) = answer["devices"][0]["lines"]
        assert isinstance(line, dict)
        return line

    options = ("--no-hydration", "--then-linear", "--control", str(control))
    with clone.serve(*options), PlainClient(clone.socket) as disk:
        fields = ask("status")["fields"]
        assert isinstance(fields, dict)
        assert fields["then_linear"] is True
        assert (fields["regions_total"], fields["regions_hydrated"]) == (128, 0)
        disk._one(disk.send(CMD_CACHE, 0, disk.size))
        deadline = time.monotonic() + PATIENCE_S
        while ask("table")["type"] != "linear":
            assert time.monotonic() < deadline
        assert ask("table")["params"] == f"{clone.dest} 0"
        assert ask("status")["fields"] == {}
        disk.disconnect()
