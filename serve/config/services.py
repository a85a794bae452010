"""Settings of the composed services in a config file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
)

from serve.config import addresses
from serve.config.base import Strict
from serve.config.model import DAY_S, MOST_REPLICAS, MOST_WAITING, OWN_CLASS, Cpus


@dataclass(frozen=True)
class ServiceEntry:
    """A composed service as registered with the rest of Dure."""

    deployment: str
    """MODULE:CLASS of its deployment."""
    needs: tuple[str, ...]
    """Tasks of the models that it calls. The service is off unless there is a model for each."""
    routes: tuple[str, ...]
    """Modules whose `router` has the service's endpoints."""
    endpoints: tuple[str, ...] = ()
    """Endpoints shown once the server is ready."""


SERVICES: Mapping[str, ServiceEntry] = MappingProxyType(
    {
        "search": ServiceEntry(
            "serve.services.search:Search", ("embedding", "rerank"), ("serve.routes.search",), ("POST /v1/search",)
        ),
        "adverts": ServiceEntry(
            "serve.services.adverts.service:Adverts",
            ("vision",),
            ("serve.routes.adverts.jobs", "serve.routes.adverts.stages", "serve.routes.adverts.job_events"),
        ),
    }
)
"""Dure's own services. The config has a service's settings under its name."""


class ServiceSettings(Strict):
    """A composed service: the size of its deployment, and of its lane in the whole cluster."""

    replicas: int = Field(1, ge=1, le=MOST_REPLICAS, description="Replicas of the service.")
    num_cpus: Cpus = Field(0.1, description="CPUs that Ray books per replica, for placement only.")
    max_concurrent: int = Field(
        4, ge=1, le=MOST_WAITING, description="Requests that run at a time, in the whole cluster."
    )
    max_queue: int = Field(20, ge=1, le=MOST_WAITING, description="Requests that may wait. Over it: 429.")

    @property
    def most(self) -> int:
        """Requests that may wait or run."""
        return self.max_concurrent + self.max_queue


class OwnService(ServiceSettings):
    """A service of your own."""

    service: str = Field(
        pattern=f"^{OWN_CLASS.pattern}$",
        description="`MODULE:CLASS`, a subclass of `serve.services.base.Service`.",
    )
    needs: list[str] = Field([], description="Tasks of the models that it calls.")
    routes: list[str] = Field([], description="Modules whose `router` has its endpoints.")
    options: dict[str, Any] = Field({}, description="Settings that only the service itself reads.")

    @property
    def entry(self) -> ServiceEntry:
        return ServiceEntry(self.service, tuple(self.needs), tuple(self.routes))


class AdvertSettings(ServiceSettings):
    """The service that checks adverts and keeps a record of them. Its lane holds calls of the two stages."""

    max_concurrent: int = Field(
        16, ge=1, le=MOST_WAITING, description="Stages that run at a time, in the whole cluster."
    )
    max_queue: int = Field(64, ge=1, le=MOST_WAITING, description="Stages that may wait. Over it: 429.")
    lease_s: float = Field(
        30,
        ge=1,
        le=DAY_S,
        description="A running stage whose lease is not renewed for this long fails. A live call renews it every "
        "second, or four times per lease if that is more often.",
    )


class WebhookSettings(Strict):
    """Where events are delivered. Without it, events are recorded as `no_webhook`."""

    url: Annotated[str, AfterValidator(addresses.of_a_webhook)] = Field(
        description="http or https URL that events are posted to."
    )
    secret: str = Field(min_length=16, description="Key of the signature in `X-Dure-Signature`, from 16 characters.")
    timeout_s: float = Field(10, ge=0.1, le=600, description="Seconds that one delivery may take.")
    max_attempts: int = Field(
        10, ge=1, le=100, description="Attempts after which an event is `dead` until it is redelivered by hand."
    )
    first_retry_s: float = Field(
        1, ge=0.01, le=DAY_S, description="Seconds before the second attempt. Doubled for each one after it."
    )
    longest_retry_s: float = Field(600, ge=0.01, le=7 * DAY_S, description="Most seconds between two attempts.")


class FetchSettings(Strict):
    """Images on other servers, as named by `render_asset_url`."""

    hosts: list[Annotated[str, StringConstraints(to_lower=True), AfterValidator(addresses.of_images)]] = Field(
        [], description="Hosts that images may be fetched from, as HOST or HOST:PORT. Empty: fetching is off."
    )
    private_addresses: bool = Field(False, description="Whether these hosts may have addresses in private networks.")
    timeout_s: float = Field(10, ge=0.1, le=600, description="Seconds that fetching one image may take.")
