"""What a config file may say. A file is a Ray Serve config; `args` of its application is what stands here."""

import os
from typing import Annotated

from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from serve import addresses
from serve.gpus import Gpus
from serve.model_settings import DAY_S, MOST_REPLICAS, MOST_WAITING, Cpus, ModelSettings
from serve.strict import Strict

NEEDS = {"search": ("embedding", "rerank"), "adverts": ("vision",)}
"""Tasks of the models that a service calls; without one of each there is no such service."""
ESCAPED_BYTES, OTHER_BYTES = 12, 4096
"""Of JSON that a character may take, as \\ud83d\\ude00 does, and that all but a request's text may."""


def _as_gpus(text: str) -> str:
    Gpus.parse(text)
    return text


class Limits(Strict):
    """What one request may hold; over it 413 or 400."""

    max_body_mb: float = Field(25, ge=0.001, le=2000)  # between replicas travel at most 2 GiB
    max_bodies_mb: float = Field(
        256,
        ge=0.001,
        le=10**6,
        description="bodies of all requests that one ingress replica holds at once; over it 503",
    )
    max_text_chars: int = Field(200_000, ge=1, le=10**9)
    max_list_items: int = Field(2048, ge=1, le=10**6)
    max_image_mb: float = Field(20, ge=0.001, le=2000)
    max_image_megapixels: float = Field(50, ge=0.001, le=1000)

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)

    @property
    def max_bodies_bytes(self) -> int:
        return int(self.max_bodies_mb * 2**20)

    @property
    def max_message_bytes(self) -> int:
        """Of JSON with one text in it, every character escaped, and a few other fields."""
        return ESCAPED_BYTES * self.max_text_chars + OTHER_BYTES

    @field_validator("max_image_megapixels")
    @classmethod
    def _no_more_than_models_take(cls, megapixels: float) -> float:
        from deployments.images import MAX_MEGAPIXELS  # numpy and Pillow, which the command line does without

        if megapixels > MAX_MEGAPIXELS:
            raise ValueError(f"models take at most {MAX_MEGAPIXELS:g}")
        return megapixels


class ServiceSettings(Strict):
    """A composed service: its deployment's size, and its lane's in the whole cluster."""

    replicas: int = Field(1, ge=1, le=MOST_REPLICAS)
    num_cpus: Cpus = 0.1
    max_concurrent: int = Field(4, ge=1, le=MOST_WAITING, description="requests that run at once")
    max_queue: int = Field(20, ge=1, le=MOST_WAITING, description="requests that wait; over it 429")

    @property
    def most(self) -> int:
        """Requests that may wait or run."""
        return self.max_concurrent + self.max_queue


class AdvertSettings(ServiceSettings):
    """The service that checks adverts and keeps the record of them; its lane is that of the two stages."""

    max_concurrent: int = Field(16, ge=1, le=MOST_WAITING, description="stages that run at once")
    max_queue: int = Field(64, ge=1, le=MOST_WAITING, description="stages that wait; over it 429")
    lease_s: float = Field(
        30,
        ge=1,
        le=DAY_S,
        description="a stage whose lease is not renewed for this long fails; renewed four times per lease",
    )


Days = Annotated[float, Field(gt=0, le=36_500)]


class StoreSettings(Strict):
    """Where the record of adverts is kept."""

    url: Annotated[str, AfterValidator(addresses.of_a_database)] | None = Field(
        None, description="sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME; left out: dure.sqlite3 in .dure"
    )
    assets: str | None = Field(
        None,
        description="folder of the image files, or a URL that fsspec knows, as s3://BUCKET/PREFIX; else .dure/assets",
    )
    retention_days: Days | None = Field(None, description="after which a job is deleted; left out: never")
    tenant_retention_days: dict[str, Days] = Field({}, description="the same for single tenants")


class WebhookSettings(Strict):
    """Who hears of a finished stage."""

    url: Annotated[str, AfterValidator(addresses.of_a_webhook)]
    secret: str = Field(min_length=16, description="signs what is sent: X-Dure-Signature")
    timeout_s: float = Field(10, ge=0.1, le=600)
    max_attempts: int = Field(10, ge=1, le=100, description="after which an event is dead until it is asked for again")
    first_retry_s: float = Field(1, ge=0.01, le=DAY_S, description="doubled with each attempt")
    longest_retry_s: float = Field(600, ge=0.01, le=7 * DAY_S)


class FetchSettings(Strict):
    """Images from other servers, named by `render_asset_url`."""

    hosts: list[Annotated[str, StringConstraints(to_lower=True), AfterValidator(addresses.of_images)]] = Field(
        [], description="hosts, HOST or HOST:PORT, that may be fetched from; none: fetching is off"
    )
    private_addresses: bool = Field(False, description="may these hosts be in a private network?")
    timeout_s: float = Field(10, ge=0.1, le=600)


class TenantSettings(Strict):
    weight: float = Field(1, ge=0.001, le=1000, description="turns for one of another tenant's")


class IngressSettings(Strict):
    replicas: int = Field(1, ge=1, le=MOST_REPLICAS)
    num_cpus: Cpus = 0.1
    cors_origins: list[str] = Field([], description="pages of these origins may call from a browser")


