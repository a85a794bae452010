"""Starting and stopping `dure serve`: nothing is left, nothing of others is touched, every failure is clear."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.dure import Dure, config_file, free_port, wait_until

Start = Callable[..., Dure]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a `dure serve` with one light model of a user's own engine."""
    started: list[Dure] = []
    (tmp_path / "seconds_per_shard").write_text("0.01", encoding="utf-8")

    def launch(models: dict[str, Any] | None = None, port: int | None = None, **args: Any) -> Dure:
        port = port or free_port()
        models = models or {"shout": {"task": "tests.engines:Shout", "source": str(tmp_path)}}
        started.append(Dure(config_file(tmp_path, models, port, **args), tmp_path / "state", port))
        return started[-1]

    yield launch
    for each in started:
        each.kill()


def answers(dure: Dure, path: str) -> bool:
    try:
        with httpx.stream("GET", f"{dure.url}{path}", timeout=30) as response:
            return response.status_code == 200
    except httpx.HTTPError:
        return False


def is_over(dure: Dure, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while dure.process.poll() is None or dure.processes():
        assert time.monotonic() < deadline, (dure.process.poll(), [p.cmdline() for p in dure.processes()])
        time.sleep(0.1)


def signal_to_the_whole_group_leaves_nothing_and_tells_those_connected_to_come_back(dure: Dure) -> None:
    names = {process.name() for process in dure.processes()}
    assert "haproxy" in names
    url, body = f"{dure.url}/v1/models/shout/run", {"items": [{"say": "last", "wait": 1}]}
    with ThreadPoolExecutor() as pool, connect(f"{dure.url.replace('http', 'ws')}/ws/somebody") as connected:
        plain = pool.submit(httpx.post, url, json=body, timeout=30)
        followed = pool.submit(httpx.post, url, json=body, headers={"Accept": "text/event-stream"}, timeout=30)
        time.sleep(0.5)
        os.killpg(dure.process.pid, signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            connected.recv(timeout=30)
        assert plain.result().json()["results"][0]["said"] == "LAST"
        assert "event: result" in followed.result().text
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 1012, "service restart"
    is_over(dure, 30)
    assert dure.ended(1) == 0


def a_machine_that_is_full_takes_no_new_work(dure: Dure) -> None:
    url, body = f"{dure.url}/v1/models/shout/run", {"items": [{"say": "a"}]}
    wait_until(lambda: httpx.post(url, json=body).is_error)  # it is looked at every few seconds
    refused = httpx.post(url, json=body)
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded")
    assert "memory is at" in refused.json()["error"]["message"]
    assert int(refused.headers["Retry-After"]) >= 1
    assert httpx.get(f"{dure.url}/health").status_code == 200


def test_interrupting_while_models_load_leaves_nothing(start: Start, tmp_path: Path) -> None:
    (tmp_path / "seconds_per_shard").write_text("30", encoding="utf-8")
    dure = start()
    dure.wait_for("Building the graph")
    time.sleep(2)
    dure.process.send_signal(signal.SIGINT)
    is_over(dure, 15)


def test_what_a_kill_9_left_is_cleared_and_nothing_else(start: Start) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], env={**os.environ})
    dure = start()
    dure.wait_for("Building the graph")
    port = int(dure.url.rpartition(":")[2])
    dure.process.kill()
    again = start(port=port, guard={"memory": 0.001}).wait_ready()  # the start itself clears what is left
    assert httpx.get(f"{again.url}/health").status_code == 200
    a_machine_that_is_full_takes_no_new_work(again)
    again.process.kill()
    for process in again.processes():
        process.kill() if process.name() != "haproxy" else None
    stopped = again.command("stop")
    assert stopped.stdout.strip() == "Stopped 1", stopped.stderr
    is_over(again, 5)
    assert bystander.poll() is None
    bystander.kill()


def test_a_port_that_is_taken_is_one_clear_line(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        dure = start(port=port)
        assert dure.ended(30) == 2
    assert len(dure.output) == 1
    assert str(port) in dure.said
    assert str(os.getpid()) in dure.said


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        ("cold", 2, "model shout: RuntimeError: it is too cold [/here]"),
        ("deadly", 1, "model shout: its process died while it started"),
    ],
)
def test_a_model_that_fails_for_good_ends_it_with_one_line(
    start: Start, tmp_path: Path, trouble: str, code: int, said: str
) -> None:
    (tmp_path / trouble).touch()
    dure = start()
    assert dure.ended(120) == code, dure.said
    assert said in dure.output[-1]
    assert dure.said.count(said) == 1
    assert "Traceback" not in dure.said
    is_over(dure, 5)


def test_wrong_settings_are_refused_before_anything_starts(start: Start, tmp_path: Path) -> None:
    dure = start(models={"a": {"task": "embeding", "source": "x", "precison": "fp32"}})
    assert dure.ended(30) == 2
    assert "applications.0.args.models.a" in dure.said
    assert "'precision'" in dure.said


def test_a_load_is_seen_live_a_request_waits_for_it_and_a_signal_ends_all_in_good_order(
    start: Start, tmp_path: Path
) -> None:
    held = [tmp_path / f"hold_{shard}" for shard in range(1, 5)]
    for hold in held:
        hold.touch()
    dure = start(load_wait_s=200)
    url = f"{dure.url}/v1/models/shout/run"
    patience = {"items": [{"say": "patience"}]}
    waiting: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: waiting.append(httpx.post(url, json=patience, timeout=210)))
    seen: list[str] = []
    wait_until(lambda: answers(dure, "/model/upload-stream"))
    with httpx.stream("GET", f"{dure.url}/model/upload-stream", timeout=60) as stream:
        assert httpx.get(f"{dure.url}/health/live").status_code == 200
        loading = httpx.get(f"{dure.url}/health")
        asking.start()
        for line in stream.iter_lines():
            if line.startswith("data: "):
                seen.append(line)
                for hold in held[: len(seen)]:  # each shard waits until the one before was seen
                    hold.unlink(missing_ok=True)
    assert loading.status_code == 503
    assert loading.json()["status"] == "loading"
    assert loading.json()["missing"] == ["shout"]
    percents = [float(line.partition('"progress":')[2].partition(",")[0]) for line in seen]
    assert percents == sorted(percents)
    assert len(percents) >= 4
    assert {55.0, 70.0, 85.0, 100.0} <= set(percents)
    assert any("체크포인트 로드 중 3/4... 75%" in line for line in seen)
    assert '"status":"ready"' in seen[-1]
    asking.join(60)
    assert [answer.status_code for answer in waiting] == [200]
    signal_to_the_whole_group_leaves_nothing_and_tells_those_connected_to_come_back(dure.wait_ready())
