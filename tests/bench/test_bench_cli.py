"""The verb: options in, tables and files out, exit codes."""

import json

import pytest
import typer
from typer.testing import CliRunner

from fourfold.cli.bench import bench
from fourfold.core.errors import UsageError


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
        (["--json", "/no/such/folder/x.json"], "does not exist"),
    ],
)
def test_misuse(tmp_path, options, message):
    error = call("http://127.0.0.1:9", "--out", tmp_path, *options).exception
    assert isinstance(error, UsageError) and message in str(error)
