# SPDX-License-Identifier: Apache-2.0
"""A verb that has begun is carried out; only a wait ends with its caller."""

import asyncio
import errno as errnos

import pytest

from nbdtarget.common.errors import ConstructorError, NbdTargetError, TableError
from nbdtarget.control import messages as m
from nbdtarget.control.calls import Calls, errno_of
from nbdtarget.control.verbs import Verbs
from tests.support.dm import make_registry


class SlowVerbs(Verbs):
    """Verbs that wait for `gate`, and count how many have ended."""

    def __init__(self) -> None:
        super().__init__(make_registry()[0])
        self.gate = asyncio.Event()
        self.has_begun = asyncio.Event()
        self.nr_ended = 0

    async def _slow(self) -> None:
        self.has_begun.set()
        await self.gate.wait()
        self.nr_ended += 1

    async def clear(self, request: m.Clear) -> m.Done:
        await self._slow()
        return m.Done()

    async def wait(self, request: m.Wait) -> m.WaitAnswer:
        await self._slow()
        return m.WaitAnswer(1)

    async def resume(self, request: m.Resume) -> m.Done:
        raise ZeroDivisionError


async def cancelled(verbs: SlowVerbs, verb: str, request: m.Request) -> None:
    task = asyncio.create_task(Calls(verbs).carry_out(verb, request))
    await verbs.has_begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    verbs.gate.set()
    for _ in range(5):
        await asyncio.sleep(0)


async def test_verb_is_carried_out_although_its_caller_is_cancelled() -> None:
    verbs = SlowVerbs()
    await cancelled(verbs, "clear", m.Clear("d"))
    assert verbs.nr_ended == 1


async def test_wait_ends_with_its_caller() -> None:
    verbs = SlowVerbs()
    await cancelled(verbs, "wait", m.Wait("d"))
    assert verbs.nr_ended == 0


async def test_answer_and_failure_of_a_verb_are_its_own() -> None:
    calls = Calls(Verbs(make_registry()[0]))
    answer = await calls.carry_out("info", m.Info())
    assert answer == m.InfoAnswer(())
    with pytest.raises(TableError, match="Device does not exist"):
        await calls.carry_out("remove", m.Remove("d"))


async def test_bug_in_a_verb_is_logged_and_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ZeroDivisionError):
        await Calls(SlowVerbs()).carry_out("resume", m.Resume("d"))
    assert "resume" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_errno_of_a_failure() -> None:
    assert errno_of(TableError("busy", errnos.EBUSY)) == errnos.EBUSY
    assert errno_of(NbdTargetError("no")) == errnos.EINVAL
    assert errno_of(ConstructorError("no")) == errnos.EINVAL
