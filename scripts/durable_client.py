# SPDX-License-Identifier: Apache-2.0
"""`bench_durable.c`: writes that have to be on the disk before the next one, as fio reports its own jobs."""

import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from scripts.fio import Job

__all__ = ["run_durable"]


@cache
def _program() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """Compile it once; the directory goes with the process."""
    directory = tempfile.TemporaryDirectory(prefix="nbdtarget-bench-")
    program = Path(directory.name) / "durable"
    source = Path(__file__).with_name("bench_durable.c")
    subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True)
    return directory, program


def run_durable(
    socket: Path, export: str, job: Job, runtime_s: float
) -> dict[str, Any]:
    """Run one job. Returns what `run_fio` returns, as far as it is known. Raises: CalledProcessError."""
    argv = [str(_program()[1]), str(socket), export, job.durable, str(job.depth)]
    argv.append(str(runtime_s))
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    count, seconds, _, p99_us = (float(word) for word in done.stdout.split())
    rate = count / seconds
    return {
        "write": {
            "iops": rate,
            "bw_bytes": rate * job.block_size,
            "total_ios": count,
            "clat_ns": {"percentile": {"99.000000": p99_us * 1000}},
        }
    }
