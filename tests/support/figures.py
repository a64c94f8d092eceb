# SPDX-License-Identifier: Apache-2.0
"""Figures that a test makes up."""

from nbdtarget.control.figures import (
    DeviceFigures,
    FiguresAnswer,
    Histogram,
    TargetFigures,
)

__all__ = ["figures_of"]


def figures_of(*targets: TargetFigures, name: str = "d") -> FiguresAnswer:
    """Return the figures of a server with one device, which has these targets."""
    device = DeviceFigures(
        name=name,
        uuid="",
        size=sum(target.length for target in targets) * 512,
        suspended=False,
        failed=False,
        failure="",
        event_nr=0,
        connections=0,
        in_flight=0,
        operations={},
        targets=targets,
        deps=(),
        below=(),
        losses=0,
    )
    return FiguresAnswer(
        time_s=0.0,
        version="0",
        fast_path=True,
        pid=1,
        devices=(device,),
        clients=(),
        bounds=(),
        waiting=0,
        refused=0,
        operations={},
        latencies={},
        latency_bounds_s=(),
        loop_lag=Histogram(),
        loop_lag_bounds_s=(),
    )
