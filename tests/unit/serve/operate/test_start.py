"""What is wrong with a start is seen before it, or told in one line with the right exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.serve.schema import ApplicationStatusOverview
from rich.console import Console

from serve import paths as places
from serve.cli.terminal import Loading
from serve.config.base import SettingsError
from serve.config.settings import Settings
from serve.failures import CONFIG, LONGEST, MACHINE, MachineError, one_line
from serve.operate import cluster, cluster_process, environment, preflight, processes
from tests.dure import ROOT, free_port

RAISED = """\x1b[36mray::ServeReplica:dure:m.initialize()\x1b[39m (pid=1, ip=127.0.0.1)
  File "/a/replica.py", line 1, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "/a/live.py", line 2, in load
    engine.warm_up()
    ^^^^^^^^^^^^^^^^
ValueError: 한글 [/x]
둘째 줄
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("\n \n", ""),
        ("plain", "plain"),
        (
            "RuntimeError: CUDA error: no kernel\nCompile with `TORCH_USE_CUDA_DSA`",
            "RuntimeError: CUDA error: no kernel",
        ),
        (
            "Error(s) in loading state_dict for A:\n\tsize mismatch for b",
            "Error(s) in loading state_dict for A: size mismatch for b",
        ),
        (RAISED, "ValueError: 한글 [/x]"),
        (
            'Traceback (most recent call last):\n  File "a", line 1\n    a b\n      ^\nSyntaxError: invalid syntax\n',
            "SyntaxError: invalid syntax",
        ),
        ("a\x00b\x07\x1b[31mc", "a b c"),
        ("x" * 5000, "x" * (LONGEST - 3) + "..."),
    ],
)
def test_an_error_is_cut_to_the_line_that_says_what_is_wrong(text: str, line: str) -> None:
    assert one_line(text) == line


def settings(**models: dict[str, Any]) -> Settings:
    model = {"task": "tests.engines:Shout", "source": "demo"}
    return Settings.model_validate({"models": {name: model | more for name, more in models.items()}})


def test_a_port_that_is_taken_names_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"port {port} on 127.0.0.1 is taken by pid {os.getpid()} "):
            preflight.check_address("127.0.0.1", port)
    preflight.check_address("127.0.0.1", free_port())
    preflight.check_address("localhost", free_port())


