# SPDX-License-Identifier: Apache-2.0
"""No answer of a control socket shows a secret of a URL; a successor gets the whole table line."""

import itertools
import json
from pathlib import Path

import msgspec
import pytest

from nbdtarget.common.errors import NbdTargetError
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


# U: a URL with secrets; T: a folder with files of 1 MiB.
TABLES = {
    "linear": "0 2048 linear U 0",
    "raw": "0 2048 linear raw:U 0",
    "striped": "0 2048 striped 2 16 U 0 U 0",
    "delay": "0 2048 delay U 0 1 U 0 1",
    "flakey": "0 2048 flakey U 0 1 1",
    "dust": "0 2048 dust U 0 512",
    "scratch": "0 2048 scratch U 0 T/store",
    "powercut": "0 2048 powercut U 0",
    "clone": "0 2048 clone T/meta T/dest U 128",
    "cache": "0 2048 cache T/cachemeta memory:65536 U 128 1 writethrough smq 0",
}
REFUSED = {
    "too long": "0 4096 linear U 0",
    "no type": "0 2048 U 0",
    "no number": "0 2048 linear U U",
    "twice": "0 2048 log-writes U U",
    "metadata": "0 2048 clone U U U 128",
    "feature": "0 2048 flakey U 0 1 1 1 U",
    "key": "0 2048 clone T/meta2 T/dest2 U 128 0 2 U 1",
    "policy": "0 2048 cache T/m2 memory:65536 U 128 1 writethrough U 0",
    "no table": "U",
}


async def test_no_target_and_no_refusal_shows_a_secret(tmp_path: Path) -> None:
    for name in ("dest", "dest2", "store"):
        (tmp_path / name).write_bytes(bytes(SIZE))
    registry = Registry(resolve)
    verbs = Verbs(registry)
    said = []
    async with ImageServer(image_of(SIZE)) as server:
        numbers = itertools.count()

        def whole(text: str) -> str:
            url = server.url(f"/a?sig=hidden{next(numbers)}", user="me:hidden@")
            return text.replace("U", url).replace("T/", f"{tmp_path}/")

        for name, text in TABLES.items():
            await registry.create(name, whole(text), read_only=name != "clone")
        for text in REFUSED.values():
            with pytest.raises(NbdTargetError) as caught:
                await registry.create("refused", whole(text), read_only=True)
            said.append(str(caught.value))
        for name in TABLES:
            with pytest.raises(NbdTargetError) as caught:
                await verbs.message(m.Message(name, 0, (whole("U"), whole("U"))))
            said.append(str(caught.value))
        said += [
            json.dumps(msgspec.to_builtins(answer))
            for answer in (
                await verbs.table(m.Table()),
                await verbs.status(m.Status()),
                await verbs.info(m.Info()),
                await verbs.deps(m.Deps()),
                await verbs.measure(m.Measure()),
            )
        ]
        await registry.close()
    assert [text for text in said if "hidden" in text] == []
