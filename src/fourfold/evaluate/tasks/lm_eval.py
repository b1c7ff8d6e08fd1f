"""The tasks of EleutherAI's lm-evaluation-harness, asked of a served model: ``lm-eval:arc_easy,gsm8k``.

The library does all of it (prompts, few shots, scoring, standard errors) through its ``local-completions``
model; here is only the way in and out. Multiple-choice tasks ask for the log-probabilities of given text
(``echo`` with ``logprobs``), so they need a server that answers that, and a tokenizer here to know where a
choice begins.

``--include`` adds a folder of further task files (YAML), with data of your own if you like.

Interval: from the library's standard error, times 1.96; for shares (accuracy, exact match) Clopper-Pearson on
the number of questions that this error is worth, as for agreement in the task heldout.
"""

import contextlib
import logging
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.machine import installed_version
from fourfold.core.records import Estimate, Score
from fourfold.evaluate.endpoint import Endpoint
from fourfold.evaluate.intervals import Mean, share
from fourfold.evaluate.served import ServedOptions
from fourfold.evaluate.task import Answered, Progress, ServedTask

NORMAL_95 = 1.959964
SHARES = ("acc", "exact_match", "pass", "f1", "em")
DEFAULT_CONTEXT = 2048  # lm-eval's own, for servers that do not tell theirs

METHOD = (
    "lm-evaluation-harness through its local-completions model; prompts, shots and scoring are the "
    "library's. 95 % interval from its standard error: times 1.96, for shares by Korn and Graubard."
)


def task_list(argument: str) -> list[str]:
    """The task names after the colon. Raises UsageError when there is none."""
    names = [name.strip() for name in argument.split(",") if name.strip()]
    if not names:
        raise UsageError("Name the tasks of lm-eval: --task lm-eval:arc_easy,hellaswag.")
    return names


def check(argument: str, options: ServedOptions) -> None:
    """Refuse what cannot be before any model is loaded; FourfoldError when the library is not installed."""
    task_list(argument)
    if options.samples > 1 or options.temperature is not None or options.chat:
        raise UsageError(
            "--samples, --temperature and --chat are humaneval's; lm-eval's tasks say themselves."
        )
    if options.include is not None and not options.include.is_dir():
        raise UsageError(f"--include {options.include} is no folder. Name one that holds task files (YAML).")
    if find_spec("lm_eval") is None:
        raise FourfoldError("lm-eval is not installed: pip install 'fourfold[evaluate]'.")


def names(argument: str, options: ServedOptions) -> list[str]:
    """Scores are called task/metric; which metrics there are, the library says only afterwards."""
    return task_list(argument)


def ask(endpoint: Endpoint, argument: str, options: ServedOptions, progress: Progress) -> Answered:
    """Let the library ask. Raises UsageError for unknown tasks, FourfoldError for whatever it fails at."""
    tasks = task_list(argument)
    with quiet():
        # not by import: the library is optional, and its types are not for checking
        library, manage = import_module("lm_eval"), import_module("lm_eval.tasks")
        manager = manage.TaskManager(include_path=str(options.include) if options.include else None)
        unknown = [name for name in tasks if name not in manager.all_tasks]
        if unknown:
            raise UsageError(
                f"lm-eval knows no task '{unknown[0]}'. `lm-eval ls tasks` lists what there is; "
                "--include DIR adds your own."
            )
        try:
            results = library.simple_evaluate(
                model="local-completions",
                model_args=model_arguments(endpoint, options),
                tasks=list(tasks),
                task_manager=manager,
                limit=options.questions,
                log_samples=False,
                bootstrap_iters=1000,
                random_seed=options.seed,
                numpy_random_seed=options.seed,
                torch_random_seed=options.seed,
            )
        except Exception as error:  # a library of libraries: anything may come out of it
            raise FourfoldError(explain(error, tasks, options)) from error
    scores, notes = read_results(results or {})
    tokenizer = Path(options.tokenizer).name if options.tokenizer else None
    settings = {"questions": options.questions, "tokenizer": tokenizer, "seed": options.seed}
    return Answered(scores, settings=settings | {"lm_eval": installed_version("lm_eval")}, notes=notes)


def model_arguments(endpoint: Endpoint, options: ServedOptions) -> dict[str, Any]:
    """What lm-eval's client needs to know of the server."""
    return {
        "base_url": f"{endpoint.url}/v1/completions",
        "model": endpoint.model_name,
        "num_concurrent": options.concurrency,
        "max_length": endpoint.max_positions or DEFAULT_CONTEXT,
        "max_gen_toks": options.max_tokens,
        "tokenizer": options.tokenizer,
        "tokenizer_backend": "huggingface" if options.tokenizer else "none",
        "header": dict(endpoint.headers) or None,
        "seed": options.seed,
    }


def explain(error: Exception, tasks: list[str], options: ServedOptions) -> str:
    """The library's failure as one paragraph with what helps most often."""
    said = " ".join(str(error).split())[:300] or "no message"
    if options.tokenizer is None:
        remedy = "Tasks that score given text need --tokenizer FOLDER, the model's own."
    else:
        remedy = f"See that the tokenizer '{options.tokenizer}' and the task's data can be loaded here, and "
        remedy += "that the server answers echo and logprobs."
    return f"lm-eval failed at {', '.join(tasks)} ({type(error).__name__}: {said}). {remedy}"


def read_results(results: dict[str, Any]) -> tuple[list[Score], list[str]]:
    """Scores with intervals; what the library gives none for stands in the notes."""
    scores, notes = [], []
    better = results.get("higher_is_better", {})
    for task, figures in results.get("results", {}).items():
        for key, value in figures.items():
            metric, _, choice = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not choice:
                continue
            name = f"{task}/{metric}" + (f",{choice}" if choice != "none" else "")
            error = figures.get(f"{metric}_stderr,{choice}")
            if not isinstance(error, int | float):
                notes.append(f"{name} is {value:.5g}; lm-eval gives no standard error.")
                continue
            questions = int(results.get("n-samples", {}).get(task, {}).get("effective", 0))
            higher = bool(better.get(task, {}).get(metric, True))
            estimate = interval(metric, float(value), float(error), questions)
            scores.append(Score(name=name, value=estimate, higher_is_better=higher, questions=questions))
    return scores, notes


def interval(metric: str, value: float, error: float, questions: int) -> Estimate:
    """The plain interval; for shares the one that stays in 0..1 and is not certain when all answers agree."""
    if metric.startswith(SHARES) and 0 <= value <= 1 and questions > 1:
        return share(Mean(value, error, questions - 1, questions))
    return Estimate(value=value, low=value - NORMAL_95 * error, high=value + NORMAL_95 * error)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The library's chatter stays off the terminal; its warnings and errors do not."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


TASK = ServedTask(ask=ask, check=check, names=names, method=METHOD)
