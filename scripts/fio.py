# SPDX-License-Identifier: Apache-2.0
"""fio and its nbd engine: one job, one report."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Job", "run_fio"]


@dataclass(frozen=True)
class Job:
    """A job for fio, which runs for as long as it is told."""

    name: str
    rw: str
    block_size: int
    depth: int
    cold: bool = False  # the image is dropped from the page cache first
    durable: str = ""  # "fua", "flush": not by fio but by `bench_durable.c`

    @property
    def writes(self) -> bool:
        return "write" in self.rw


def run_fio(
    uri: str, job: Job, runtime_s: float, *, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """Run one job, with `extra` options. Returns fio's report of it. Raises: CalledProcessError."""
    argv = ["fio", f"--name={job.name}", "--ioengine=nbd", f"--uri={uri}"]
    argv += [f"--rw={job.rw}", f"--bs={job.block_size}"]
    argv += [f"--iodepth={job.depth}", "--norandommap", "--randrepeat=0"]
    argv += ["--time_based", f"--runtime={round(runtime_s * 1000)}ms"]
    argv += ["--output-format=json", *extra]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    # fio prints a line of its own before the JSON.
    report = json.loads(done.stdout[done.stdout.index("{") :])
    result: dict[str, Any] = report["jobs"][0]
    if result["error"]:
        raise subprocess.CalledProcessError(result["error"], argv)
    return result
