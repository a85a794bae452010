from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.config.base import SettingsError
from serve.config.file import checked, read_config
from serve.config.settings import Settings
from tests.dure import ROOT

CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - {ROOT / "configs/rayservice.yaml"})


def written(tmp_path: Path, **changes: Any) -> Path:
    """configs/local.yaml with `a.b.c=value` changes below the predictor's settings or, with `args__`, below args."""
    document = yaml.safe_load((ROOT / "configs/local.yaml").read_text(encoding="utf-8"))
    args = document["applications"][0]["args"]
    for name, value in changes.items():
        place = args if name.startswith("args__") else args["models"]["predictor"]
        place[name.removeprefix("args__")] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    assert read_config(path).settings.models


@pytest.mark.parametrize(
    ("changes", "place", "said"),
    [
        ({"precison": "fp32"}, "models.predictor", "did you mean 'precision'?"),
        ({"precision": "fp31"}, "models.predictor.precision", "did you mean 'fp32'?"),
        ({"runtime": "openvin"}, "models.predictor.runtime", "did you mean 'openvino'?"),
        ({"task": "next_wrd"}, "models.predictor.task", "did you mean 'next_word'?"),
        ({"max_queue": 0}, "models.predictor.max_queue", "(it is 0)"),
        ({"num_gpus": -1}, "models.predictor.num_gpus", "(it is -1)"),
        ({"source": ""}, "models.predictor.source", "at least 1 character"),
        ({"num_gpus": 0.00001}, "models.predictor.num_gpus", "at least 0.0001"),
        ({"num_cpus": 1e-9}, "models.predictor.num_cpus", "at least 0.0001"),
        ({"threads": True}, "models.predictor.threads", "has to be a whole number (it is true)"),
        ({"threads": "2"}, "models.predictor.threads", "has to be a whole number (it is '2')"),
        ({"threads": 2.0}, "models.predictor.threads", "has to be a whole number (it is 2.0)"),
        ({"threads": 10**30}, "models.predictor.threads", "less than or equal"),
        ({"num_cpus": False}, "models.predictor.num_cpus", "has to be a number (it is false)"),
        ({"num_cpus": float("nan")}, "models.predictor.num_cpus", "has to be a finite number (it is nan)"),
        ({"num_cpus": float("inf")}, "models.predictor.num_cpus", "has to be a finite number (it is inf)"),
        ({"prefix_cache_mb": 1e308}, "models.predictor.prefix_cache_mb", "less than or equal"),
        ({"source": ["a"]}, "models.predictor.source", "has to be text"),
        ({"revision": 1234567}, "models.predictor.revision", "has to be text; put it in quotes (it is 1234567)"),
        ({"source": "package:/model"}, "models.predictor.source", "package:IMPORT_NAME/FOLDER"),
        ({"source": "package:a-b"}, "models.predictor.source", "package:IMPORT_NAME/FOLDER"),
        ({"max_memory": {"0": "ten GiB"}}, "models.predictor.max_memory", "as 0: 10GiB"),
        ({"max_memory": {"disk": "10GiB"}}, "models.predictor.max_memory", "as 0: 10GiB"),
        ({"max_memory": {0: 10}}, "models.predictor.max_memory", "as 0: 10GiB"),
        ({"autoscaling": {"max_replicas": 10**9}}, "models.predictor.autoscaling.max_replicas", "less than or equal"),
        ({"autoscaling": []}, "models.predictor.autoscaling", "has to be a mapping"),
        ({"args__gpus": "99999x24GiB"}, "args.gpus", "COUNTxSIZE"),
        ({"args__gpus": "1x" + "9" * 400 + "GiB"}, "args.gpus", "COUNTxSIZE"),
        ({"args__request_timeout_s": float("inf")}, "args.request_timeout_s", "finite"),
        ({"args__drain_s": -1}, "args.drain_s", "greater than or equal to 0 (it is -1)"),
        ({"args__tenants": {"a": {"weight": 1e-300}}}, "args.tenants.a.weight", "greater than or equal"),
        ({"args__cache": {"url": "redis://host:99999/0"}}, "args.cache.url", "redis://"),
        ({"args__cache": {"url": "redis://host:1/0?socket_timeout=soon"}}, "args.cache.url", "redis://"),
        ({"args__store": {"url": "postgresql://host:99999/dure"}}, "args.store.url", "postgresql://"),
        ({"args__store": {"url": "postgresql://host:port/dure"}}, "args.store.url", "postgresql://"),
        ({"args__webhook": {"url": "https://host:99999/", "secret": "s" * 16}}, "args.webhook.url", "https://HOST"),
        ({"args__webhook": {"url": "https:///path", "secret": "s" * 16}}, "args.webhook.url", "https://HOST"),
        ({"args__fetch": {"hosts": ["http://a"]}}, "args.fetch.hosts.0", "HOST:PORT"),
        ({"args__fetch": {"hosts": ["a:99999"]}}, "args.fetch.hosts.0", "HOST:PORT"),
        ({"args__fetch": {"hosts": "a"}}, "args.fetch.hosts", "has to be a list"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "models.predictor.autoscaling", "more than max"),
        ({"args__modles": {}}, "applications.0.args", "did you mean 'models'?"),
        ({"args__request_timeout_s": "soon"}, "request_timeout_s", "(it is 'soon')"),
        ({"args__limits": {"max_image_megapixels": 51}}, "limits.max_image_megapixels", "at most 50 (it is 51)"),
    ],
)
def test_wrong_settings_name_the_path_and_what_was_meant(
    tmp_path: Path, changes: dict[str, Any], place: str, said: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        read_config(written(tmp_path, **changes))
    assert place in str(caught.value)
    assert said in str(caught.value)


def numbers(schema: dict[str, Any], definitions: dict[str, Any], place: str = "args") -> Iterator[tuple[str, Any]]:
    """All numbers that a JSON schema asks for, with their places."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if schema.get("type") in ("integer", "number"):
        yield place, schema
    for name, each in schema.get("properties", {}).items():
        yield from numbers(each, definitions, f"{place}.{name}")
    named = (schema.get("additionalProperties"), *schema.get("patternProperties", {}).values())
    for each in (*named, schema.get("items"), *schema.get("anyOf", ())):
        if isinstance(each, dict):
            yield from numbers(each, definitions, place)


def test_every_number_has_bounds_in_which_nothing_overflows_or_hangs() -> None:
    schema = Settings.model_json_schema()
    found = dict(numbers(schema, schema["$defs"]))
    assert len(found) > 40
    for place, number in found.items():
        assert {"minimum", "exclusiveMinimum"} & number.keys(), place
        assert number.get("maximum", float("inf")) <= 1e9, place


@pytest.mark.parametrize(
    "more",
    [
        {"args__store": {"url": "postgresql://me:p%40ss@host:5432/dure"}},
        {"args__store": {"url": "sqlite:///dure.sqlite3"}},
        {"args__cache": {"url": "redis://:pass@host:6379/0"}},
        {"args__cache": {"url": "unix:///run/redis.sock?db=1"}},
        {"args__webhook": {"url": "http://127.0.0.1:9000/hook", "secret": "s" * 16}},
        {"args__fetch": {"hosts": ["Images.Example.org", "127.0.0.1:8080", "::1", "2130706433"]}},
        {"args__request_timeout_s": 5},
        {"num_cpus": 0, "num_gpus": 2, "threads": 1},
        {"max_memory": {0: "10GiB", "cpu": "64.5GB"}},
    ],
)
def test_what_is_right_is_taken(tmp_path: Path, more: dict[str, Any]) -> None:
    assert read_config(written(tmp_path, **more)).settings.models


def test_limits_of_gpus_are_the_same_once_they_have_been_json(tmp_path: Path) -> None:
    """As what a cluster keeps of a deploy has been."""
    limits = {0: "10GiB", 1: "12.5GiB", "cpu": "64GB"}
    file = read_config(written(tmp_path, max_memory=limits))
    again = checked(file.path, json.loads(json.dumps(file.document)))
    assert again.settings.models["predictor"].max_memory == file.settings.models["predictor"].max_memory == limits


def test_every_wrong_setting_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read_config(written(tmp_path, max_queue=0, precision="no", num_cpus=-1))
    assert len(str(caught.value).splitlines()) == 3


def test_use_optimized_models_forces_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_config(written(tmp_path, precision="bf16")).settings.models["predictor"]
    assert model.spec("predictor").precision == "bf16"
    monkeypatch.setenv("USE_OPTIMIZED_MODELS", "false")
    assert model.spec("predictor").precision == "fp32"
    monkeypatch.setenv("USE_OPTIMIZED_MODELS", "perhaps")
    with pytest.raises(SettingsError, match="perhaps"):
        model.spec("predictor")


def test_models_have_cores_of_their_own_where_threads_are_no_more_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    def own(*models: dict[str, Any]) -> bool:
        named = {f"m{number}": {"task": "embedding", "source": "x", **model} for number, model in enumerate(models)}
        return Settings.model_validate({"models": named}).own_cores

    assert own({})
    assert not own({}, {})
    assert own({"threads": 2}, {"threads": 2})
    assert not own({"threads": 2}, {"threads": 2, "autoscaling": {"max_replicas": 2}})
    assert own({"threads": 4}, {"num_gpus": 0.5})
