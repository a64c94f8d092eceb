# SPDX-License-Identifier: Apache-2.0
"""Random conversations, by seed: any mixture of requests, chopped anywhere, on a device that
ends bios inside `submit`, later, or not for a while; small buffers, so that every bound is
met; and every byte compared with a model.

Requests in flight at the same time may be carried out in any order, so each keeps to a
stripe of its own, and a stripe is used again only when its last request was answered.
"""

import asyncio
import random
from dataclasses import replace

import pytest

from nbdtarget.bio import Bio
from nbdtarget_protocol import consts as c
from tests.support.patience import PATIENCE_S
from tests.support.peer import Disk, Served

STRIPE = 96 << 10
NR_STRIPES = 12


class WhimsicalDisk(Disk):
    """Ends each bio now, owned or not, or in one of the next turns of the loop."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(STRIPE * NR_STRIPES)
        self.rng = rng

    def submit(self, bio: Bio) -> None:
        whim = self.rng.random()
        if whim < 0.6:
            super().submit(bio)
        elif whim < 0.7:
            bio.own()
            super().submit(bio)
        else:
            bio.own()
            delay_s = self.rng.choice((0, 0, 0.001))
            asyncio.get_running_loop().call_later(delay_s, super().submit, bio)


class Conversation:
    """The requests of one peer, and the answers that it must get."""

    def __init__(self, served: Served, rng: random.Random) -> None:
        self.served = served
        self.rng = rng
        self.model = bytearray(STRIPE * NR_STRIPES)
        self.expected: dict[int, tuple[int, bytes]] = {}  # cookie: stripe, data
        self.free = list(range(NR_STRIPES))

    def next_request(self, cookie: int) -> tuple[int, int, bytes, int]:
        """Choose a request, note what it must answer. Returns command, offset, payload, length."""
        rng = self.rng
        stripe = self.free.pop(rng.randrange(len(self.free)))
        begin = rng.choice((0, 1, 512, 4096)) + stripe * STRIPE
        length = rng.choice((1, 512, 4096, 4096, 4096, 20_000, 40_000, 70_000))
        command = rng.choice(
            (c.CMD_READ, c.CMD_READ, c.CMD_WRITE, c.CMD_WRITE, c.CMD_WRITE_ZEROES)
        )
        here = slice(begin, begin + length)
        payload = data = b""
        if command == c.CMD_READ:
            data = bytes(self.model[here])
        elif command == c.CMD_WRITE:
            payload = rng.choice((bytes(length), rng.randbytes(length)))
            self.model[here] = payload
        else:
            self.model[here] = bytes(length)
        self.expected[cookie] = (stripe, data)
        return command, begin, payload, length

    async def run(self, nr_requests: int, *, structured: bool) -> None:
        peer = await self.served.attach(structured=structured)
        while nr_requests or self.expected:
            stream = b""
            for _ in range(self.rng.randrange(1, NR_STRIPES + 1)):
                if nr_requests and self.free:
                    command, at, payload, length = self.next_request(peer.cookie + 1)
                    stream += peer.request(command, at, length, payload)
                    nr_requests -= 1
            while stream:
                cut = self.rng.choice((1, 27, 29, 3000, 50_000, 1 << 20))
                peer.writer.write(stream[:cut])
                stream = stream[cut:]
                await asyncio.sleep(0)
            for _ in range(self.rng.randrange(len(self.expected) + 1)):
                reply = await peer.reply()
                stripe, data = self.expected.pop(reply.cookie)
                assert (reply.error, reply.data) == (0, data)
                self.free.append(stripe)
        peer.send(c.CMD_DISC)
        assert await peer.at_end()


@pytest.mark.parametrize("seed", range(12))
async def test_random_conversation(served: Served, seed: int) -> None:
    rng = random.Random(seed)
    served.limits = replace(
        served.limits,
        requests_in_flight_max=rng.choice((2, 5, 256)),
        bytes_in_flight_max=rng.choice((100_000, 1 << 20)),
        send_buffer_max=rng.choice((50_000, 1 << 20)),
        socket_buffer=rng.choice((8 << 10, 1 << 20)),
        receive_buffer=rng.choice((96 << 10, 512 << 10)),
        arena=rng.choice((72 << 10, 1 << 20)),
        flush_at=rng.choice((1, 20_000, 128 << 10)),
        pool_bytes_max=rng.choice((0, 200_000, 1 << 20)),
    )
    disk = served.directory.devices["disk"] = WhimsicalDisk(rng)
    conversation = Conversation(served, rng)
    async with asyncio.timeout(PATIENCE_S):
        await conversation.run(300, structured=rng.random() < 0.5)
    assert disk.data == conversation.model
