"""What routes call: the configured models, by name and task, and the composed services."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.loopback import keep_to_loopback
from serve import errors
from serve.board.reporter import Reporter
from serve.board.watch import Watch
from serve.caller import Caller
from serve.calls.cache import cache_of
from serve.calls.coalescer import Coalescer
from serve.calls.deployment import Deployment
from serve.calls.model import Model
from serve.calls.next_words import Predictions
from serve.config.settings import Settings
from serve.metrics import REGISTRY
from serve.progress import Following
from serve.queues.client import Lanes


@dataclass(frozen=True)
class Graph:
    me: tuple[str, str]
    """Names of the deployment and replica that hold this graph."""
    settings: Settings
    watch: Watch
    models: dict[str, Model]
    services: dict[str, Deployment]
    predictions: Predictions
    lanes: Lanes
    reporter: Reporter
    patient: bool
    """Calls wait for room in a model's queue instead of being refused."""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def of(
        cls,
        settings: Settings,
        models: dict[str, DeploymentHandle],
        services: dict[str, DeploymentHandle],
        patient: bool = False,
    ) -> Graph:
        """The graph of the running replica. Services set `patient`, because their own queue is already bounded."""
        context = serve.get_replica_context()
        weights = {name: tenant.weight for name, tenant in settings.tenants.items()}
        watch = Watch(name for name, model in settings.models.items() if not model.autoscaling.min_replicas)
        return cls(
            (context.deployment, context.replica_id.unique_id),
            settings,
            watch,
            {
                name: Model(name, model, models[name], patient, watch, settings.load_wait_s, weights)
                for name, model in settings.models.items()
            },
            {
                name: Deployment(name, handle, settings.service(name).most, weights=weights)
                for name, handle in services.items()
            },
            Predictions(cache_of(settings.cache)),
            Lanes(
                context.replica_id.unique_id,
                {name: (settings.service(name).max_concurrent, settings.service(name).max_queue) for name in services}
                | {name: model.lane for name, model in settings.models.items() if model.lane},
                weights,
            ),
            Reporter(settings.guard_of(None)),
            patient,
        )

    def start(self) -> None:
        """Start watching the board and reporting to it. Needs a running event loop."""
        keep_to_loopback()
        self.watch.start()
        for model in self.models.values():
            model.coalescer.start()
        if not self.patient:  # a service finishes the work it was admitted with
            for name, model in self.models.items():
                model.gate.overload = partial(self._overload, [name])
            for name, service in self.services.items():
                service.gate.overload = partial(
                    self._overload, [self.model(task).name for task in self.settings.entry(name).needs]
                )
        self.lanes.start([each.gate for each in (*self.models.values(), *self.services.values())])
        self.reporter.open(*self.me, REGISTRY)

    @property
    def dead(self) -> list[str]:
        """Names of background tasks of this process that have ended but should not have."""
        parts: dict[str, Watch | Lanes | Coalescer] = {
            "the watch of the board": self.watch,
            "the beat of the lanes": self.lanes,
        }
        parts |= {f"the coalescer of {name}": model.coalescer for name, model in self.models.items()}
        return [name for name, part in parts.items() if not part.alive]

    @asynccontextmanager
    async def admitted(
        self, service: Deployment, caller: Caller, following: Following | None = None
    ) -> AsyncIterator[None]:
        """Hold a slot in a service's lane while the body runs. Raises DureError if there is none in time."""
        service.gate.check()
        async with self.lanes.admitted(service.name, caller, following):
            yield

    def _overload(self, models: list[str]) -> str:
        """Why this machine, or one that serves the models, is overloaded. Empty if none is."""
        return self.reporter.guard.reason or next(filter(None, map(self.watch.overload, models)), "")

    def model(self, task: str, name: str | None = None) -> Model:
        """The named model, else the first with the task. Raises a 404, or a 400 if the named one has another task."""
        if name is None:
            found = next((model for model in self.models.values() if model.task == task), None)
            if found is None:
                raise errors.not_found(f"this server has no model with task {task}; see GET /v1/models", "model")
            return found
        model = self.named(name, "model")
        if model.task != task:
            raise errors.invalid(f"model {name!r} has task {model.task}, this endpoint needs {task}", "model")
        return model

    def named(self, name: str, param: str = "name") -> Model:
        """The model with this name. Raises a 404 for the field `param` if there is none."""
        model = self.models.get(name)
        if model is None:
            raise errors.not_found(f"no model {name!r}; the models are {', '.join(self.models)}", param)
        return model

    def service(self, name: str, needs: str) -> Deployment:
        """A composed service. If it is off, raises a 404 that says what it `needs`."""
        service = self.services.get(name)
        if service is None:
            raise errors.not_found(f"{name} needs {needs}; see GET /v1/models")
        return service
