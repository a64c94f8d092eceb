# SPDX-License-Identifier: Apache-2.0
"""The figures of a server are those of its rooms."""

import errno as errnos

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.server.bounds import BOUNDS, UNCOUNTED
from nbdtarget.server.limits import Limits
from nbdtarget.server.traffic import NR_TOTALS
from nbdtarget_protocol import consts as c
from tests.support.served import AWKWARD, Served
from tests.support.site import BLOCK, SIZE


async def test_a_device_with_its_clients(served: Served) -> None:
    figures = await served.figures()
    assert [device.name for device in figures.devices] == ["c", "k", AWKWARD, "failed"]
    device = figures.devices[0]
    assert (device.size, device.connections, device.in_flight) == (SIZE, 1, 0)
    assert device.bytes_in_flight == 0
    assert not device.failed
    assert device.deps[-1].endswith("/source")
    operations = device.operations
    assert (operations["read"].nr, operations["read"].nr_bytes) == (1, 4096)
    assert operations["read"].nr_failed == 1
    assert (operations["write"].nr, operations["write"].nr_bytes) == (1, 65536)
    assert operations["write"].time_s > 0
    assert operations.keys() == {"read", "write"}
    (target,) = device.targets
    assert (target.start, target.length, target.type) == (0, SIZE // 512, "clone")
    assert target.fields["region_size_bytes"] == BLOCK

    (client,) = figures.clients
    assert client.device == "c"
    assert client.identity.startswith("uid:")
    assert client.operations == operations
    assert figures.operations == operations


async def test_a_device_that_could_not_be_opened(served: Served) -> None:
    (device,) = (await served.figures("failed")).devices
    assert device.failed
    assert device.failure == "no such disk"
    assert device.targets == ()


async def test_one_device_by_name(served: Served) -> None:
    (device,) = (await served.figures("k")).devices
    assert device.name == "k"
    assert device.operations == {}
    with pytest.raises(TableError) as caught:
        await served.figures("nosuch")
    assert caught.value.errno == errnos.ENXIO


async def test_of_the_server(served: Served) -> None:
    figures = await served.figures()
    bounds = {bound.name: (bound.maximum, bound.used) for bound in figures.bounds}
    assert bounds["connections_max"] == (Limits().connections_max, 1)
    assert bounds["requests_total_max"] == (Limits().requests_total_max, 0)
    assert bounds["export_bytes_max"] == (Limits().export_bytes_max, 0)
    assert bounds["export_connections_max"] == (Limits().export_connections_max, 1)
    assert bounds["payload_max"] == (Limits().payload_max, None)
    assert figures.latencies["read"].counts == tuple(
        served.listener.accounts.all.counts()[c.CMD_READ][NR_TOTALS:]
    )
    assert sum(figures.latencies["read"].counts) == 1
    assert len(figures.latency_bounds_s) + 1 == len(figures.latencies["read"].counts)
    assert [each.path for each in figures.certificates] == list(served.certificates)
    assert (figures.refused, figures.waiting) == (0, 0)


async def test_each_bound_has_a_metric(served: Served) -> None:
    assert served.observer is not None
    text = (await served.observer.metrics()).decode()
    for name in BOUNDS:
        assert f'nbdtarget_limit{{bound="{name}"}} ' in text
        met = f'nbdtarget_limit_met_total{{bound="{name}"}} 0'
        assert (met in text) == (name not in UNCOUNTED)
    assert 'nbdtarget_limit_used{bound="export_connections_max"} 1\n' in text
    assert 'nbdtarget_limit_used{bound="payload_max"}' not in text


async def test_commits_are_counted(served: Served) -> None:
    assert (await served.peer.ask(c.CMD_FLUSH)).error == 0
    for device in (await served.figures("c", "k")).devices:
        fields = device.targets[0].fields
        assert int(str(fields["commits"])) > 0
        assert float(str(fields["commit_time_s"])) > 0
