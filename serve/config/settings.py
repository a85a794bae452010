"""Dure's settings: `applications[0].args` of a config file, which is a Ray Serve config."""

import os
from typing import Annotated

from pydantic import (
    AfterValidator,
    Field,
    field_validator,
    model_validator,
)

from serve.config import addresses
from serve.config.base import Strict
from serve.config.gpus import Gpus
from serve.config.model import DAY_S, MOST_REPLICAS, Cpus, ModelSettings
from serve.config.services import (
    SERVICES,
    AdvertSettings,
    FetchSettings,
    OwnService,
    ServiceEntry,
    ServiceSettings,
    WebhookSettings,
)

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names of models and services."""
ESCAPED_BYTES, OTHER_BYTES = 12, 4096
"""Most bytes of JSON per character, as in \\ud83d\\ude00, and for everything but the text of a request."""


def _as_gpus(text: str) -> str:
    Gpus.parse(text)
    return text


class Limits(Strict):
    """Bounds on the size of requests. 1 MB is 2^20 bytes."""

    max_body_mb: float = Field(  # messages between replicas are at most 2 GiB
        25, ge=0.001, le=2000, description="Largest body of a request. Over it: 413."
    )
    max_bodies_mb: float = Field(
        256,
        ge=0.001,
        le=10**6,
        description="Request bodies that one ingress replica holds at a time, all together. Over it: 503.",
    )
    max_text_chars: int = Field(
        200_000, ge=1, le=10**9, description="Characters of one text, or token ids of one list. Over it: 413."
    )
    max_list_items: int = Field(
        2048, ge=1, le=10**6, description="Entries of `input`, `documents` or `items`. Over it: 400."
    )
    max_image_mb: float = Field(20, ge=0.001, le=2000, description="Largest image file. Over it: 413.")
    max_image_megapixels: float = Field(
        50, ge=0.001, le=1000, description="Pixels of one image, in millions. Over it: 413. Models take at most 50."
    )

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)

    @property
    def max_bodies_bytes(self) -> int:
        return int(self.max_bodies_mb * 2**20)

    @property
    def max_message_bytes(self) -> int:
        """Largest JSON message with one text, every character escaped, and a few other fields."""
        return ESCAPED_BYTES * self.max_text_chars + OTHER_BYTES

    @field_validator("max_image_megapixels")
    @classmethod
    def _no_more_than_models_take(cls, megapixels: float) -> float:
        from deployments.images import MAX_MEGAPIXELS  # imports numpy and Pillow, which the CLI does not need

        if megapixels > MAX_MEGAPIXELS:
            raise ValueError(f"models take at most {MAX_MEGAPIXELS:g}")
        return megapixels


Days = Annotated[float, Field(gt=0, le=36_500)]


class StoreSettings(Strict):
    """Where the record of adverts is kept, and for how long."""

    url: Annotated[str, AfterValidator(addresses.of_a_database)] | None = Field(
        None,
        description="`sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`. Left out: `dure.sqlite3` in the "
        "state folder.",
    )
    assets: str | None = Field(
        None,
        description="Folder of the image files, or an fsspec URL such as `s3://BUCKET/PREFIX`. Left out: `assets` in "
        "the state folder.",
    )
    retention_days: Days | None = Field(
        None, description="Jobs older than this many days are deleted. Left out: they are kept."
    )
    tenant_retention_days: dict[str, Days] = Field({}, description="The same for single tenants, by name.")


class TenantSettings(Strict):
    """One tenant, by the name that its requests carry in `X-Tenant-ID` or `tenant_id`."""

    weight: float = Field(
        1, ge=0.001, le=1000, description="Turns that the tenant gets for each turn of a tenant whose weight is 1."
    )


class IngressSettings(Strict):
    """The deployment that takes the requests."""

    replicas: int = Field(1, ge=1, le=MOST_REPLICAS, description="Replicas of the ingress.")
    num_cpus: Cpus = Field(0.1, description="CPUs that Ray books per replica, for placement only.")
    cors_origins: list[str] = Field(
        [], description="Origins whose pages may call from a browser, over HTTP and WebSocket. `*` allows all."
    )


class CacheSettings(Strict):
    """Cache of next-word predictions. With Redis, all ingress replicas share it."""

    url: Annotated[str, AfterValidator(addresses.of_a_cache)] = Field(
        "memory://", description="`memory://`, `redis://HOST:PORT/DB`, `rediss://...` or `unix://...`."
    )
    ttl_s: float = Field(60, ge=0, le=30 * DAY_S, description="Seconds that a prediction is kept. 0 switches it off.")
    max_mb: float = Field(64, gt=0, le=10**6, description="Size of a `memory://` cache, per ingress replica.")
    timeout_s: float = Field(
        0.1, ge=0.001, le=60, description="Seconds to wait for Redis. If it takes longer, the model is asked instead."
    )


Share = Annotated[float, Field(gt=0, le=1)]


class GuardSettings(Strict):
    """Load at which no new requests are admitted: 503 until it has fallen by 0.05. Sampled every 3 s.

    Each is a fraction of what the machine, or the container, has. `null` switches one off.
    """

    memory: Share | None = Field(0.9, description="Memory in use.")
    cpu: Share | None = Field(
        0.9, description="CPU time in use. Left out, it is off if a model runs on the CPU, as models use all of it."
    )
    gpu_memory: Share | None = Field(
        None,
        description="Memory in use on the GPUs. Set it if other programs use them, too; models keep to their shares "
        "and may fill a GPU.",
    )


class WebSocketSettings(Strict):
    """Bounds on WebSocket clients."""

    max_connections: int = Field(  # an ingress replica has 4096 connections in all
        3000, ge=1, le=4096, description="Connections per ingress replica. Over it: close code 1013."
    )
    max_messages_per_s: float = Field(
        50, ge=0.1, le=10_000, description="Messages per second on one connection. Over it: close code 1008."
    )
    max_mb_per_s: float = Field(
        4, ge=0.001, le=1000, description="MB per second on one connection. Over it: close code 1008."
    )


class Settings(Strict):
    """Everything under `applications[0].args`."""

    models: dict[Annotated[str, Field(pattern=NAME)], ModelSettings] = Field(
        min_length=1, description="The models by name, at least one. The first with a task is its default."
    )
    gpus: Annotated[str, AfterValidator(_as_gpus)] | None = Field(
        None,
        description="GPUs of the machine, or of each node that has some, such as `1x24GiB`. A model without `num_gpus` "
        "then gets the smallest share that `dure plan` works out. Left out, such a model runs on the CPU.",
    )
    ingress: IngressSettings = Field(IngressSettings(), description="The deployment that takes the requests.")
    search: ServiceSettings = Field(ServiceSettings(), description="The search service.")
    adverts: AdvertSettings = Field(AdvertSettings(), description="The service of adverts on record.")
    services: dict[Annotated[str, Field(pattern=NAME)], OwnService] = Field(
        {}, description="Services of your own, by name."
    )
    store: StoreSettings = Field(StoreSettings(), description="Where adverts are recorded.")
    webhook: WebhookSettings | None = Field(None, description="Where events are delivered. Left out: nowhere.")
    fetch: FetchSettings = Field(FetchSettings(), description="Images on other servers.")
    limits: Limits = Field(Limits(), description="Bounds on requests.")
    cache: CacheSettings = Field(CacheSettings(), description="The cache of predictions.")
    websocket: WebSocketSettings = Field(WebSocketSettings(), description="Bounds on WebSocket clients.")
    guard: GuardSettings = Field(GuardSettings(), description="Load at which no new requests are admitted.")
    tenants: dict[str, TenantSettings] = Field(
        {}, description="Tenants by name. One that is not listed has a weight of 1."
    )
    request_timeout_s: float = Field(
        120,
        ge=0.1,
        le=DAY_S,
        description="Deadline of a request, in seconds. Over it: 504. `X-Request-Timeout` may ask for less.",
    )
    load_wait_s: float = Field(
        60, ge=0, le=DAY_S, description="Seconds that a request waits for a model that is loading. Over it: 503."
    )
    drain_s: float = Field(
        30, ge=0, le=DAY_S, description="Seconds that a stopping replica has to finish its requests."
    )

    def service(self, name: str) -> ServiceSettings:
        """The settings of a service, Dure's or one of your own."""
        if own := self.services.get(name):
            return own
        found: ServiceSettings = getattr(self, name)
        return found

    def entry(self, name: str) -> ServiceEntry:
        """The registry entry of a service, Dure's or one of your own."""
        return self.services[name].entry if name in self.services else SERVICES[name]

    @property
    def active_services(self) -> list[str]:
        """Names of the services whose models are configured."""
        tasks = {model.task for model in self.models.values()}
        return [name for name in (*SERVICES, *self.services) if tasks.issuperset(self.entry(name).needs)]

    @property
    def keeps_record(self) -> bool:
        """Whether the adverts service is active and keeps a record."""
        return "adverts" in self.active_services

    @property
    def own_cores(self) -> bool:
        """Whether this machine has a core for every thread of every model on the CPU."""
        cores = os.cpu_count() or 1
        replicas = ((model.threads or cores) * model.autoscaling.max_replicas for model in self.on_cpu.values())
        return sum(replicas) <= cores

    @property
    def on_cpu(self) -> dict[str, ModelSettings]:
        """The models that run on the CPU."""
        return {
            name: model
            for name, model in self.models.items()
            if not model.gpu_share and not self.leaves_out(model) and not model.upstream
        }

    def guard_of(self, model: ModelSettings | None) -> GuardSettings:
        """Guard settings for a replica of this model, or for a process without a model."""
        off: dict[str, None] = {}
        if model is None or not model.gpu_share:
            off["gpu_memory"] = None
        if self.on_cpu and "cpu" not in self.guard.model_fields_set:
            off["cpu"] = None
        return self.guard.model_copy(update=off)

    def leaves_out(self, model: ModelSettings) -> bool:
        """Whether the model's GPU share is left out and must be worked out."""
        return self.gpus is not None and model.num_gpus is None and model.upstream is None

    @model_validator(mode="after")
    def _shares_of_spread_models(self) -> "Settings":
        spread = [name for name, model in self.models.items() if self.leaves_out(model) and model.device_map]
        if spread:
            raise ValueError(f"{', '.join(spread)}: a model with device_map needs num_gpus, the number of GPUs to use")
        return self

    @model_validator(mode="after")
    def _reserved_names(self) -> "Settings":
        own = {"ingress", *SERVICES}
        for kind, names, taken in (("models", self.models, own | set(self.services)), ("services", self.services, own)):
            if both := sorted(taken & set(names)):
                raise ValueError(f"{kind} can't be named {', '.join(both)}: another deployment has that name")
        return self