@pytest.mark.parametrize("host", ["203.0.113.7", "nowhere.invalid"])
def test_a_host_that_is_not_this_machine_is_refused(host: str) -> None:
    with pytest.raises(SettingsError, match=f"this machine can't listen on {host}:"):
        preflight.check_address(host, free_port())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"source": "demo/nowhere"}, "model a: source 'demo/nowhere': there is no folder"),
        ({"source": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
        ({"source": "nobody/nothing"}, "if it is a hub id, add `revision`"),
        ({"source": "package:nowhere/model"}, "the package 'nowhere' is not installed"),
        ({"source": "package:nowhere.at.all"}, "No module named 'nowhere'"),
        ({"source": "a" * 500}, "File name too long"),
        ({"source": "/nowhere", "revision": "main"}, "there is no folder /nowhere"),
    ],
)
def test_a_source_that_is_missing_is_seen_before_the_start(model: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        preflight.check_sources(settings(fine={}, a=model))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_sources_that_are_here_or_on_a_hub_are_taken() -> None:
    preflight.check_sources(settings(a={}, b={"source": "nobody/nothing", "revision": "main"}))


def test_a_switch_that_is_neither_is_seen_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_OPTIMIZED_MODELS", "perhaps")
    with pytest.raises(SettingsError, match="USE_OPTIMIZED_MODELS='perhaps'"):
        preflight.check_sources(settings(a={}))


@pytest.mark.parametrize(
    ("assets", "said"),
    [
        ("nosuch://bucket/dure", "store.assets: nosuch://bucket/dure: Protocol not known: nosuch"),
        ("/proc/nowhere", "store.assets: /proc/nowhere: No such file or directory"),
        (str(ROOT / "README.md" / "x"), "Not a directory"),
    ],
)
def test_pictures_that_could_not_be_kept_are_seen_before_the_start(assets: str, said: str) -> None:
    models = {"v": {"task": "vision", "source": "demo"}}
    with pytest.raises(SettingsError) as caught:
        preflight.check_assets(Settings.model_validate({"models": models, "store": {"assets": assets}}))
    assert said in str(caught.value)


def test_a_folder_for_pictures_is_made_where_there_is_none(tmp_path: Path) -> None:
    models = {"v": {"task": "vision", "source": "demo"}}
    store = {"assets": str(tmp_path / "a/b")}
    preflight.check_assets(Settings.model_validate({"models": models, "store": store}))
    assert (tmp_path / "a/b").is_dir()
    preflight.check_assets(settings(a={}))
    preflight.check_assets(Settings.model_validate({"models": models, "store": {"assets": "memory://dure"}}))


@pytest.mark.parametrize(
    ("models", "fits"),
    [
        ({"a": {"num_cpus": 1.9}}, True),
        ({"a": {"num_cpus": 1}, "b": {"num_cpus": 1}}, False),
        ({"a": {"num_cpus": 1000}}, False),
        ({"a": {"num_cpus": 1, "autoscaling": {"min_replicas": 2, "max_replicas": 2}}}, False),
        ({"a": {"num_cpus": 1, "autoscaling": {"max_replicas": 9}}}, True),
        ({"a": {"num_cpus": 2, "autoscaling": {"min_replicas": 0}}}, True),
        ({"a": {"num_cpus": 3, "autoscaling": {"min_replicas": 0}}}, False),
    ],
)
def test_replicas_that_could_never_start_are_seen_before(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Any], fits: bool
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with contextlib.nullcontext() if fits else pytest.raises(SettingsError, match="this machine has 2"):
        preflight.check_cpus(settings(**models))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"task": "nosuch.module:Engine"}, "model a: task 'nosuch.module:Engine': there is no module 'nosuch'"),
        ({"task": "__main__x:A"}, "there is no module '__main__x'"),
        (
            {"autoscaling": {"policy": "nosuch:policy"}},
            "model a: autoscaling.policy 'nosuch:policy': there is no module",
        ),
        ({"autoscaling": {"policy": "tests.engines:nosuch"}}, "has no attribute 'nosuch'"),
        ({"autoscaling": {"policy": "tests.nosuch:pairs"}}, "No module named 'tests.nosuch'"),
    ],
)
def test_code_that_is_missing_is_seen_before_the_cluster_starts(model: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        cluster_process.check_code(settings(a=model))
    assert said in str(caught.value)


def test_code_that_is_there_is_taken() -> None:
    cluster_process.check_code(settings(a={"autoscaling": {"policy": "tests.engines:pairs"}}, b={"task": "rerank"}))


def test_the_runner_says_what_is_wrong_with_a_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("applications: 1", encoding="utf-8")
    command = [sys.executable, "-m", "serve.operate.cluster_process"]
    run = subprocess.run(
        [*command, str(path)], cwd=ROOT, capture_output=True, timeout=60, encoding="utf-8", check=False
    )
    assert run.returncode == CONFIG
    assert run.stderr == f"{path}: applications: has to be a list (it is 1)\n"
    assert json.loads(run.stdout) | {"kind": "failed", "code": CONFIG} == json.loads(run.stdout)
    run = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, encoding="utf-8", check=False)
    assert run.returncode == CONFIG
    assert run.stderr.startswith("usage: ")


def application(message: str = "", status: str = "DEPLOY_FAILED", **deployments: str) -> ApplicationStatusOverview:
    """One of these deployments has failed where it says anything."""
    each = {
        name: SimpleNamespace(status=status if told else "HEALTHY", message=told) for name, told in deployments.items()
    }
    return ApplicationStatusOverview(status, message, 0.0, each)


DIED = "The deployment failed to start 2 times in a row. See controller logs for details. Error:\nActorDiedError()"


@pytest.mark.parametrize(
    ("failed", "said", "code"),
    [
        (application("Failed to update", ingress="", m=f"Error:\n{RAISED}"), "model m: ValueError: 한글 [/x]", CONFIG),
        (
            application("Failed to update", ingress="", m=DIED),
            "model m: its process died while it started, 2 times;",
            MACHINE,
        ),
        (
            application("Failed to update", adverts=f"Error:\n{RAISED}"),
            "deployment adverts: ValueError: 한글 [/x]",
            CONFIG,
        ),
        (
            application(
                'Deploying failed:\nTraceback:\n  File "a", line 1\n    b\nserve.strict.SettingsError: no GPUs'
            ),
            "no GPUs",
            CONFIG,
        ),
        (
            application("Unexpected error occurred while deploying"),
            "Unexpected error occurred while deploying",
            MACHINE,
        ),
    ],
)
def test_a_deploy_that_failed_names_who_and_why(failed: ApplicationStatusOverview, said: str, code: int) -> None:
    event = cluster._failure(failed, ["m"])
    assert (event.kind, event.code) == ("failed", code)
    assert event.message.startswith(said)
    assert len(event.message.splitlines()) == 1


