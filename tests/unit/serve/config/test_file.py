"""A config file that can't be served is refused in one line that says where and what to change."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.config.base import SettingsError
from serve.config.file import ConfigFile, checked, read_config
from tests.dure import ROOT

MODEL = "{task: embedding, source: demo/rerank/checkpoint}"
FILE = f"""\
http_options: {{host: 127.0.0.1, port: 8000}}
applications:
  - name: dure
    import_path: serve.app:build
    args:
      guard: {{cpu: null}}
      models:
        first: {MODEL}
"""
END = len(FILE.splitlines())


def read(tmp_path: Path, content: str | bytes) -> ConfigFile:
    path = tmp_path / "config.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_config(path)


def refusal(tmp_path: Path, content: str | bytes) -> str:
    """The one line that a file is refused with, without its path."""
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, content)
    [line] = str(caught.value).splitlines()
    start = str(tmp_path / "config.yaml")
    assert line.startswith(start)
    return line.removeprefix(start)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (FILE + f"        first: {MODEL}\n", f", line {END + 1}: applications.0.args.models.first is a duplicate key"),
        (FILE + f"      models: {{a: {MODEL}}}\n", f", line {END + 1}: applications.0.args.models is a duplicate key"),
        (FILE + "      guard: {memory: 0.5}\n", f", line {END + 1}: applications.0.args.guard is a duplicate key"),
        (FILE + "http_options: {}\n", "http_options is a duplicate key, first set in line 1;"),
        (FILE.replace("cpu: null", "cpu: null, cpu: 0.5"), "args.guard.cpu is a duplicate key, first set in line 6;"),
        (FILE.replace("cpu: null", "cpu: null, 'cpu': 0.5"), "args.guard.cpu is a duplicate key"),
        (FILE + "        ? first\n        : {}\n", "args.models.first is a duplicate key"),
        (FILE.replace("port: 8000}", "port: 8000}\nx-a: [1, {b: 1, b: 2}]"), ", line 2: x-a.1.b is a duplicate key"),
        ("x-a: &a {task: embedding, task: rerank}\n" + FILE, ", line 1: x-a.task is a duplicate key"),
        (FILE + "        b: {<<: {source: a, source: b}}\n", "args.models.b.<<.source is a duplicate key"),
        ("x-a: &a {b: 1}\nx-c: {<<: *a, <<: *a}\n" + FILE, ", line 2: x-c.<< is a duplicate key"),
        ("x-a: {1: a, 0x1: b}\n" + FILE, ", line 1: x-a.1 is a duplicate key"),
    ],
)
def test_a_key_that_is_there_twice_is_named_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    assert said in refusal(tmp_path, content)


def test_what_aliases_repeat_and_merges_override_is_no_duplicate(tmp_path: Path) -> None:
    more = "        b: &b {<<: *a, threads: 2}\n        c: {<<: [*b, *a], source: elsewhere}\n        d: *b\n"
    models = read(tmp_path, f"x-a: &a {MODEL[:-1]}, threads: 1}}\n{FILE}{more}").settings.models
    assert [(model.source, model.threads) for name, model in models.items() if name != "first"] == [
        ("demo/rerank/checkpoint", 2),
        ("elsewhere", 2),
        ("demo/rerank/checkpoint", 2),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "a: &a [b, b]\n" + "".join(f"a{n}: &a{n} [*a{n - 1 or ''}, *a{n - 1 or ''}]\n" for n in range(1, 40)),
            "aliases",
        ),
        ("x-a: &a [*a]\n" + FILE, "nested more than"),
        ("x-a: " + "[" * 400 + "]" * 400, "nested more than"),
        ("x-a: " + "{a: " * 60 + "1" + "}" * 60, "nested more than"),
        ("# " + "a" * 600_000, "at most 512 KiB"),
    ],
)
def test_what_would_grow_without_end_is_refused(tmp_path: Path, content: str, said: str) -> None:
    assert said in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ": a config file needs `applications`"),
        ("# nothing\n", ": a config file needs `applications`"),
        ("just text", ": a config file needs `applications`"),
        ("- a\n- b\n", ": a config file needs `applications`"),
        ("applications: []", ": a config file needs `applications`"),
        ("applications: {name: dure}", ": applications: has to be a list"),
        ("a: [", ", line 1: this is not YAML"),
        ("a:\n\tb: 1\n", ", line 2: this is not YAML"),
        ("a: b: c\n", ", line 1: this is not YAML"),
        ("a: *nowhere\n", ", line 1: this is not YAML"),
        (f"{FILE}---\n{FILE}", f", line {END + 1}: this is not YAML"),
        ("a: \x07\n", ": this is not YAML"),
        ("? {a: b}\n: c\n", ", line 1: : a key has to be text"),
        (FILE + "        b: {task: !!python/name:os.system , source: a}\n", f", line {END + 1}: this is not YAML"),
        ("x-a: !!set {a, b}\n" + FILE, ", line 1: x-a: a config file can't contain tag:yaml.org,2002:set"),
        (FILE + "        b: {revision: 2024-01-01}\n", "b.revision: '2024-01-01' is read as a date; put it in quotes"),
        (FILE + "        b: {revision: 2024-13-41}\n", "b.revision: '2024-13-41' can't be read; if it is text, put"),
        (FILE + "        b: {threads: !!int ''}\n", "b.threads: '' can't be read"),
        (FILE + "        b: {threads: !!bool maybe}\n", "b.threads: 'maybe' can't be read"),
        (FILE + f"        b: {{threads: {'9' * 5000}}}\n", "b.threads: '99999"),
        (FILE + f"        b: {{threads: 0x{'f' * 5000}}}\n", "b.threads: '0xfff"),
        (FILE + f"        b: {{threads: -{'9' * 400}}}\n", "9' is too large a number"),
        (FILE + "        b: {max_queue: 010}\n", "b.max_queue: '010' is read as 8; write that, or put it in quotes"),
        (FILE + "        b: {max_queue: 1:30}\n", "b.max_queue: '1:30' is read as 90; write that"),
        (FILE + "        b: {revision: 0123}\n", "b.revision: '0123' is read as 83"),
        (FILE + '        "b\\e[31m": {task: 2024-01-01}\n', "args.models.b [31m.task: '2024-01-01' is read as a date"),
        (FILE + f'        "b\\e[31m": {MODEL}\n', "args.models.b [31m.[key]"),
        (FILE + f"        b: {MODEL[:-1]}, max_memory: {{0: 1GiB, '0': 2GiB}}}}\n", "max_memory: names a GPU twice"),
        (FILE + "        b: {task: 'a:b:c', source: x}\n", "b.task: unknown task 'a:b:c'"),
        (FILE + "        b: {task: 'a.b:c.d', source: x}\n", "b.task: unknown task 'a.b:c.d'"),
        (FILE + "        b: {task: 'a..b:c', source: x}\n", "b.task: unknown task 'a..b:c'"),
        (FILE.replace("cpu: null", "cpu: !!binary aGk="), "args.guard.cpu: 'aGk=' is read as a bytes"),
    ],
)
def test_what_is_no_config_says_so(tmp_path: Path, content: str, said: str) -> None:
    assert said in refusal(tmp_path, content)


KOREAN = FILE + "# 한글 주석\n"


@pytest.mark.parametrize("encoding", ["cp949", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_told_from_utf_8(tmp_path: Path, encoding: str) -> None:
    assert refusal(tmp_path, KOREAN.encode(encoding)).endswith(": this is not UTF-8; save it as UTF-8")


def test_the_first_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, KOREAN.encode("euc-kr")).startswith(f", line {END + 1}: this is not UTF-8")
    latin = FILE.replace("first", "café").encode("latin-1")
    assert refusal(tmp_path, latin).startswith(f", line {END}: this is not UTF-8")


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(tmp_path: Path) -> None:
    assert read(tmp_path, KOREAN.replace("\n", "\r\n").encode("utf-8-sig")).settings.models


def test_utf_8_is_read_and_written_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "설정.yaml"
    path.write_text(KOREAN.replace("first", "한글"), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-m", "serve", "plan", "--config", str(path)],
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    [line] = run.stderr.decode(errors="replace").splitlines()
    assert "models" in line
    assert "should match pattern" in line


def test_a_path_that_leads_to_no_config_says_what_it_leads_to(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(SettingsError) as caught:
            read_config(path)
        [line] = str(caught.value).splitlines()
        return line

    assert said(tmp_path) == f"{tmp_path} is a folder; name a file"
    (tmp_path / "production.yaml").write_text(FILE, encoding="utf-8")
    assert said(tmp_path / "prodution.yaml").endswith(f"did you mean {tmp_path / 'production.yaml'}?")
    assert said(tmp_path / "local.yml").endswith(f"did you mean {ROOT / 'configs/local.yaml'}?")
    assert said(tmp_path / "production.yaml" / "x").endswith("Not a directory")
    assert "did you mean" not in said(tmp_path / "nothing-like-it")
    os.mkfifo(tmp_path / "pipe")
    assert said(tmp_path / "pipe").endswith("is not a file on a disk")
    (tmp_path / "round").symlink_to("round")
    assert "symbolic links" in said(tmp_path / "round")


def document(**changes: Any) -> dict[str, Any]:
    """A valid config with `a__0__b=value` changes."""
    made: dict[str, Any] = yaml.safe_load(FILE)
    for name, value in changes.items():
        place: Any = made
        *path, last = name.split("__")
        for part in path:
            place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
        place[last] = value
    return made


APP = "applications__0__"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("http_options__port", 0, "http_options.port: has to be greater than or equal to 1 (it is 0)"),
        ("http_options__port", -1, "http_options.port: has to be greater"),
        ("http_options__port", 65536, "http_options.port: has to be less than or equal to 65535 (it is 65536)"),
        ("http_options__port", 99999, "http_options.port"),
        ("http_options__port", "8000", "http_options.port: has to be a whole number (it is '8000')"),
        ("http_options__port", True, "http_options.port: has to be a whole number (it is true)"),
        ("http_options__port", 80.5, "http_options.port: has to be a whole number"),
        ("http_options__port", float("nan"), "http_options.port: has to be a"),
        ("http_options__port", None, "http_options.port: has to be a whole number (it is empty)"),
        ("http_options__port", [8000], "http_options.port: has to be a whole number"),
        ("http_options__host", "", "http_options.host: write an IPv4 address"),
        ("http_options__host", "not a host!", "http_options.host: write an IPv4 address"),
        ("http_options__host", "http://127.0.0.1", "http_options.host: write an IPv4 address"),
        ("http_options__host", "127.0.0.1:8000", "http_options.host"),
        ("http_options__host", "999.1.1.1", "http_options.host: Octet 999"),
        ("http_options__host", "127.1", "http_options.host"),
        ("http_options__host", "a" * 300, "http_options.host"),
        ("http_options__host", "서버", "http_options.host"),
        ("http_options__host", 127, "http_options.host: has to be text; put it in quotes (it is 127)"),
        ("http_options__hots", "a", "http_options: unknown key 'hots'; did you mean 'host'?"),
        ("http_options__root_path", "/dure", "http_options.root_path: Dure answers at the root"),
        ("http_options__request_timeout_s", 5, "http_options.request_timeout_s: set it as"),
        ("http_options__keep_alive_timeout_s", 0, "http_options.keep_alive_timeout_s"),
        ("http_options__keep_alive_timeout_s", 10**9, "http_options.keep_alive_timeout_s"),
        ("http_options__ssl_certfile", "/a.pem", "http_options.ssl_certfile: Dure serves no TLS"),
        ("http_options", None, "http_options: has to be a mapping"),
        ("http_options", ["a"], "http_options: has to be a mapping"),
        ("proxy_location", "Disabled", "proxy_location: unknown value 'Disabled'; known: EveryNode, HeadOnly"),
        ("proxy_location", "Everynode", "proxy_location: unknown value 'Everynode'; did you mean 'EveryNode'?"),
        ("grpc_options", {"port": 9000}, "grpc_options: Dure has no gRPC"),
        ("controller_options", {}, "controller_options: set it in the environment"),
        ("tracing_config", {"enabled": True}, "tracing_config: Dure writes no traces"),
        ("target_capacity", 50, "target_capacity"),
        ("logging_config", {"encoding": "XML"}, "logging_config.encoding: Got 'XML'"),
        ("logging_config", {"logs_dri": "a"}, "logging_config.logs_dri"),
        ("logging_config", "TEXT", "logging_config: has to be a mapping"),
        ("aplications", [], "unknown key 'aplications'; did you mean 'applications'?"),
        (f"{APP}route_prefix", "/dure", "applications.0.route_prefix: write /: Dure answers at the root"),
        (f"{APP}route_prefix", "", "applications.0.route_prefix: write /"),
        (f"{APP}route_prefix", None, "applications.0.route_prefix"),
        (f"{APP}import_path", "serve.app:built", "applications.0.import_path: write serve.app:build"),
        (f"{APP}name", "other", "applications.0.name: write dure"),
        (f"{APP}name", "", "applications.0.name: write dure"),
        (f"{APP}args", None, "applications.0.args: has to be a mapping"),
        (f"{APP}args", {}, "applications.0.args.models: is missing"),
        (f"{APP}args__models", {}, "applications.0.args.models"),
        (f"{APP}args__models", [1], "applications.0.args.models: has to be a mapping"),
        (f"{APP}args__models__first", None, "applications.0.args.models.first: has to be a mapping"),
        (f"{APP}port", 8000, "applications.0: unknown key 'port'"),
        (f"{APP}autoscaling_policy", {}, "applications.0.autoscaling_policy: set one for each model"),
        (f"{APP}external_scaler_enabled", True, "applications.0.external_scaler_enabled: Dure scales"),
        (f"{APP}runtime_env", {"env_vars": {"A": 1}}, "applications.0.runtime_env: runtime_env['env_vars'] must be"),
        (
            f"{APP}runtime_env",
            {"env_var": {}},
            "applications.0.runtime_env: unknown key 'env_var'; did you mean 'env_v",
        ),
        (f"{APP}runtime_env", {"working_dir": "/a"}, "runtime_env"),
        (f"{APP}deployments", {"name": "a"}, "applications.0.deployments: has to be a list"),
        (
            f"{APP}deployments",
            [{"name": "frist"}],
            "deployments.0.name: unknown deployment 'frist'; did you mean 'first'",
        ),
        (f"{APP}deployments", [{"name": "search"}], "deployments.0.name: unknown deployment 'search'"),
        (f"{APP}deployments", [{"name": "first"}] * 2, "deployments.1.name: first is listed twice"),
        (
            f"{APP}deployments",
            [{"name": "first", "num_replicas": 2}],
            "deployments.0.num_replicas: Dure sets this from",
        ),
        (f"{APP}deployments", [{"name": "first", "max_replicas_per_node": 0}], "deployments.0.max_replicas_per_node"),
    ],
)
def test_what_serve_would_take_and_dure_can_not_run_is_refused_by_its_path(place: str, value: Any, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        checked(Path("a.yaml"), document(**{place: value}))
    assert str(caught.value).startswith("a.yaml: ")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_one_application_is_served() -> None:
    made = document()
    made["applications"] *= 2
    with pytest.raises(SettingsError, match="Dure is one application, but the file lists 2"):
        checked(Path("a.yaml"), made)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("http_options__host", "0.0.0.0"),
        ("http_options__host", "localhost"),
        ("http_options__host", "gpu-1.example.org"),
        ("http_options__keep_alive_timeout_s", 60),
        ("proxy_location", "HeadOnly"),
        ("logging_config", {"encoding": "JSON", "log_level": "WARNING"}),
        ("x-common", {"a": 1}),
        (f"{APP}route_prefix", "/"),
        (f"{APP}runtime_env", {"env_vars": {"A": "1"}}),
        (f"{APP}logging_config", {"log_level": "DEBUG"}),
        (f"{APP}deployments", [{"name": "ingress", "max_replicas_per_node": 1}, {"name": "first"}]),
    ],
)
def test_what_works_is_taken(place: str, value: Any) -> None:
    assert checked(Path("a.yaml"), document(**{place: value})).settings.models


def test_what_is_left_out_stays_on_this_machine() -> None:
    made = document()
    del made["http_options"]
    assert checked(Path("a.yaml"), made).url == "http://127.0.0.1:8000"


def test_passwords_are_not_repeated(tmp_path: Path) -> None:
    for name, value in (
        ("cache", {"url": "redis://:hunter2@host:99999/0"}),
        ("cache", {"url": "redis://:hunter2/x@host/0"}),
        ("store", {"url": "postgresql://me:hunter2@host:99999/db"}),
        ("webhook", {"url": "https://me:hunter2@host:99999", "secret": "0123456789abcdef"}),
        ("webhook", {"url": "https://host", "secret": "hunter2"}),
    ):
        with pytest.raises(SettingsError) as caught:
            checked(Path("a.yaml"), document(**{f"{APP}args__{name}": value}))
        assert name in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_this_machine_can_look_its_own_name_up() -> None:
    """What `http_options.host` may be, as far as the rules for it go."""
    assert checked(Path("a.yaml"), document(http_options__host=socket.gethostname())).host
