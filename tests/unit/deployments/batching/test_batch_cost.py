"""Closed loops of clients against an engine, on a clock that only these tests move."""

from __future__ import annotations

import heapq

from deployments.batching.batch_cost import BatchCost, Linger

ROOM = 32
BATCH_S = 0.1


def batches(clients: int, think_s: float, lingers: bool = True, seconds: float = 10) -> tuple[list[int], float]:
    """Sizes of the batches, and the share of the time that the engine was running.

    Each client asks again `think_s` after its answer, one client after the other 0.1 ms apart.
    """
    now = 0.0
    linger = Linger(BatchCost(), lambda: now)
    arrivals = [0.003 * client for client in range(clients)]
    waiting, busy = 0, 0.0
    sizes: list[int] = []

    def pass_until(then: float) -> None:
        nonlocal now, waiting
        while arrivals and arrivals[0] <= then:
            now = heapq.heappop(arrivals)
            waiting += 1
            linger.arrived(1)
        now = then

    while now < seconds:
        if not waiting:
            pass_until(arrivals[0])
            continue
        wait_s = linger.wait_s(waiting, waiting, ROOM)
        if lingers and wait_s > 0:
            pass_until(min(now + wait_s, arrivals[0]) if arrivals else now + wait_s)
            continue
        size = min(waiting, ROOM)
        waiting -= size
        pass_until(now + BATCH_S)
        busy += BATCH_S
        linger.cost.observe(size, BATCH_S)
        linger.ended(size, BATCH_S)
        sizes.append(size)
        for client in range(size):
            heapq.heappush(arrivals, now + think_s + 0.0001 * client)
    return sizes, busy / now


def test_clients_that_come_back_at_once_share_every_batch() -> None:
    sizes, busy = batches(32, 0.003)
    assert set(sizes[len(sizes) // 2 :]) == {32}
    assert busy > 0.9


def test_a_lone_client_is_never_kept_waiting() -> None:
    sizes, busy = batches(1, 0.001)
    assert set(sizes) == {1}
    assert busy > 0.98


def test_nobody_waits_where_all_room_is_taken() -> None:
    sizes, busy = batches(64, 0.003)
    assert sum(sizes) / len(sizes) > 30
    assert busy > 0.99


def test_waiting_gains_much_where_clients_come_back_and_costs_little_where_they_do_not() -> None:
    gains = []
    for clients in (1, 2, 3, 8, 20, 32, 40, 100):
        for think_s in (0.001, 0.01, 0.02, 0.05, 0.13, 0.25):
            with_it, without = (sum(batches(clients, think_s, lingers)[0]) for lingers in (True, False))
            gains.append(with_it / without)
    assert max(gains) > 1.8
    assert min(gains) > 0.9
