# SPDX-License-Identifier: Apache-2.0
"""One run of the job behind `nbdtarget clone`, recorded."""

import asyncio
import os
import signal

from nbdtarget.porcelain.clone import CloneJob, CloneOptions, ClonePlan

__all__ = ["Recorder", "clone"]


class Recorder:
    """A reporter that remembers, and stops the job when the clone is served or hydrated."""

    def __init__(self, stop_when: str = "") -> None:
        self.calls: list[str] = []
        self.done: list[int] = []
        self.uris: list[str] = []
        self._stop_when = stop_when

    def serving(self, plan: ClonePlan, uris: list[str]) -> None:
        self.uris = uris
        self._called("serving")

    def progress(self, done: int, size: int) -> None:
        self.done.append(done)

    def hydrated(self) -> None:
        self._called("hydrated")

    def failed(self, status: str) -> None:
        self._called("failed")

    def source_changed(self, reason: str) -> None:
        self._called("source_changed")

    def stopping(self) -> None:
        self._called("stopping")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self._stop_when:
            asyncio.get_running_loop().call_later(
                0.05, os.kill, os.getpid(), signal.SIGTERM
            )


async def clone(
    recorder: Recorder | None = None,
    *,
    source: str = "source",
    dest: str = "dest",
    metadata: str | None = None,
    listen: tuple[str, ...] = (),
    exit_when_hydrated: bool = True,
    overwrite: bool = False,
    control: str | None = None,
    then_linear: bool = False,
    hydration_rate: int = 0,
) -> int:
    options = CloneOptions(
        source=source,
        dest=dest,
        metadata=metadata,
        listen=listen,
        exit_when_hydrated=exit_when_hydrated,
        overwrite=overwrite,
        control=control,
        then_linear=then_linear,
        hydration_rate=hydration_rate,
    )
    return await CloneJob(options, recorder or Recorder()).run()
