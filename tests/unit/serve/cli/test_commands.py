"""Every command ends with one line and a code, whatever it is asked and whoever answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve import paths
from serve.cli import asking, main
from serve.failures import MachineError
from tests.dure import ROOT, free_port

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process; answers with its exit code and what it printed."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(paths, "STATE", tmp_path / "state")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dure", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


@contextmanager
def answering(*parts: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """The URL of a server that sends the same bytes to everybody, part by part, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                with client:
                    try:
                        client.recv(65536)
                        for part in parts:
                            client.sendall(part)
                            time.sleep(pause_s)
                    except OSError:
                        continue

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def http(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


MODEL = b'{"id": "m", "task": "rerank", "state": "ready"}'
GARBAGE = {
    "html": http(b"<html>hello</html>"),
    "html error": http(b"<html>no</html>", "502 Bad Gateway"),
    "empty": http(b""),
    "truncated": http(b'{"data": [{"id"'),
    "cut short": http(b'{"data": []}')[:-4],
    "another shape": http(b'{"data": {"id": 1}}'),
    "a list": http(b"[]"),
    "null": http(b"null"),
    "no model": http(b'{"data": [{"id": "m"}]}'),
    "not UTF-8": http(b'{"data": [{"id": "\xff\xfe"}]}'),
    "deep": http(b"[" * 100_000),
    "numbers": http(b'{"data": [%s], "predictions": [{"append": 1, "confidence": "x"}]}' % MODEL),
    "error of another shape": http(b'{"error": "no"}', "500 Oops"),
    "redirect": http(b"", "302 Found", "Location: http://127.0.0.1:9/\r\n"),
    "not HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "nothing": b"",
    "bad gzip": http(b"nonsense", more="Content-Encoding: gzip\r\n"),
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("command", [("status",), ("predict", "안녕")], ids=["status", "predict"])
def test_an_answer_that_is_not_dures_is_one_line(dure: Run, command: tuple[str, ...], answer: bytes) -> None:
    with answering(answer) as url:
        code, out, err = dure(*command, "--url", url)
    assert (code, out) == (1, "")
    [line] = err.splitlines()
    assert url in line


def test_a_refusal_of_dures_is_shown(dure: Run) -> None:
    body = '{"error": {"type": "loading", "message": "[/x] 모델이 아직\\nno"}}'.encode()
    with answering(http(body, "503 Service Unavailable")) as url:
        assert dure("predict", "a", "--url", url) == (1, "", "[/x] 모델이 아직\n")


def test_what_a_server_names_is_shown_as_it_is(dure: Run) -> None:
    more = b'"device": null, "precision": "[bold]", "fallback_reason": null, "memory_mb": null, "load_seconds": 1'
    model = b'{"id": "[/x]\\u001b[2J", "task": "rerank", "state": "ready", "replicas": [], %s, "data": [%s]}' % (
        more,
        MODEL,
    )
    with answering(http(model)) as url:
        code, out, err = dure("status", "--url", url + "/")
    assert (code, err) == (0, "")
    assert "[/x]" in out
    assert "[bold]" in out
    assert "\x1b[2J" not in out


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9",
        "127.0.0.1:8000",
        "http://",
        "http://[::1",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:port",
        "http://nowhere.invalid",
        "http://서버.invalid/경로",
        "http://xn--/",
        "http://a b/",
        "ftp://127.0.0.1",
        "",
        "http://" + "a" * 300 + ".invalid",
        "http://\udcff",
    ],
)
def test_an_address_where_nothing_answers_is_one_line(dure: Run, url: str) -> None:
    code, out, err = dure("status", "--url", url)
    assert (code, out) == (1, "")
    [line] = err.splitlines()
    assert "does not answer" in line


