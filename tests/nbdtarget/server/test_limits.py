# SPDX-License-Identifier: Apache-2.0
"""The budget that connections share."""

from nbdtarget.server.limits import Budget, Limits


def _budget() -> Budget:
    return Budget(
        Limits(
            requests_total_max=2,
            requests_in_flight_max=2,
            bytes_total_max=100,
            payload_max=100,
        )
    )


def test_full_of_requests() -> None:
    budget = _budget()
    budget.take(2, 0)
    assert budget.is_full(0)
    budget.give_back(1, 0)
    assert not budget.is_full(0)


def test_full_of_bytes() -> None:
    budget = _budget()
    budget.take(0, 60)
    assert not budget.is_full(40)
    assert budget.is_full(41)


def test_waiters_wake_once_and_in_order() -> None:
    budget = _budget()
    budget.take(0, 100)
    woken: list[int] = []
    budget.wait(lambda: woken.append(1))
    budget.wait(lambda: woken.append(2))
    assert budget.nr_waiters == 2
    budget.give_back(0, 10)
    budget.give_back(0, 10)
    assert woken == [1, 2]


def test_waiter_that_waits_again_is_woken_by_the_next_only() -> None:
    budget = _budget()
    budget.take(0, 100)
    woken: list[int] = []

    def wake() -> None:
        woken.append(budget.nr_bytes)
        if len(woken) == 1:
            budget.wait(wake)

    budget.wait(wake)
    budget.give_back(0, 1)
    assert woken == [99]
    budget.give_back(0, 1)
    assert woken == [99, 98]
