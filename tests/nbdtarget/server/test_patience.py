# SPDX-License-Identifier: Apache-2.0
"""How long a connection waits for its client, in simulated time."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from nbdtarget.common.clock import Clock
from nbdtarget.server.limits import Limits
from nbdtarget.server.patience import Patience
from nbdtarget.server.states import DRAINING, TRANSMISSION
from tests.support.clock import SimClock


@dataclass
class Client:
    """A connection, its handshake, its flow and its output in one, as far as they are asked."""

    peer: str = "client"
    state: int = TRANSMISSION
    says_disc: bool = False
    nr_options: int = 0
    starts_tls: bool = False
    progress_ns: int = 0
    is_blocked: bool = False
    nr_aborts: int = 0
    bounds_met: list[str] = field(default_factory=list)

    def has_said_disc(self) -> bool:
        return self.says_disc

    def abort(self) -> None:
        self.nr_aborts += 1

    def met(self, bound: str) -> None:
        self.bounds_met.append(bound)


LIMITS = Limits(
    handshake_timeout_s=10, handshake_total_s=25, stall_timeout_s=30, linger_s=2
)
Made = tuple[Client, Patience, SimClock]


@pytest.fixture
def made() -> Made:
    client, clock = Client(), SimClock()
    return client, make(client, clock), clock


def make(client: Client, clock: Clock) -> Patience:
    # The type is Any, because the client stands in for all of them.
    part: Callable[[], object] = lambda: client  # noqa: E731
    return Patience(client, LIMITS, clock, part(), part(), part())  # type: ignore[arg-type]


def test_handshake_goes_on_as_long_as_options_come_and_it_is_not_too_long(
    made: Made,
) -> None:
    client, patience, clock = made
    patience.await_handshake()
    for _ in range(2):
        client.nr_options += 1
        clock.advance(10)
        assert client.nr_aborts == 0
    client.nr_options += 1
    clock.advance(10)
    assert client.nr_aborts == 1


def test_handshake_without_an_option_ends(made: Made) -> None:
    client, patience, clock = made
    patience.await_handshake()
    clock.advance(9.9)
    assert client.nr_aborts == 0
    clock.advance(0.2)
    assert client.nr_aborts == 1


@pytest.mark.parametrize("says_disc", [False, True])
def test_only_a_client_that_wants_to_leave_must_take_its_replies(
    made: Made, says_disc: bool
) -> None:
    client, patience, clock = made
    client.is_blocked, client.says_disc = True, says_disc
    patience.await_replies()
    patience.await_replies()  # one look is enough
    clock.advance(20)
    client.progress_ns = clock.now_ns()  # it has taken some
    clock.advance(20)
    assert client.nr_aborts == 0
    clock.advance(15)
    assert client.nr_aborts == says_disc
    patience.end()


def test_nothing_is_awaited_when_all_replies_were_taken(made: Made) -> None:
    client, patience, clock = made
    client.says_disc = True
    patience.await_replies()
    clock.advance(100)
    assert client.nr_aborts == 0
    client.state = DRAINING  # its last replies are on their way
    patience.await_replies()
    clock.advance(100)
    assert client.nr_aborts == 0
    patience.end()


def test_lingering_takes_the_place_of_all_else_and_ends(made: Made) -> None:
    client, patience, clock = made
    patience.await_handshake()
    patience.linger()
    clock.advance(2)
    assert client.nr_aborts == 1
    patience.linger()
    patience.release()
    clock.advance(100)
    assert client.nr_aborts == 1


def test_handshake_of_tls_that_stalls_has_no_time_of_its_own(made: Made) -> None:
    client, patience, clock = made
    patience.await_handshake()
    clock.advance(1)
    client.nr_options, client.starts_tls = 1, True
    clock.advance(8.9)
    assert client.nr_aborts == 0
    clock.advance(0.1)
    assert (client.nr_aborts, client.bounds_met) == (1, ["handshake_timeout_s"])
