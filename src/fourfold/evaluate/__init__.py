"""Is the model still good? Perplexity, KL divergence and agreement with a base, each with its interval."""

from fourfold.evaluate.corpus import default_texts, read_texts
from fourfold.evaluate.gates import Gate, estimate_of, parse_gates, parse_score_gates
from fourfold.evaluate.layers import layer_picture
from fourfold.evaluate.quality import DEFAULT_TOKENS_PER_TEXT, evaluate, get_task, task_names
from fourfold.evaluate.served import ServedOptions, check_served, evaluate_served
from fourfold.evaluate.task import ServedTask, Task
from fourfold.evaluate.weights import linear_errors

__all__ = [
    "DEFAULT_TOKENS_PER_TEXT",
    "Gate",
    "ServedOptions",
    "ServedTask",
    "Task",
    "check_served",
    "default_texts",
    "estimate_of",
    "evaluate",
    "evaluate_served",
    "get_task",
    "layer_picture",
    "linear_errors",
    "parse_gates",
    "parse_score_gates",
    "read_texts",
    "task_names",
]