class CacheSettings(Strict):
    """Where predictions are kept. With Redis, all ingresses share them."""

    url: Annotated[str, AfterValidator(addresses.of_a_cache)] = Field(
        "memory://", description="memory://, redis://HOST:PORT/DB, rediss:// or unix://"
    )
    ttl_s: float = Field(60, ge=0, le=30 * DAY_S, description="how long a prediction is kept; 0: no cache")
    max_mb: float = Field(64, gt=0, le=10**6, description="what memory:// may hold, per ingress replica")
    timeout_s: float = Field(0.1, ge=0.001, le=60, description="for one answer of Redis; a slower one is done without")


Share = Annotated[float, Field(gt=0, le=1)]


class GuardSettings(Strict):
    """Over which share in use a machine is given no new work: 503 until it has fallen; null switches one off."""

    memory: Share | None = 0.9
    cpu: Share | None = Field(
        0.9, description="left out: off where a model runs on the CPU, which takes all of it by design"
    )
    gpu_memory: Share | None = Field(
        None, description="where others use the GPUs, too: models alone keep to their shares, and may fill a GPU"
    )


class WebSocketSettings(Strict):
    """Bounds on clients that type."""

    max_connections: int = Field(  # an ingress replica has 4096 in all
        3000, ge=1, le=4096, description="per ingress replica; over it a client is told to come back"
    )
    max_messages_per_s: float = Field(
        50, ge=0.1, le=10_000, description="of one connection; a client that goes on faster is disconnected"
    )
    max_mb_per_s: float = Field(4, ge=0.001, le=1000, description="of one connection's messages; the same")


class Settings(Strict):
    """`applications[0].args` of a config file."""

    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")], ModelSettings] = Field(
        min_length=1
    )
    gpus: Annotated[str, AfterValidator(_as_gpus)] | None = Field(
        None,
        description="of the machine, or of each node that has some, as 1x24GiB; a model without num_gpus gets the "
        "least share that will do; left out: it runs on the CPU",
    )
    ingress: IngressSettings = IngressSettings()
    search: ServiceSettings = ServiceSettings()
    adverts: AdvertSettings = AdvertSettings()
    store: StoreSettings = StoreSettings()
    webhook: WebhookSettings | None = None
    fetch: FetchSettings = FetchSettings()
    limits: Limits = Limits()
    cache: CacheSettings = CacheSettings()
    websocket: WebSocketSettings = WebSocketSettings()
    guard: GuardSettings = GuardSettings()
    tenants: dict[str, TenantSettings] = Field({}, description="by name; others have a weight of 1")
    request_timeout_s: float = Field(
        120, ge=0.1, le=DAY_S, description="a request's deadline; over it 504. X-Request-Timeout may ask for less"
    )
    load_wait_s: float = Field(
        60, ge=0, le=DAY_S, description="how long a request waits for a model that is loading; over it 503"
    )
    drain_s: float = Field(30, ge=0, le=DAY_S, description="how long a replica that stops may finish its requests")

    def service(self, name: str) -> ServiceSettings:
        """Of the service with that name."""
        of: dict[str, ServiceSettings] = {"search": self.search, "adverts": self.adverts}
        return of[name]

    @property
    def services(self) -> list[str]:
        """The names of those that have the models they need."""
        tasks = {model.task for model in self.models.values()}
        return [name for name, needed in NEEDS.items() if tasks.issuperset(needed)]

    @property
    def keeps_record(self) -> bool:
        """Are there adverts to check?"""
        return "adverts" in self.services

    @property
    def own_cores(self) -> bool:
        """Has this machine a core for every thread of every model that runs on the CPU?"""
        cores = os.cpu_count() or 1
        replicas = ((model.threads or cores) * model.autoscaling.max_replicas for model in self.on_cpu.values())
        return sum(replicas) <= cores

    @property
    def on_cpu(self) -> dict[str, ModelSettings]:
        """The models that use no GPU."""
        return {
            name: model for name, model in self.models.items() if not model.gpu_share and not self.leaves_out(model)
        }

    def guard_of(self, model: ModelSettings | None) -> GuardSettings:
        """What holds for a replica of the model, or for a process without one."""
        off: dict[str, None] = {}
        if model is None or not model.gpu_share:
            off["gpu_memory"] = None
        if self.on_cpu and "cpu" not in self.guard.model_fields_set:
            off["cpu"] = None
        return self.guard.model_copy(update=off)

    def leaves_out(self, model: ModelSettings) -> bool:
        """Is the model's share of a GPU to be worked out?"""
        return self.gpus is not None and model.num_gpus is None

    @model_validator(mode="after")
    def _shares_of_spread_models(self) -> "Settings":
        spread = [name for name, model in self.models.items() if self.leaves_out(model) and model.device_map]
        if spread:
            raise ValueError(f"{', '.join(spread)}: how many GPUs a device_map may use has to be said: num_gpus")
        return self

    @model_validator(mode="after")
    def _reserved_names(self) -> "Settings":
        taken = sorted({"ingress", "search", "adverts"} & set(self.models))
        if taken:
            raise ValueError(f"models can't be named {', '.join(taken)}: deployments of Dure itself have that name")
        return self