def test_a_model_that_says_why_is_the_configs_fault_and_one_that_dies_the_machines() -> None:
    said = cluster._failure_of("m", "RuntimeError: first\n second")
    assert (said.message, said.code) == ("model m: RuntimeError: first", CONFIG)
    assert cluster._failure_of("m", cluster.DIED).code == MACHINE


def test_what_replicas_wait_for_is_told_and_their_failures_are_left_to_them() -> None:
    waits = "Deployment 'm' has 1 replicas that have taken more than 30s to be scheduled."
    assert cluster._obstacle(application(status="UPDATING", ingress="", m=waits)) == waits
    assert cluster._obstacle(application(status="UPDATING", m=f"Retrying. Error:\n{RAISED}")) == ""
    assert cluster._obstacle(application(status="UPDATING", m=DIED)) == "m: its process died; starting it once more"


@pytest.mark.parametrize("terminal", [False, True])
def test_messages_are_drawn_as_they_are(terminal: bool) -> None:
    """Brackets mean styles to rich, and a line may be longer than the terminal."""
    drawn = io.StringIO()
    loading = Loading(Console(file=drawn, force_terminal=terminal, width=60), ["m"])
    with loading.drawn():
        loading.stage("[/x] " + "long " * 30 + "end")
        loading.progress("m", 15, "[bold] [Errno 28]")
    told = drawn.getvalue()
    assert "[/x]" in told
    assert "[bold] [Errno 28]" in told
    if not terminal:
        assert len(told.splitlines()) == 2


def test_ports_beside_the_endpoint_are_free_and_none_is_taken_twice() -> None:
    wanted = next(iter(environment.PORTS.values()))
    for port in (0, wanted):
        found = [int(each) for each in environment._ports_beside(port).values()]
        assert len({*found, port}) == len(environment.PORTS) + 1
        assert all(environment.is_free("", each) for each in found)


@pytest.mark.parametrize("kind", ["file", "below a file", "nowhere"])
def test_a_state_folder_that_can_not_be_is_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    paths = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "nowhere": Path("/proc/nowhere")}
    monkeypatch.setattr(places, "STATE", paths[kind])
    with pytest.raises(MachineError, match=rf"^{paths[kind]} can't be used for logs and sockets: .*DURE_STATE"):
        processes.make_state()


def _socket_folder_of_nobody(base: str, told: Any) -> None:
    os.setuid(65534)
    tempfile.tempdir = base
    told.put(processes.socket_folder().name)


def gone() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_socket_folders_of_the_dead_are_cleared_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, alive = f"dure-{gone()}-a", f"dure-{os.getpid()}-b"
    others = ["dure-²-c", "dure-x-d", "dure--e"]
    for name in (dead, alive, *others):
        (tmp_path / name).mkdir()
    (tmp_path / f"dure-{10**30}-f").touch()
    made = processes.socket_folder()
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {alive, *others, made.name}
    assert dead not in names


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user")
def test_a_socket_folder_of_another_user_stands_in_nobodys_way() -> None:
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    base.chmod(0o1777)
    try:
        left = base / f"dure-{gone()}-left"
        left.mkdir(mode=0o700)
        context = get_context("fork")
        told = context.Queue()
        child = context.Process(target=_socket_folder_of_nobody, args=(str(base), told))
        child.start()
        assert told.get(timeout=20).startswith("dure-")
        child.join(20)
        assert child.exitcode == 0
        assert left.exists()
    finally:
        shutil.rmtree(base)


class _Hidden(psutil.Process):
    def environ(self) -> dict[str, str]:
        raise psutil.AccessDenied(self.pid)

    def create_time(self) -> float:
        raise psutil.AccessDenied(self.pid)


def test_processes_that_can_not_be_looked_at_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "process_iter", lambda: iter([_Hidden(os.getpid())]))
    assert list(processes.marked()) == []
    assert processes.stop_all() == 0
    owner = processes.Owner(os.getpid(), psutil.Process().create_time(), "x")
    assert owner.alive
    monkeypatch.setattr(psutil, "Process", _Hidden)
    assert not owner.alive
