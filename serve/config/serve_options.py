"""Ray Serve's own options in a config file: which ones Dure accepts, and why it refuses the others.

Serve accepts some options that Dure cannot work with, and ignores unknown keys, such as misspelt ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from serve.config import addresses
from serve.config.base import Strict, always, refused, unknown_name
from serve.config.settings import Settings

MOST_PER_NODE = 100
"""Serve's own limit."""
ANCHORS = "x-"
"""Top-level keys with this prefix hold YAML anchors and are otherwise ignored."""

FromArgs = Annotated[
    None, BeforeValidator(refused("Dure sets this from args: replicas, autoscaling, num_cpus, num_gpus, drain_s"))
]
NoTls = Annotated[None, BeforeValidator(refused("Dure serves no TLS; put a TLS proxy in front"))]


def _runtime_env(env: dict[str, Any]) -> dict[str, Any]:
    """Check a runtime environment as Ray does."""
    from ray.runtime_env import RuntimeEnv  # here, because importing Ray takes a second and few files need it

    unknown = [name for name in env if name not in RuntimeEnv.known_fields]
    if unknown:
        raise ValueError(unknown_name(unknown[0], "key", sorted(RuntimeEnv.known_fields)))
    try:
        RuntimeEnv(**env)
    except (TypeError, OSError) as error:
        raise ValueError(str(error)) from error
    return env


class HttpOptions(Strict):
    """Where Dure listens."""

    host: Annotated[str, AfterValidator(addresses.to_listen_on)] = Field(
        "127.0.0.1", description="IPv4 address or name. Required for a deploy into a cluster, such as `0.0.0.0`."
    )
    port: int = Field(8000, ge=1, le=addresses.MOST_PORT, description="Port of the endpoint.")
    keep_alive_timeout_s: int = Field(
        90, ge=1, le=3600, description="Seconds after which an idle connection is closed."
    )
    root_path: Annotated[
        None, BeforeValidator(refused("Dure answers at the root of its host; let the proxy in front strip a prefix"))
    ] = None
    request_timeout_s: Annotated[
        None,
        BeforeValidator(refused("set it as applications[0].args.request_timeout_s, which also applies to streams")),
    ] = None
    ssl_keyfile: NoTls = None
    ssl_certfile: NoTls = None
    ssl_keyfile_password: NoTls = None
    ssl_ca_certs: NoTls = None


class DeploymentOptions(Strict):
    """Options of one deployment: a model, a service or the ingress."""

    name: str = Field(description="Name of a model, of a service, or `ingress`.")
    max_replicas_per_node: int | None = Field(
        None, ge=1, le=MOST_PER_NODE, description="Most replicas of it on one machine."
    )
    logging_config: dict[str, Any] | None = Field(None, description="Ray Serve's logging options for it.")
    num_replicas: FromArgs = None
    autoscaling_config: FromArgs = None
    ray_actor_options: FromArgs = None
    max_ongoing_requests: FromArgs = None
    max_queued_requests: FromArgs = None
    graceful_shutdown_timeout_s: FromArgs = None


class ApplicationOptions(Strict):
    """The one application of the file."""

    name: Annotated[str, AfterValidator(always("dure", "commands find the application by this name"))] = Field(
        description="Always `dure`."
    )
    route_prefix: Annotated[
        str,
        AfterValidator(always("/", "Dure answers at the root of its host; let a proxy in front strip a prefix")),
    ] = Field("/", description="Always `/`.")
    import_path: Annotated[str, AfterValidator(always("serve.app:build", "this function builds Dure"))] = Field(
        description="Always `serve.app:build`."
    )
    args: Settings = Field(description="Dure's own settings.")
    runtime_env: Annotated[dict[str, Any], AfterValidator(_runtime_env)] = Field(
        {}, description="Ray's runtime environment, such as the `working_dir` with an engine of your own."
    )
    logging_config: dict[str, Any] | None = Field(None, description="Ray Serve's logging options of the application.")
    deployments: list[DeploymentOptions] = Field([], description="Options of single deployments.")
    autoscaling_policy: Annotated[
        None, BeforeValidator(refused("set one for each model: args.models.NAME.autoscaling.policy"))
    ] = None
    external_scaler_enabled: Annotated[
        None, BeforeValidator(refused("Dure scales its models itself: set args.models.NAME.autoscaling"))
    ] = None

    @model_validator(mode="after")
    def _known_deployments(self) -> ApplicationOptions:
        known = ["ingress", *self.args.active_services, *self.args.models]
        names = [each.name for each in self.deployments]
        for number, name in enumerate(names):
            if name not in known:
                raise ValueError(f"deployments.{number}.name: {unknown_name(name, 'deployment', known)}")
            if name in names[:number]:
                raise ValueError(f"deployments.{number}.name: {name} is listed twice")
        return self


class FileOptions(Strict):
    """The top level of a config file. Keys that begin with `x-` may hold YAML anchors."""

    proxy_location: Literal["EveryNode", "HeadOnly"] = Field(
        "EveryNode", description="Which machines of a cluster take requests."
    )
    http_options: HttpOptions = Field(HttpOptions(), description="Where Dure listens.")
    logging_config: dict[str, Any] | None = Field(
        None, description="Ray Serve's logging options, such as `encoding: JSON` and `logs_dir`."
    )
    applications: list[ApplicationOptions] = Field(description="A list of one.")
    grpc_options: Annotated[None, BeforeValidator(refused("Dure has no gRPC"))] = None
    controller_options: Annotated[
        None, BeforeValidator(refused("set it in the environment of `dure serve` or `ray start`"))
    ] = None
    tracing_config: Annotated[None, BeforeValidator(refused("Dure writes no traces"))] = None
    target_capacity: Annotated[None, BeforeValidator(refused("set the number of replicas in applications[0].args"))] = (
        None
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_anchors(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if not str(key).startswith(ANCHORS)}

    @model_validator(mode="before")
    @classmethod
    def _one_application(cls, data: Any) -> Any:
        found = data.get("applications") if isinstance(data, dict) else None
        if isinstance(found, list) and len(found) != 1:
            raise ValueError(f"applications: Dure is one application, but the file lists {len(found)}")
        return data
