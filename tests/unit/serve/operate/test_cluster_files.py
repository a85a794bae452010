"""Dockerfile, cluster.yaml, configs/production.yaml and configs/rayservice.yaml, without Docker, AWS or Kubernetes."""

from __future__ import annotations

import copy
import fnmatch
import gzip
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from serve.config.file import read_config
from serve.operate import environment
from tests.dure import ROOT

PRODUCTION = ROOT / "configs/production.yaml"
PLACES = {"HOME", "HF_HOME", "DURE_CACHE"}


@pytest.fixture(autouse=True)
def haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image is for Linux, wherever the tests run."""
    monkeypatch.setattr(environment, "has_haproxy", lambda: True)


class Dockerfile:
    """Its instructions, continuation lines joined and comments left out."""

    def __init__(self, path: Path) -> None:
        text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
        pairs = [line.partition(" ") for line in text.splitlines() if line.strip()]
        self.instructions = [(word, rest.strip()) for word, _, rest in pairs]

    def all(self, word: str) -> list[str]:
        return [rest for name, rest in self.instructions if name == word]

    def at(self, word: str, part: str) -> int:
        """Where the only instruction of a kind with this part stands."""
        [place] = [
            place for place, (name, rest) in enumerate(self.instructions) if name == word and part in shlex.split(rest)
        ]
        return place

    @property
    def env(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for line in self.all("ENV") for pair in shlex.split(line))  # type: ignore[misc]

    @property
    def copied(self) -> list[str]:
        return [source for line in self.all("COPY") for source in shlex.split(line)[:-1]]

    @property
    def packages(self) -> set[str]:
        """What apt-get installs."""
        found = re.search(r"apt-get install ([^&]*)", " ".join(self.all("RUN")))
        assert found
        return {word for word in found[1].split() if not word.startswith("-")}


DOCKERFILE = Dockerfile(ROOT / "Dockerfile")


def test_the_image_has_the_environment_that_ray_needs_and_weights_under_models() -> None:
    env = DOCKERFILE.env
    assert {name: value for name, value in env.items() if name not in PLACES} == environment.cluster_environment()
    assert env["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert env["HF_HOME"].startswith("/models/")
    assert env["DURE_CACHE"].startswith("/models/")
    assert DOCKERFILE.all("VOLUME") == [], "what `RUN dure fetch` leaves in a volume is lost"


def test_the_image_is_made_in_the_order_that_keeps_layers() -> None:
    assert DOCKERFILE.instructions[0] == ("FROM", "python:3.11-slim")
    steps = [
        DOCKERFILE.at("COPY", "constraints.txt"),
        DOCKERFILE.at("RUN", "torch"),
        DOCKERFILE.at("RUN", "$PACKAGES"),
        DOCKERFILE.at("COPY", "serve"),
        DOCKERFILE.at("RUN", "--editable"),
        DOCKERFILE.at("USER", "1000:1000"),
    ]
    assert steps == sorted(steps)
    assert not any(place > steps[-1] for place, (name, _) in enumerate(DOCKERFILE.instructions) if name == "RUN")
    assert DOCKERFILE.instructions[-1] == ("CMD", '["dure", "serve"]')


def test_the_image_installs_pinned_versions_and_nothing_for_development() -> None:
    installs = [part for line in DOCKERFILE.all("RUN") for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 4
    for install in installs:
        assert "--constraint constraints.txt" in install or "--no-deps" in install
        assert "dev]" not in install
    assert "--extra-index-url $TORCH_INDEX torch" in " ".join(shlex.split(installs[0]))
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cpu" in DOCKERFILE.all("ARG")


def test_all_that_the_image_needs_is_copied_and_there() -> None:
    copied = set(DOCKERFILE.copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["packages"]
    assert {package.partition(".")[0] for package in packages} <= copied
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= copied
    sources = [model.source for model in read_config(ROOT / "configs/local.yaml").settings.models.values()]
    assert {source.partition("/")[0] for source in sources if not source.startswith("package:")} <= copied
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for source in copied:
        assert (ROOT / source).exists()
        assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored), source


def test_the_image_runs_as_a_person_and_says_how_it_is() -> None:
    made = " ".join(DOCKERFILE.all("RUN"))
    assert "groupadd --gid 1000 dure" in made
    assert "useradd --uid 1000 --gid 1000 --create-home" in made
    assert re.search(r"install --directory --owner=dure --group=dure /models /dure/\.dure /home/dure/\.ray", made)
    assert DOCKERFILE.env["HOME"] == "/home/dure"
    [check] = DOCKERFILE.all("HEALTHCHECK")
    assert f"http://127.0.0.1:{read_config(ROOT / 'configs/local.yaml').port}/health/live" in check
    assert {"bash", "wget", "rsync", "openssh-client"} <= DOCKERFILE.packages


CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
STARTS = [
    command
    for kind in ("head", "worker")
    for command in CLUSTER[f"{kind}_start_ray_commands"]
    if "ray start" in command
]


def test_ray_up_takes_the_cluster_file() -> None:
    jsonschema.validate(CLUSTER, SCHEMA)
    prepared = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(prepared)
    assert prepared["setup_commands"] == prepared["head_setup_commands"] == []
    assert prepared["worker_setup_commands"] == CLUSTER["worker_setup_commands"]


@pytest.mark.parametrize("name", ["idle_timeout", "worker_start_commands"])
def test_ray_up_would_refuse_a_misspelt_key(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=name):
        jsonschema.validate({**CLUSTER, name: 1}, SCHEMA)


def test_the_cluster_has_a_head_without_a_gpu_and_workers_that_come_and_go() -> None:
    types = CLUSTER["available_node_types"]
    worker = types["gpu_worker"]
    assert "GPU" not in types[CLUSTER["head_node_type"]]["resources"]
    assert worker["resources"]["GPU"] == 1
    assert worker["min_workers"] <= 1 < worker["max_workers"] <= CLUSTER["max_workers"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert CLUSTER["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("command", STARTS)
def test_each_ray_start_has_the_environment_and_asks_for_tokens(command: str) -> None:
    words = shlex.split(command.rpartition(";")[2])
    settings = words[: words.index("ray")]
    assert dict(word.split("=", 1) for word in settings) == {  # type: ignore[misc]
        **environment.cluster_environment(),
        "RAY_AUTH_MODE": "token",
    }
    assert len(STARTS) == 2


def test_the_token_and_the_configs_get_to_where_they_are_looked_for() -> None:
    home = DOCKERFILE.env["HOME"]
    assert CLUSTER["file_mounts"][f"{home}/.ray/auth_token"] == "~/.ray/auth_token"
    configs = ROOT / CLUSTER["file_mounts"][f"{home}/configs"]
    [fetch] = CLUSTER["worker_setup_commands"]
    assert fetch == "dure fetch --config ~/configs/production.yaml"
    assert (configs / "production.yaml").is_file()
    assert "--volume /models:/models" in CLUSTER["docker"]["run_options"]


def test_production_is_for_several_machines() -> None:
    config = read_config(PRODUCTION)
    settings = config.settings
    assert (config.host, config.document["proxy_location"]) == ("0.0.0.0", "EveryNode")
    assert (settings.ingress.replicas, settings.search.replicas, settings.adverts.replicas) == (2, 2, 2)
    assert {
        each["name"]: each["max_replicas_per_node"] for each in config.document["applications"][0]["deployments"]
    } == {
        "ingress": 1,
        "search": 1,
        "adverts": 1,
    }
    assert settings.drain_s > settings.request_timeout_s
    assert settings.cache.url.startswith("redis://")
    assert (settings.store.url or "").startswith("postgresql://")
    for model in settings.models.values():
        assert model.autoscaling.max_replicas > model.autoscaling.min_replicas
        assert re.fullmatch(r"[0-9a-f]{40}", model.revision or ""), "a branch moves"


SERVICE, BUDGET = yaml.safe_load_all((ROOT / "configs/rayservice.yaml").read_text(encoding="utf-8"))
CLUSTER_SPEC = SERVICE["spec"]["rayClusterConfig"]
GROUPS = {group["groupName"]: group for group in CLUSTER_SPEC["workerGroupSpecs"]}
PODS = [CLUSTER_SPEC["headGroupSpec"]["template"], *(group["template"] for group in GROUPS.values())]


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused: Kubernetes drops them without a word."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        name: {key: strict(each) for key, each in value.items()} if name == "properties" else strict(value)
        for name, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def rayservice() -> jsonschema.Draft202012Validator:
    document = gzip.decompress((ROOT / "tests/schemas/rayservice.json.gz").read_bytes())
    return jsonschema.Draft202012Validator(strict(json.loads(document)))


def test_kubernetes_takes_the_rayservice(rayservice: jsonschema.Draft202012Validator) -> None:
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("ray.io/v1", "RayService")
    assert [error.message for error in rayservice.iter_errors(SERVICE)] == []


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("spec", "serveConfigV3", ""),
        ("spec.rayClusterConfig", "enableInTreeAutoscalling", True),
        ("spec.rayClusterConfig.autoscalerOptions", "idleTimeoutMinutes", 1),
        ("spec.rayClusterConfig.autoscalerOptions", "version", "v3"),
        ("spec.rayClusterConfig.workerGroupSpecs.0", "minReplica", 1),
        ("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.readinessProbe", "periodSecond", 1),
        ("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.resources.limits", "cpu", "four"),
    ],
)
def test_a_field_that_is_wrong_would_be_found(
    rayservice: jsonschema.Draft202012Validator, path: str, name: str, value: Any
) -> None:
    wrong = copy.deepcopy(SERVICE)
    place = wrong
    for part in path.split("."):
        place = place[int(part) if part.isdigit() else part]
    place[name] = value
    assert list(rayservice.iter_errors(wrong))


def test_kubernetes_serves_what_production_is() -> None:
    document = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
    assert document["applications"] == yaml.safe_load(PRODUCTION.read_text(encoding="utf-8"))["applications"]
    assert document == yaml.safe_load(PRODUCTION.read_text(encoding="utf-8"))


def test_the_cluster_on_kubernetes_scales_and_outlives_its_head() -> None:
    assert CLUSTER_SPEC["enableInTreeAutoscaling"] is True
    assert CLUSTER_SPEC["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"]
    assert CLUSTER_SPEC["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert CLUSTER_SPEC["authOptions"] == {"mode": "token"}
    versions = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert CLUSTER_SPEC["rayVersion"] == versions["ray"]
    gpu = GROUPS["gpu"]
    assert gpu["minReplicas"] <= gpu["replicas"] < gpu["maxReplicas"]
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for pod in PODS:
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000


def test_pods_are_ready_when_dure_answers_through_them() -> None:
    config = read_config(PRODUCTION)
    for group in GROUPS.values():
        [container] = group["template"]["spec"]["containers"]
        assert "livenessProbe" not in container, "KubeRay's own asks the raylet"
        assert {"name": "serve", "containerPort": config.port} in container["ports"]
        probe = container["readinessProbe"]
        shell, flag, script = probe["exec"]["command"]
        assert (shell, flag) == ("bash", "-c")
        asked = re.findall(r"wget [^|]*http://127\.0\.0\.1:(\d+)(/\S*)", script)
        assert asked == [
            ("52365", "/api/local_raylet_healthz"),
            (str(config.port), "/-/healthz"),
            (str(config.port), "/health/live"),
        ]
        assert probe["timeoutSeconds"] > 2 * len(asked)
        rest = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert int(container["lifecycle"]["preStop"]["exec"]["command"][1]) + config.settings.drain_s < rest
    assert {"bash", "wget"} <= DOCKERFILE.packages


def test_secrets_come_from_secrets_and_weights_from_dure_fetch() -> None:
    for pod in PODS:
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            names = {each["name"]: each for each in container.get("env", [])}
            assert set(names) == {"PGPASSWORD", "HF_TOKEN"}
            assert all("secretKeyRef" in each["valueFrom"] for each in names.values())
    [fetch] = GROUPS["gpu"]["template"]["spec"]["initContainers"]
    [migrate] = CLUSTER_SPEC["headGroupSpec"]["template"]["spec"]["initContainers"]
    for name, container in (("fetch", fetch), ("migrate", migrate)):
        assert container["command"] == ["dure", name, "--config", "configs/production.yaml"]
    [worker] = GROUPS["gpu"]["template"]["spec"]["containers"]
    assert fetch["volumeMounts"] == worker["volumeMounts"] == [{"name": "models", "mountPath": "/models"}]


def test_a_drain_leaves_workers_that_serve() -> None:
    """Of its fields by hand: for pods of a kind that Kubernetes does not know only a whole `minAvailable` counts."""
    assert (BUDGET["apiVersion"], BUDGET["kind"]) == ("policy/v1", "PodDisruptionBudget")
    assert set(BUDGET) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(BUDGET["spec"]) == {"minAvailable", "selector"}
    assert set(BUDGET["spec"]["selector"]) == {"matchLabels"}
    least = sum(group["minReplicas"] for group in GROUPS.values())
    assert 1 <= BUDGET["spec"]["minAvailable"] < least
    for group in GROUPS.values():
        assert BUDGET["spec"]["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
