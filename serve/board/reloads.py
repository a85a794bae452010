"""Reloading a model's replicas one after the other, and remembering it for replicas that start later."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from deployments.spec import Order

State = Literal["running", "done", "failed"]

NOT_YET = "a reload of this model is under way; wait for it to end"


@dataclass(frozen=True)
class Reload:
    """Progress of an order."""

    order: Order
    state: State = "running"
    reason: str = ""


@dataclass
class Reloads:
    """The orders of one model. If a replica can't carry one out, the replicas that did go back to what stood before."""

    deploy: str = ""
    standing: Order | None = None
    """The order that replicas follow when they start."""
    latest: Reload | None = None
    turn: str | None = None
    """The replica that reloads now."""
    applied: dict[str, int] = field(default_factory=dict)
    """By replica: the number of the last order it has carried out."""

    def order(self, deploy: str, changes: dict[str, Any], begun: int = 0) -> Order:
        """Make a new order. Raises ValueError while an earlier one is under way.

        `begun` is the highest number of an order that a replica has begun, perhaps one of an earlier board.
        """
        self._of(deploy)
        if self.latest and self.latest.state == "running":
            raise ValueError(NOT_YET)
        number = 1 + max([begun, *self.applied.values(), self.latest.order.number if self.latest else 0])
        self.latest = Reload(Order(number, deploy, changes))
        return self.latest.order

    def started(self, deploy: str) -> Order | None:
        """The order that a replica of this deploy must follow at its start instead of its config, if there is one."""
        self._of(deploy)
        return self.standing

    def ready(self, replica: str, order: Order | None, replicas: set[str]) -> Order | None:
        """A replica serves with `order` carried out; `replicas` are all that serve. Returns its next order, if any.

        A new board learns from this which order stands.
        """
        number = order.number if order else 0
        self.applied = {name: done for name, done in self.applied.items() if name in replicas} | {replica: number}
        if self.turn not in replicas or (self.turn == replica and self.latest and number >= self.latest.order.number):
            self.turn = None
        if order and self.latest is None and (self.standing is None or self.standing.number < number):
            self.deploy, self.standing = order.deploy, order
        if self.latest is None or self.latest.state != "running":
            return None
        wanted = self.latest.order
        if all(self.applied.get(name, 0) >= wanted.number for name in replicas):
            reason = self.latest.reason
            self.standing, self.latest = wanted, Reload(wanted, "failed" if reason else "done", reason)
        elif number < wanted.number and self.turn in (None, replica):
            self.turn = replica
            return wanted
        return None

    def refused(self, order: Order, reason: str) -> None:
        """A replica could not carry out an order, and keeps serving as before."""
        if self.latest is None or self.latest.order != order or self.latest.state != "running":
            return
        self.turn, number = None, order.number
        if any(done >= number for done in self.applied.values()) and not self.latest.reason:
            changes = self.standing.changes if self.standing else {}
            self.latest = Reload(Order(number + 1, self.deploy, changes), "running", reason)
        else:
            self.latest = Reload(self.latest.order, "failed", reason)

    def _of(self, deploy: str) -> None:
        """Forget all orders if they were given in another deploy."""
        if deploy != self.deploy:
            self.deploy, self.standing, self.latest, self.turn, self.applied = deploy, None, None, None, {}
