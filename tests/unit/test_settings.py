from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.config_file import read_config
from serve.settings import Settings
from serve.strict import SettingsError
from tests.dure import ROOT

CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - {ROOT / "configs/rayservice.yaml"})


def written(tmp_path: Path, **changes: Any) -> Path:
    """configs/local.yaml with `a.b.c=value` changes below the predictor's settings or, with `args__`, below args."""
    document = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    args = document["applications"][0]["args"]
    for name, value in changes.items():
        place = args if name.startswith("args__") else args["models"]["predictor"]
        place[name.removeprefix("args__")] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
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


def test_every_wrong_setting_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read_config(written(tmp_path, max_queue=0, precision="no", num_cpus=-1))
    assert len(str(caught.value).splitlines()) == 3


def test_a_file_that_is_no_config_says_so(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text, said in (("a: [", "not YAML"), ("just text", "applications"), ("applications: []", "applications")):
        path.write_text(text)
        with pytest.raises(SettingsError, match=said):
            read_config(path)
    with pytest.raises(SettingsError, match="No such file"):
        read_config(tmp_path / "nowhere.yaml")


def test_ray_serves_own_settings_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    document = yaml.safe_load((ROOT / "configs/local.yaml").read_text()) | {"proxy_location": "Everywhere"}
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(SettingsError, match="proxy_location"):
        read_config(path)


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
