# SPDX-License-Identifier: Apache-2.0
"""Rates between two moments."""

from nbdtarget.control.figures import DeviceFigures, OperationFigures, TargetFigures
from nbdtarget.monitor.rates import Progress, Rate, progress_of, rates_of


def device(**operations: OperationFigures) -> DeviceFigures:
    return DeviceFigures(
        name="d",
        uuid="",
        size=1 << 20,
        suspended=False,
        failed=False,
        failure="",
        event_nr=0,
        connections=0,
        in_flight=0,
        operations=operations,
        targets=(),
        deps=(),
        below=(),
        losses=0,
    )


def clone(hydrated: int, sectors: int = 100 * 128) -> TargetFigures:
    fields = {"regions_hydrated": hydrated, "region_size_bytes": 65536}
    return TargetFigures(0, sectors, "clone", dict(fields))


def test_rates_are_differences() -> None:
    before = device(read=OperationFigures(100, 1000, 1.0))
    now = device(
        read=OperationFigures(300, 5000, 1.5), write=OperationFigures(10, 40960, 0.1)
    )
    rates = rates_of(now, before, 2.0)
    assert rates["read"] == Rate(100, 2000, 0.0025)
    assert rates["write"] == Rate(5, 20480, 0.01)
    assert rates_of(before, before, 2.0)["read"] == Rate(0, 0, None)


def test_a_server_that_was_started_anew_has_no_rate_yet() -> None:
    before = device(read=OperationFigures(100, 1000, 1.0))
    assert rates_of(device(read=OperationFigures(3, 30, 0.1)), before, 1.0) == {}
    assert rates_of(before, None, 1.0)["read"].per_s == 100


def test_progress_of_a_clone() -> None:
    size = 100 * 65536
    assert progress_of(clone(50), clone(40), 2.0) == Progress(
        size // 2, size, 5 * 65536, 10.0
    )
    assert progress_of(clone(50), clone(50), 2.0) == Progress(size // 2, size, 0, None)
    assert progress_of(clone(100), clone(90), 2.0) == Progress(
        size, size, 5 * 65536, None
    )
    assert progress_of(clone(50), None, 0) == Progress(size // 2, size, 0, None)
    # The last region is shorter than the others.
    short = progress_of(clone(100, 100 * 128 - 1), None, 1.0)
    assert short is not None
    assert short.done == short.total == size - 512
    assert progress_of(TargetFigures(0, 8, "zero", {}), None, 1.0) is None
