"""What the routes call: the models of the config by name and task, and the composed services."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
    """The deployment and replica that this graph is held by."""
    settings: Settings
    watch: Watch
    models: dict[str, Model]
    services: dict[str, Deployment]
    predictions: Predictions
    lanes: Lanes
    reporter: Reporter
    patient: bool

    @classmethod
    def of(
        cls,
        settings: Settings,
        models: dict[str, DeploymentHandle],
        services: dict[str, DeploymentHandle],
        patient: bool = False,
    ) -> Graph:
        """The graph as the running replica sees it. A service, whose own queue is bounded, is `patient` with models."""
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
                {name: (settings.service(name).max_concurrent, settings.service(name).max_queue) for name in services},
                weights,
            ),
            Reporter(settings.guard_of(None)),
            patient,
        )

    def start(self) -> None:
        """Begin to listen to the board and to report to it; needs a running event loop."""
        keep_to_loopback()
        self.watch.start()
        for model in self.models.values():
            model.coalescer.start()
        if not self.patient:  # what a service was let in with is done
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
        """What this process should be doing all the time and has ceased to do."""
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
        """A slot of a service's lane for as long as the body runs. Raises DureError where there is none in time."""
        service.gate.check()
        async with self.lanes.admitted(service.name, caller, following):
            yield

    def _overload(self, models: list[str]) -> str:
        """Why this machine, or those that serve one of the models, should be given no more work."""
        return self.reporter.guard.reason or next(filter(None, map(self.watch.overload, models)), "")

    def model(self, task: str, name: str | None = None) -> Model:
        """The named model, else the first with the task. Raises a 404, or a 400 where the task is another."""
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
        """A composed service. Raises a 404 that says what it `needs` where there is none."""
        service = self.services.get(name)
        if service is None:
            raise errors.not_found(f"{name} needs {needs}; see GET /v1/models")
        return service
