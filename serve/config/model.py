"""Settings of one model in a config file."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from deployments.spec import ModelSpec, Precision, Runtime, Upstream
from serve.config.base import SettingsError, Strict, unknown_name
from serve.config.tasks import TASKS, model_spec

DAY_S = 86_400.0
MOST_REPLICAS = 1000
MOST_CPUS = 1024
MOST_GPUS = 64
MOST_WAITING = 100_000
"""Most requests or items in a queue."""
LEAST_SHARE = 0.0001
"""The unit in which Ray counts CPUs and GPUs."""
OWN_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""MODULE:CLASS."""
MEMORY = re.compile(r"[0-9]{1,9}(\.[0-9]{1,3})?(GiB|MiB|KiB|GB|MB|KB)")
"""A size of memory as accelerate reads it."""


def _bookable(count: float) -> float:
    if 0 < count < LEAST_SHARE:
        raise ValueError(f"has to be 0, or at least {LEAST_SHARE}")
    return count


Cpus = Annotated[float, Field(ge=0, le=MOST_CPUS), AfterValidator(_bookable)]
GpuShare = Annotated[float, Field(ge=0, le=MOST_GPUS), AfterValidator(_bookable)]


def _known_task(task: str) -> str:
    if task not in TASKS and not OWN_CLASS.fullmatch(task):
        raise ValueError(unknown_name(task, "task", [*TASKS, "MODULE:CLASS"]))
    return task


class Autoscaling(Strict):
    """How many replicas a model has, by the items that wait and run.

    With `min_replicas: 0` the model sleeps while nobody asks for it. The next request waits until it is loaded.
    """

    min_replicas: int = Field(1, ge=0, le=MOST_REPLICAS, description="Fewest replicas. 0: the model may sleep.")
    max_replicas: int = Field(1, ge=1, le=MOST_REPLICAS, description="Most replicas.")
    target_ongoing_requests: float = Field(
        16, ge=0.01, le=1e6, description="Items, waiting or running, that one replica should have."
    )
    look_back_period_s: float = Field(10, ge=1, le=3600, description="Seconds that the items are averaged over.")
    upscale_delay_s: float = Field(
        10, ge=0, le=DAY_S, description="Seconds that load must stay high before a replica is added."
    )
    downscale_delay_s: float = Field(
        300, ge=0, le=DAY_S, description="Seconds that load must stay low before a replica is removed."
    )
    downscale_to_zero_delay_s: float | None = Field(
        None, ge=0, le=DAY_S, description="The same for the last replica. Left out: `downscale_delay_s`."
    )
    policy: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="`MODULE:FUNCTION` of your own, which gets Serve's `AutoscalingContext` and returns the number of "
        "replicas. Left out: `deployments.scaling:by_items`.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Autoscaling":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


class UpstreamSettings(Strict):
    """A server that loads and runs a chat model."""

    kind: Literal["ollama", "openai"] = Field(
        description="API of the server: Ollama's, or OpenAI's as vLLM, llama-server, TGI and Dure have it."
    )
    url: str = Field(
        pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$", max_length=1000, description="Its address, without /v1 or /api."
    )
    model: str = Field(min_length=1, max_length=255, description="What the server calls the model.")
    key_env: str = Field(
        "",
        pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$",
        description="Environment variable with the key for the server. Left out: it needs none.",
    )
    timeout_s: float = Field(60, ge=1, le=DAY_S, description="Longest time in which the server may send nothing.")
    max_concurrent: int = Field(5, ge=1, le=10_000, description="Requests that run at once on each replica.")

    def known(self) -> Upstream:
        return Upstream(self.kind, self.url.rstrip("/"), self.model, self.key_env, self.timeout_s, self.max_concurrent)


