"""Is the model still good? Perplexity, KL divergence and agreement with a base, each with its interval."""

from fourfold.evaluate.corpus import default_texts, read_texts
from fourfold.evaluate.gates import Gate, estimate_of, parse_gates
from fourfold.evaluate.quality import DEFAULT_TOKENS_PER_TEXT, DEFAULT_WINDOW_TOKENS, evaluate, task_names

__all__ = [
    "DEFAULT_TOKENS_PER_TEXT",
    "DEFAULT_WINDOW_TOKENS",
    "Gate",
    "default_texts",
    "estimate_of",
    "evaluate",
    "parse_gates",
    "read_texts",
    "task_names",
]
