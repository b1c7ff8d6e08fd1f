"""The verb: options in, tables and files out, exit codes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fourfold.cli.bench import bench
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.records import RunRecord


def call(*args: object):
    app = typer.Typer()
    app.command()(bench)
    return CliRunner().invoke(app, [str(a) for a in args])


def test_table_records_and_summary(small_server, tmp_path):
    _, url = small_server
    options = ["--profile", "chat,document", "--concurrency", 2, "--scale", 0.02, "--requests", 3]
    result = call(url, *options, "--out", tmp_path / "runs", "--json", tmp_path / "s.json")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["chat-c2.json", "document-c2.json"]
    summary = json.loads((tmp_path / "s.json").read_text())
    assert [run["settings"]["profile"] for run in summary["runs"]] == ["chat", "document"]
    assert "closed-loop runs" in result.output and "document" in result.output


def test_excluded_runs_are_shown_with_their_first_error(small_server, tmp_path):
    app, url = small_server
    app.stops_after = 1
    result = call(url, "--scale", 0.02, "--out", tmp_path)
    assert result.exit_code == 0 and "excluded" in result.output
    assert "output tokens, got 1" in " ".join(result.output.split())


def test_an_error_with_brackets_is_shown_as_it_is(small_server, tmp_path):
    app, url = small_server
    app.fail_every, app.refusal = 1, "no [/room] left"
    app.spared = 1
    result = call(url, "--scale", 0.02, "--out", tmp_path / "[bold]")
    assert result.exit_code == 0, result.exception
    assert "no [/room] left" in " ".join(result.output.split()) and "[bold]/chat-c1.json" in result.output


def test_the_key_is_sent_and_never_written(small_server, tmp_path, monkeypatch):
    _, url = small_server
    monkeypatch.setenv("SECRET_KEY", "sk-something")
    assert call(url, "--scale", 0.02, "--out", tmp_path, "--api-key-env", "SECRET_KEY").exit_code == 0
    assert "sk-something" not in (tmp_path / "chat-c1.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", "1,many"], "'many' is none"),
        (["--profile", "talk"], "Unknown profile"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "is not set"),
        (["--json", f"{__file__}/x.json"], "cannot be made"),
    ],
)
def test_misuse(tmp_path, options, message):
    error = call("http://127.0.0.1:9", "--out", tmp_path, *options).exception
    assert isinstance(error, UsageError) and message in str(error)


def test_a_folder_that_cannot_be_made_is_misuse(small_server):
    error = call(small_server[1], "--scale", 0.02, "--out", __file__).exception
    assert isinstance(error, UsageError) and "--out" in str(error)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_without_room_is_one_error(small_server, tmp_path):
    (tmp_path / "chat-c1.json.tmp").symlink_to("/dev/full")
    error = call(small_server[1], "--scale", 0.02, "--requests", 1, "--out", tmp_path).exception
    assert isinstance(error, FourfoldError) and "No room for" in str(error)


@pytest.mark.e2e
def test_control_c_keeps_finished_runs(small_server, tmp_path):
    app, url = small_server
    app.token_s = 0.02
    command = [sys.executable, "-m", "fourfold", "bench", url, "--scale", "0.05", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--concurrency", "1,2,3,4", "--requests", "30"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # started in the background, a shell's children ignore Ctrl-C, and theirs would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and b"chat-c1.json" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert b"closed-loop runs" in output  # the table of what is finished
    finished = {p.name for p in tmp_path.iterdir()}
    assert "chat-c1.json" in finished and "chat-c4.json" not in finished


@pytest.mark.e2e
def test_a_model_folder_is_served_and_measured(tiny_llama, tmp_path):
    result = call(tiny_llama, "--scale", 0.05, "--requests", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = RunRecord.model_validate_json((tmp_path / "chat-c1.json").read_text())
    assert [r.error for r in record.requests] == [None, None]
    assert record.target == tiny_llama.name and record.model and record.model.weight_format == "bf16"
    assert all(len(r.token_times_s) == 6 for r in record.requests)
