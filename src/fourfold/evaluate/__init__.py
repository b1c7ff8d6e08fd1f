"""Is the model still good? Perplexity, KL divergence and agreement with a base, each with its interval."""

from fourfold.evaluate.corpus import default_texts, read_texts
from fourfold.evaluate.gates import Gate, estimate_of, parse_gates, parse_score_gates
from fourfold.evaluate.quality import DEFAULT_TOKENS_PER_TEXT, evaluate, get_task, task_names
from fourfold.evaluate.served import ServedOptions, evaluate_served
from fourfold.evaluate.task import ServedTask, Task

__all__ = [
    "DEFAULT_TOKENS_PER_TEXT",
    "Gate",
    "ServedOptions",
    "ServedTask",
    "Task",
    "default_texts",
    "estimate_of",
    "evaluate",
    "evaluate_served",
    "get_task",
    "parse_gates",
    "parse_score_gates",
    "read_texts",
    "task_names",
]
