"""Builds the ingress graph that a config file describes: `import_path: serve.app:build`."""

# No `from __future__ import annotations` here: Serve reads the annotation of `build` to validate what it passes.
import importlib
import uuid
from dataclasses import replace
from functools import partial
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.replica import ModelReplica
from deployments.upstream.replica import UpstreamReplica
from serve.board.reporter import Reporter
from serve.board.reports import CONSTRUCTOR_TRIES
from serve.config.model import Autoscaling, ModelSettings
from serve.config.settings import Settings
from serve.ingress import Ingress
from serve.planning.plan import with_shares
from serve.services.base import Service

HEALTH_CHECK_PERIOD_S = 2
HEALTH_CHECK_TIMEOUT_S = 10
POLICY = "deployments.scaling:by_items"
METRICS_INTERVAL_S = 1
"""Serve's default of 10 s delays the reaction to a rush, and to the first request for a sleeping model, by as much."""
INGRESS_MAX_ONGOING = 4096
"""Every stream and WebSocket counts as one. HAProxy has the same limit."""


def build(settings: Settings) -> Application:
    """The application: one deployment per model, one per composed service, and the ingress that calls them."""
    settings = with_shares(settings)
    deploy = uuid.uuid4().hex
    largest_first = sorted(settings.models.items(), key=lambda item: -item[1].gpu_share)  # Serve starts them in order
    models = {name: _model(name, model, settings, deploy) for name, model in largest_first}
    services = {name: _service(name, settings, models) for name in settings.active_services}
    return (
        serve.deployment(Ingress)
        .options(
            name="ingress",
            num_replicas=settings.ingress.replicas,
            ray_actor_options={"num_cpus": settings.ingress.num_cpus},
            max_ongoing_requests=INGRESS_MAX_ONGOING,
            **_lifecycle(settings),
        )
        .bind(settings, models, services)
    )


def _service(name: str, settings: Settings, models: dict[str, Application]) -> Application:
    known, service = settings.service(name), _class_at(settings.entry(name).deployment)
    deployment = serve.deployment(service).options(
        name=name,
        num_replicas=known.replicas,
        ray_actor_options={"num_cpus": known.num_cpus},
        max_ongoing_requests=2 * known.most + service.max_streams,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        **_lifecycle(settings),
    )
    return deployment.bind(settings, models)


def _class_at(path: str) -> type[Service]:
    module, _, name = path.partition(":")
    found: type[Service] = getattr(importlib.import_module(module), name)
    return found


def _model(name: str, model: ModelSettings, settings: Settings, deploy: str) -> Application:
    scaling = model.autoscaling
    fixed = scaling.min_replicas == scaling.max_replicas
    replica = UpstreamReplica if model.upstream else ModelReplica
    deployment = serve.deployment(replica).options(
        name=name,
        ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.gpu_share},
        max_ongoing_requests=max(2 * model.max_queue, model.max_batch_items),
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        **({"num_replicas": scaling.min_replicas} if fixed else {"autoscaling_config": _autoscaling(scaling)}),
        **_lifecycle(settings, model.gpu_share),
    )
    spec = replace(model.spec(name), deploy=deploy, own_cores=settings.own_cores)
    return deployment.bind(spec, partial(Reporter, settings.guard_of(model)))


def _autoscaling(scaling: Autoscaling) -> dict[str, Any]:
    known = scaling.model_dump(exclude_none=True)
    known["policy"] = {"policy_function": known.get("policy", POLICY)}
    return known | {"metrics_interval_s": METRICS_INTERVAL_S}


def _lifecycle(settings: Settings, num_gpus: float = 0) -> dict[str, float]:
    """Options of all deployments. New replicas start before old ones stop, except on GPUs, which may not fit both."""
    return {
        "max_surge_percent": 0 if num_gpus else 100,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": settings.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
