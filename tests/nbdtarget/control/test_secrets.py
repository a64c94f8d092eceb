# SPDX-License-Identifier: Apache-2.0
"""No answer of a control socket shows a secret of a URL; a successor gets the whole table line."""

import json
from pathlib import Path

import msgspec

from nbdtarget.control import messages as m
from nbdtarget.control.verbs import Verbs
from nbdtarget.devices import resolve
from nbdtarget.dm.registry import Registry
from tests.support.image_server import ImageServer, image_of

SIZE = 1 << 20


async def test_answers_show_no_secret(tmp_path: Path) -> None:
    (tmp_path / "dest").write_bytes(bytes(SIZE))
    registry = Registry(resolve)
    async with ImageServer(image_of(SIZE)) as server:
        url = server.url("/a?sig=hidden1", user="me:hidden2@")
        device = await registry.create(
            "c", f"0 {SIZE // 512} clone {tmp_path}/meta {tmp_path}/dest {url} 128"
        )
        await registry.create("l", f"0 2048 linear {url}&x=hidden3 0", read_only=True)
        verbs = Verbs(registry)
        answers = [
            await verbs.table(m.Table()),
            await verbs.status(m.Status()),
            await verbs.info(m.Info()),
            await verbs.deps(m.Deps()),
            await verbs.measure(m.Measure()),
        ]
        text = "".join(json.dumps(msgspec.to_builtins(answer)) for answer in answers)
        assert "127.0.0.1" in text
        assert "?***" in text
        assert "hidden" not in text
        assert url in device.table()[0][3]
        await registry.close()
