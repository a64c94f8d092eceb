# SPDX-License-Identifier: Apache-2.0
"""Figures that a test makes up."""

from nbdtarget.control.figures import (
    DeviceFigures,
    FiguresAnswer,
    Histogram,
    TargetFigures,
)

__all__ = ["figures", "figures_of"]


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
    return figures(0.0, device)


def figures(time_s: float, *devices: DeviceFigures) -> FiguresAnswer:
    """Return the figures of a server with these devices and no clients."""
    return FiguresAnswer(
        time_s=time_s,
        version="1",
        fast_path=True,
        pid=1,
        devices=devices,
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