@pytest.mark.parametrize("proxy", ["nonsense", "http://proxy.invalid:99999", "socks5://127.0.0.1:9"])
def test_a_proxy_that_is_none_is_one_line(dure: Run, proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    code, out, err = dure("status", "--url", "http://127.0.0.1:9")
    assert (code, out) == (1, "")
    [line] = err.splitlines()
    assert line.startswith("http://127.0.0.1:9 does not answer")


def test_a_password_in_an_address_is_not_repeated(dure: Run) -> None:
    _, _, err = dure("status", "--url", "http://me:hunter2@127.0.0.1:9")
    assert "hunter2" not in err


@pytest.mark.parametrize(
    "parts", [(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 50), (http(b"x" * 50)[:-50], *[b"x"] * 50)]
)
def test_a_server_that_drips_is_left_after_the_time_in_all(parts: tuple[bytes, ...]) -> None:
    started = time.monotonic()
    with answering(*parts, pause_s=0.1) as url, pytest.raises(MachineError, match="has not answered within 1 s"):
        asking.ask(asking.Models, url, "/v1/models", timeout_s=1)
    assert time.monotonic() - started < 4


def test_a_server_that_sends_without_end_is_left() -> None:
    chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with answering(head, *[chunk] * 20) as url, pytest.raises(MachineError, match="more than 16 MB"):
        asking.ask(asking.Models, url, "/v1/models")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nosuch"], "No such command 'nosuch'; see `dure --help`"),
        (["serve", "--nope"], "No such option: --nope; see `dure serve --help`"),
        (["predict"], "Missing argument 'text'; see `dure predict --help`"),
        (["predict", "a", "--top-k", "51"], "'--top-k'"),
        (["predict", "\udcff"], "the text is not UTF-8"),
        (["rollback", "--to", "last"], "'--to'"),
        (["rollback"], "set RAY_ADDRESS"),
        (["history"], "set RAY_ADDRESS"),
        (["status", "extra"], "extra"),
        (["serve", "--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["serve", "--config", "."], "is a folder"),
        (["fetch", "--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["migrate", "--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["plan", "--config", "README.md"], "README.md, line "),
        (["plan", "--gpus", "two"], "--gpus 'two': GPUs are written as COUNTxSIZE"),
        (["plan", "--gpus", "99999999999x24GiB"], "GPUs are written as COUNTxSIZE"),
        (["plan", "--gpus", "0x24GiB"], "GPUs are written as COUNTxSIZE"),
        (["bench", "nosuch"], "No such command 'nosuch'; see `dure bench --help`"),
        (["bench", "precision", "embeder"], "unknown model 'embeder'; did you mean 'embedder'?"),
        (["bench", "batch-sizes", "embedder", "--sizes", "1,x"], "--sizes '1,x' is not a list of whole numbers"),
        (["bench", "batch-sizes", "embedder", "--sizes", "0"], "--sizes '0' is not a list"),
        (["bench", "batch-sizes", "embedder", "--sizes", "1000000000"], "from 1 to 10000"),
        (["bench", "batch-sizes", "embedder", "--sizes", "9" * 5000], "from 1 to 10000"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_wrong_words_are_one_line(dure: Run, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # `serve` would leave those of this process ignored
    code, out, err = dure(*words)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert said in line


def test_what_nobody_foresaw_is_one_line_and_keeps_its_traceback(
    dure: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(asking, "ask", lambda *_: 1 / 0)
    code, out, err = dure("status")
    assert (code, out) == (1, "")
    [line] = err.splitlines()
    assert line.startswith("ZeroDivisionError: division by zero")
    assert "Traceback" in (tmp_path / "state/crash.log").read_text(encoding="utf-8")


def test_help_is_no_failure(dure: Run) -> None:
    assert dure("--help")[0] == 0
    assert dure()[::2] == (2, "")


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        run = subprocess.run(
            [sys.executable, "-m", "serve", "environment"],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            timeout=60,
            encoding="utf-8",
            check=False,
        )
    assert run.returncode == 1
    assert run.stderr.splitlines()[0] == "No space left on device"
    assert "Traceback" not in run.stderr


def test_korean_is_sent_and_printed_under_a_locale_without_it() -> None:
    words = '{"predictions": [{"append": " 좋아서", "confidence": 0.5}]}'
    with answering(http(words.encode())) as url:
        run = subprocess.run(
            [sys.executable, "-X", "utf8=0", "-m", "serve", "predict", "오늘", "--url", url],
            env={**os.environ, "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
            capture_output=True,
            cwd=ROOT,
            timeout=60,
            check=False,
        )
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout == b" 50.0%  ?? ???\n"


@pytest.mark.parametrize("after_s", [0.2, 1.0])
def test_an_interrupt_while_it_starts_leaves_no_traceback(after_s: float, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); from serve.__main__ import main; main()", "serve"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "DURE_STATE": str(tmp_path), "DURE_TEST_PORT": str(free_port())},
        encoding="utf-8",
    )
    assert process.stdout
    process.stdout.readline()
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode in (0, -signal.SIGINT, 128 + signal.SIGINT)
