# SPDX-License-Identifier: Apache-2.0
import pytest

from nbdtarget.cli.progress import common
from nbdtarget.cli.progress.common import Lines, Nowhere, client_lines, open_display


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def now_ns(self) -> int:
        return int(self.now_s * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(common, "monotonic_ns", clock.now_ns)
    return clock


def test_plain_lines_come_once_a_period(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(10)
    for second in range(25):
        clock.now_s = 100.0 + second
        lines.show(f"after {second} s")
    assert capsys.readouterr().err.splitlines() == [
        f"nbdtarget: after {second} s" for second in (0, 10, 20)
    ]


def test_plain_line_that_says_nothing_new_is_left_out(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(10)
    lines.show("the same")
    clock.now_s += 60
    lines.show("the same")
    assert capsys.readouterr().err == "nbdtarget: the same\n"


def test_command_without_lines_shows_nothing_in_a_pipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open_display("writing back", period_s=None) as display:
        display.show("", 1, 2)
        assert isinstance(display, Nowhere)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (
            "nbd+unix:///d?socket=/run/a%20b",
            {
                "nbdinfo": "'nbd+unix:///d?socket=/run/a%20b'",
                "qemu-img": "info 'nbd+unix:///d?socket=/run/a%20b'",
                "qemu-system-x86_64": "-m 1G -drive 'file=nbd+unix:///d?socket=/run/a%20b,format=raw,if=virtio'",
                "nbd-client": "-unix '/run/a b' -N d /dev/nbd0",
            },
        ),
        (
            "nbd://[::1]:7/a%2Cb",
            {
                "nbdinfo": "'nbd://[::1]:7/a%2Cb'",
                "qemu-img": "info 'nbd://[::1]:7/a%2Cb'",
                "qemu-system-x86_64": "-m 1G -drive 'file=nbd://[::1]:7/a%2Cb,format=raw,if=virtio'",
                "nbd-client": "::1 7 -N a,b /dev/nbd0",
            },
        ),
        (
            "nbd+vsock://2:4000000000/a%2Cb",
            {
                "nbdinfo": "nbd+vsock://2:4000000000/a%2Cb",
                "qemu-img": "info --image-opts driver=nbd,server.type=vsock,server.cid=2,server.port=4000000000,export=a,,b",
            },
        ),
        ("nbds://host:7/d", {"nbdinfo": "nbds://host:7/d"}),
        ("nbds+vsock://2:7/d", {"nbdinfo": "nbds+vsock://2:7/d"}),
    ],
    ids=["unix", "tcp", "vsock", "tls", "vsock with tls"],
)
def test_lines_to_paste_are_for_clients_that_can_attach(
    uri: str, expected: dict[str, str]
) -> None:
    lines = [line.removeprefix("sudo ").partition(" ") for line in client_lines(uri)]
    said = {program: words for program, _, words in lines}
    copying = said.pop("nbdcopy")
    assert copying == f"--progress {expected['nbdinfo']} copy.img"
    assert said == expected
