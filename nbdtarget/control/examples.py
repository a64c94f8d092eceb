# SPDX-License-Identifier: Apache-2.0
"""One request and one answer of each verb, for the OpenAPI document.

They are objects of the message types, so that an example that is no valid message is a mistake that mypy finds.
"""

import errno as errnos
from typing import Final

from nbdtarget.control import messages as m
from nbdtarget.control.figures import (
    Bound,
    ClientFigures,
    DeviceFigures,
    Event,
    Events,
    EventsAnswer,
    Figures,
    FiguresAnswer,
    Histogram,
    History,
    HistoryAnswer,
    Map,
    MapAnswer,
    Moment,
    OperationFigures,
    TargetFigures,
)

__all__ = ["EXAMPLES", "FAILURE"]

_TABLE: Final = "0 2097152 linear /srv/disk.img 0"
_DONE: Final = m.Done()
_LINE: Final = m.TableLine(0, 2097152, "linear", "/srv/disk.img 0")
_LINES: Final = m.LinesAnswer((m.DeviceLines("disk", (_LINE,)),))
_STATUS: Final = m.LinesAnswer(
    (
        m.DeviceLines(
            "disk",
            (
                m.TableLine(
                    0,
                    2097152,
                    "powercut",
                    "on 3 12288 0",
                    {
                        "power_is_on": True,
                        "nr_writes_at_risk": 3,
                        "at_risk_bytes": 12288,
                        "nr_cuts": 0,
                    },
                ),
            ),
            below=(m.BelowLine("/srv/disk.img"),),
        ),
    ),
    (m.Certificate("/etc/pki/nbdtarget/server-cert.pem", 1798761599.0),),
)
_INFO: Final = m.InfoAnswer(
    (
        m.InfoLine(
            name="disk",
            uuid="",
            state="ACTIVE",
            read_only=False,
            failed=False,
            live=True,
            inactive=False,
            open_count=1,
            event_nr=0,
            major=253,
            minor=0,
            nr_targets=1,
            size=1 << 30,
            deps=("/srv/disk.img",),
            below=(m.BelowLine("/srv/disk.img"),),
        ),
    )
)

_READS: Final = {"read": OperationFigures(1200, 4915200, 0.06)}
_FIGURES: Final = FiguresAnswer(
    time_s=1796070000.0,
    version="0.1.0",
    fast_path=True,
    pid=4711,
    devices=(
        DeviceFigures(
            name="disk",
            uuid="",
            size=1 << 30,
            suspended=False,
            failed=False,
            failure="",
            event_nr=0,
            connections=1,
            in_flight=0,
            operations=_READS,
            targets=(TargetFigures(0, 2097152, "linear", {}),),
            deps=("/srv/disk.img",),
            below=(m.BelowLine("/srv/disk.img"),),
            losses=0,
        ),
    ),
    clients=(ClientFigures("client 12", "disk", "uid:1000", 0, _READS),),
    bounds=(Bound("connections_max", 256, 1),),
    waiting=0,
    refused=0,
    operations=_READS,
    latencies={"read": Histogram((1190, 10), 0.06)},
    latency_bounds_s=(0.000025,),
    loop_lag=Histogram((60, 0), 0.01),
    loop_lag_bounds_s=(0.001,),
)

_EVENT: Final = Event(42, 1796070000.0, "info", "disk", "hydrated")

_MAP: Final = MapAnswer(
    states=("copied", "source", "copying"),
    cell_bytes=512 << 20,
    cells=((255, 0, 0), (60, 191, 4)),
    totals=(663748608, 401604608, 8388608),
    is_sampled=True,
)
_CUT: Final = "tear 7: 12 writes of 96 sectors at risk, 33 sectors survive"

_UNCACHED: Final = "/srv/slow.img alone is the disk; /srv/fast.img and /srv/fast.img.nbdtarget are not used any more"

FAILURE: Final = m.Failure(
    "Device or resource busy: in use by 1 NBD connection", errnos.EBUSY
)

_RULES: Final = ("rw cert:backup.example.org", "ro net:192.0.2.0/24")

EXAMPLES: Final[dict[str, tuple[m.Request, m.Answer]]] = {
    "access": (m.Access(), m.AccessAnswer((m.ExportAccess("disk", _RULES),))),
    "clear": (m.Clear("disk"), _DONE),
    "create": (m.Create("disk", _TABLE), _DONE),
    "deps": (
        m.Deps(("disk",)),
        m.DevicesAnswer((m.DeviceDeps("disk", ("/srv/disk.img",)),)),
    ),
    "events": (Events(41), EventsAnswer((_EVENT,), 42)),
    "figures": (Figures(("disk",)), _FIGURES),
    "history": (
        History("disk"),
        HistoryAnswer(5.0, (Moment(1796070000.0, _READS),)),
    ),
    "info": (m.Info(("disk",)), _INFO),
    "load": (m.Load("disk", "0 1048576 linear /srv/a.img 0\n1048576 8 zero"), _DONE),
    "map": (Map("disk", 2), _MAP),
    "measure": (m.Measure(("disk",)), _LINES),
    "message": (m.Message("disk", 0, ("cycle", "tear", "7")), m.MessageAnswer(_CUT)),
    "remove": (m.Remove("disk"), _DONE),
    "remove_all": (m.RemoveAll(), m.Done(busy=("disk",))),
    "rename": (m.Rename("disk", "web"), _DONE),
    "resume": (m.Resume("disk"), _DONE),
    "set_access": (m.SetAccess("disk", _RULES), _DONE),
    "set_geometry": (m.SetGeometry("disk", 130, 255, 63, 0), _DONE),
    "set_uuid": (m.SetUuid("disk", "CLONE-disk"), _DONE),
    "status": (m.Status(("disk",)), _STATUS),
    "suspend": (m.Suspend("disk"), _DONE),
    "table": (m.Table(("disk",)), _LINES),
    "targets": (
        m.Targets(),
        m.TargetsAnswer((m.TargetType("cache", (2, 4, 0)),)),
    ),
    "uncache": (m.Uncache("disk"), m.UncacheAnswer(True, _UNCACHED)),
    "upgrade": (m.Upgrade(), m.UpgradeAnswer(4712)),
    "version": (
        m.Version(),
        m.VersionAnswer(
            "0.1.0", 4711, ("nbd+unix:///{name}?socket=/run/nbdtarget/nbd.sock",)
        ),
    ),
    "wait": (m.Wait("disk", 0), m.WaitAnswer(1)),
    "wipe_table": (m.WipeTable("disk"), _DONE),
}
