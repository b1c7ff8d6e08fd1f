"""The three verbs as a person uses them: serve until told to stop, chat over pipes, generate."""

import json
import signal
import socket
import subprocess
import sys

import httpx
import pytest
import typer
from server_harness import eventually
from typer.testing import CliRunner

from fourfold.cli.chat import chat, printable
from fourfold.cli.generate import generate
from fourfold.cli.serve import serve
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.engine import Engine, EngineConfig, SamplingParams
from fourfold.server.launch import take_port
from fourfold.server.local import DeferredInterrupt, LocalChat, stream_tokens
from fourfold.server.remote import RemoteChat

SERVE = "import typer; from fourfold.cli.serve import serve; typer.run(serve)"


def run(verb, arguments: list[str], typed: str = ""):
    """A verb alone in an app, so that these tests need no other room's commands."""
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, arguments, input=typed, catch_exceptions=True)


def test_serve_says_where_and_ends_with_zero(tiny_llama):
    command = [sys.executable, "-c", SERVE, str(tiny_llama), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    try:
        line = process.stdout.readline()
        assert line.startswith("Fourfold serves tiny-llama (bf16) at http://127.0.0.1:")
        assert httpx.get(line.split()[-1] + "/health").json() == {"status": "ok"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert process.stdout.read() == ""
        assert process.stderr.read().startswith("Computed: ")
    finally:
        process.kill()


def test_ctrl_c_ends_a_server_without_a_traceback(start_server):
    running = start_server()
    with running.server.capture_signals():
        signal.raise_signal(signal.SIGINT)
    assert running.server.should_exit and not running.server.force_exit
    assert running.loop.refusal() is not None
    assert eventually(lambda: not running.server.servers[0].is_serving())


def test_a_port_in_use_is_told_before_loading():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(serve, ["no-such-model", "--port", str(port)])
    assert isinstance(result.exception, FourfoldError)
    assert str(port) in str(result.exception) and "--port" in str(result.exception)


def test_options_that_do_not_go_together_are_misuse():
    result = run(serve, ["no-such-model", "--max-batch-size", "100000"])
    assert isinstance(result.exception, UsageError) and "max_batch_tokens" in str(result.exception)


def test_a_host_that_is_none_is_misuse():
    with pytest.raises(UsageError, match="--host"):
        take_port("not a host", 0)


def test_generate_prints_and_records(tiny_llama, tmp_path):
    out = tmp_path / "g.json"
    result = run(generate, [str(tiny_llama), "--prompt", "A tale", "--max-tokens", "9", "--json", str(out)])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    engine = Engine.load(tiny_llama, EngineConfig(threads=1))
    [want] = engine.generate(["A tale"], SamplingParams(temperature=0, max_tokens=9))
    assert record["token_ids"] == want.token_ids and record["text"] == want.text
    assert want.text in result.output and f"Computed: {record['computed']}" in result.output
    assert record["computed"] == engine.computed and "bfloat16 for what is not quantized" in engine.computed
    assert record["prompt_token_ids"] == want.prompt_token_ids
    assert 0 < record["ttft_ms"] <= record["total_ms"]


@pytest.mark.parametrize("remote", [False, True])
def test_chat_over_a_pipe_remembers_and_resets(tiny_llama, live, remote):
    target = f"{live.url}/v1" if remote else str(tiny_llama)
    typed = "hello\nhello\n/reset\nhello\n/what\n/exit\nnever read\n"
    before = live.engine.stats.prompt_tokens
    result = run(chat, [target, "--max-tokens", "6", "--temperature", "0", "--system", "s"], typed)
    assert result.exit_code == 0, result.output
    name, first, second, reset, third, help_text = result.output.strip("\n").split("\n")[:6]
    assert name.startswith("tiny-llama") and "/reset" in help_text and "forgotten" in reset
    assert first == third != second
    if remote:
        ask = {"model": "tiny-llama", "max_tokens": 6, "temperature": 0}
        fresh = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
        answer = live.http.post("/v1/chat/completions", json=ask | {"messages": fresh}).json()
        length = answer["usage"]["prompt_tokens"]
        assert live.engine.stats.prompt_tokens - before > 4 * length, "the second turn held the first"


def test_chat_with_nobody_is_one_clear_error():
    result = run(chat, ["http://127.0.0.1:9"], "hello\n")
    assert isinstance(result.exception, FourfoldError) and "fourfold serve" in str(result.exception)


def test_remote_refusals_are_told(live):
    partner = RemoteChat(live.url, {"max_tokens": 9})
    with pytest.raises(FourfoldError, match="maximum context length"):
        list(partner.reply([{"role": "user", "content": "a" * 600}]))


@pytest.mark.parametrize("remote", [False, True])
def test_an_answer_is_as_long_as_the_context_has_room(tiny_llama, live, remote):
    options = {"max_tokens": 9999, "temperature": 0}
    messages = [{"role": "user", "content": "a" * 480}]
    engine = Engine.load(tiny_llama, EngineConfig(threads=1))
    room = engine.max_request_tokens - len(engine.tokenizer.apply_chat_template(messages))
    local = LocalChat(engine, SamplingParams(**options, ignore_eos=True))
    partner = RemoteChat(live.url, options | {"ignore_eos": True}) if remote else local
    pieces = list(partner.reply(messages))
    assert len(pieces) == room > 1


def test_ctrl_c_ends_the_answer_between_steps(tiny_llama):
    engine = Engine.load(tiny_llama, EngineConfig(threads=1))
    partner = LocalChat(engine, SamplingParams(max_tokens=50, ignore_eos=True))
    pieces = partner.reply([{"role": "user", "content": "a"}])
    next(pieces)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert not engine.has_work
    assert len(list(partner.reply([{"role": "user", "content": "a"}]))) == 50


def test_deferred_interrupt_gives_the_handler_back():
    before = signal.getsignal(signal.SIGINT)
    with DeferredInterrupt():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_conversation_that_is_too_long_names_the_remedy(tiny_llama):
    engine = Engine.load(tiny_llama, EngineConfig(threads=1))
    with pytest.raises(FourfoldError, match="/reset"):
        next(stream_tokens(engine, [9] * 512, SamplingParams()))


def test_text_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\tc\nd\x07é👩‍🚀") == "a[2Jb\tc\nd" + "é👩‍🚀"