class ModelSettings(Strict):
    """One model. Its name may have 64 letters, digits, dots, dashes and underscores."""

    task: Annotated[str, AfterValidator(_known_task)] = Field(
        description=f"{', '.join(f'`{task}`' for task in TASKS)}, or `MODULE:CLASS` of an engine of your own."
    )
    source: str = Field(
        "",
        min_length=1,
        max_length=1000,
        description="A folder, `package:IMPORT_NAME/FOLDER`, or a hub id; for chat also a `.gguf` file. Relative paths "
        "start at the project root.",
    )
    upstream: UpstreamSettings | None = Field(
        None, description="Chat: the server that loads and runs the model, in place of `source`."
    )
    revision: str | None = Field(
        None, min_length=1, max_length=255, description="Commit or tag on the hub. Required for a hub id."
    )
    precision: Precision = Field("auto", description="Number format of the weights. `auto` is measured.")
    runtime: Runtime = Field(
        "auto", description="`openvino` runs embedding and rerank models on a CPU. `auto` is measured."
    )
    num_gpus: GpuShare | None = Field(
        None, description="Share of a GPU per replica. 0: the CPU. Left out: worked out if `gpus` is set, else 0."
    )
    num_cpus: Cpus = Field(0.1, description="CPUs that Ray books per replica, for placement only.")
    threads: int | None = Field(
        None,
        ge=1,
        le=MOST_CPUS,
        description="Most CPU threads of a replica. Left out: all cores. Each batch takes the free ones "
        "that make it faster.",
    )
    autoscaling: Autoscaling = Field(Autoscaling(), description="How many replicas the model has.")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        None, description="Vision: how accelerate spreads the model over the GPUs that `num_gpus` books."
    )
    max_memory: dict[int | str, str] | None = Field(
        None, description="Vision: memory to use of each GPU by its number, and of `cpu`, such as `0: 10GiB`."
    )
    prefix_cache_mb: float = Field(
        256,
        ge=0,
        le=10**6,
        description="Next word, vision and chat: memory for prompts that were read before, so that a prompt which "
        "begins alike is read only from where it differs.",
    )
    token_ids: bool = Field(
        True,
        description="Embedding: whether `input` may be token ids. Set it to false if clients send ids of another "
        "tokenizer.",
    )
    kv_cache_mb: float = Field(
        2048,
        ge=1,
        le=10**7,
        description="Chat: memory for the keys and values of answers under way. Where it runs out, the youngest "
        "answers wait until others have ended.",
    )
    max_waiting: int = Field(
        25,
        ge=0,
        le=MOST_WAITING,
        description="Chat: requests that wait while `max_batch_items` run on each replica. Over it: 429.",
    )
    max_batch_items: int = Field(32, ge=1, le=10_000, description="Most items in one batch.")
    max_batch_tokens: int = Field(
        16384, ge=1, le=10**8, description="Most padded tokens in one batch: its items times the longest of them."
    )
    max_queue: int = Field(
        1024,
        ge=1,
        le=MOST_WAITING,
        description="Turns of all items that wait or run, per ingress replica. Over it: 429, except within a tenant's "
        "fair share. An item takes 1 turn, plus 1 for every 256 bytes (about 64 tokens) that the model reads of its "
        "text.",
    )

    @field_validator("source")
    @classmethod
    def _in_a_package(cls, source: str) -> str:
        if source.startswith("package:") and not re.match(r"package:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(/|$)", source):
            raise ValueError(
                "write the weights of a package as package:IMPORT_NAME/FOLDER or package:IMPORT_NAME/FILE.gguf"
            )
        return source

    @field_validator("max_memory", mode="before")
    @classmethod
    def _as_accelerate_reads_it(cls, limits: Any) -> Any:
        """Check the limits and restore GPU numbers, which are text after a config has been through JSON."""
        if not isinstance(limits, dict):
            return limits
        numbers = {key: int(key) if str(key).isdecimal() and len(str(key)) < 4 else key for key in limits}
        if len(set(numbers.values())) < len(limits):
            raise ValueError("names a GPU twice; write each number once")
        for key, limit in limits.items():
            if not (isinstance(numbers[key], int) or key == "cpu") or not MEMORY.fullmatch(str(limit)):
                raise ValueError("write the memory of each GPU, by its number, and of cpu, such as 0: 10GiB")
        return {numbers[key]: limit for key, limit in limits.items()}

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSettings":
        if self.upstream is None:
            if not self.source:
                raise ValueError("give a `source`" + (" or an `upstream`" if self.task == "chat" else ""))
            return self
        if self.task != "chat":
            raise ValueError(f"task {self.task} takes no `upstream`; only chat does")
        if self.source or self.revision or self.num_gpus:
            raise ValueError("`upstream` takes the place of `source`, `revision` and `num_gpus`; leave those out")
        return self

    @property
    def lane(self) -> tuple[int, int] | None:
        """How many requests of a chat model's run and how many wait, in the whole cluster. None for other tasks."""
        if self.task != "chat":
            return None
        at_once = self.upstream.max_concurrent if self.upstream else self.max_batch_items
        return at_once * self.autoscaling.max_replicas, self.max_waiting

    @property
    def gpu_share(self) -> float:
        """Share of a GPU per replica. If left out, `serve.planning.plan.with_shares` must have filled it in."""
        return self.num_gpus or 0

    def spec(self, name: str) -> ModelSpec:
        """The spec for a replica. USE_OPTIMIZED_MODELS=false forces torch in fp32."""
        return model_spec(
            name,
            self.task,
            self.source,
            revision=self.revision,
            precision=self.precision if optimised() else "fp32",
            runtime=self.runtime if optimised() else "torch",
            threads=self.threads,
            gpu_share=self.gpu_share,
            device_map=self.device_map,
            max_memory=self.max_memory,
            prefix_cache_mb=self.prefix_cache_mb,
            kv_cache_mb=self.kv_cache_mb,
            max_batch_items=self.max_batch_items,
            max_batch_tokens=self.max_batch_tokens,
            upstream=self.upstream.known() if self.upstream else None,
        )


def optimised() -> bool:
    """Value of USE_OPTIMIZED_MODELS. True if it is not set. Raises SettingsError for other values."""
    value = os.environ.get("USE_OPTIMIZED_MODELS", "true").strip().lower()
    if value not in ("true", "false", "1", "0"):
        raise SettingsError(f"USE_OPTIMIZED_MODELS={value!r} must be true or false")
    return value in ("true", "1")
