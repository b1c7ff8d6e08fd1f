"""What a run sends and expects: so many tokens in, so many out, exactly.

The four shipped workloads are the shapes that vendors' papers use (128 and 2048 tokens), so that figures
can be laid side by side. Prompts are random token ids: the counts are exact with every tokenizer, and
prefix caches do not help. The price: text that a model knows could behave differently where speed depends
on content, as with speculative decoding or the routing of experts.
"""

from dataclasses import dataclass

from fourfold.core.errors import UsageError
from fourfold.core.registry import Registry

WORKLOADS = Registry("fourfold.bench.workloads", "WORKLOAD", "profile")


@dataclass(frozen=True)
class Workload:
    """``input_tokens`` of prompt and ``output_tokens`` of answer; ``example`` says who works like this."""

    name: str
    input_tokens: int
    output_tokens: int
    example: str

    def scaled(self, scale: float) -> "Workload":
        """Both lengths times ``scale``, at least 1 in and 2 out (a time per token needs two tokens).

        Raises UsageError for a scale that is not positive.
        """
        if not scale > 0:
            raise UsageError(f"--scale {scale:g} must be above 0; 1 is the workload as published.")
        tokens_in = max(1, round(self.input_tokens * scale))
        tokens_out = max(2, round(self.output_tokens * scale))
        return Workload(self.name, tokens_in, tokens_out, self.example)


def get_workload(name: str) -> Workload:
    """The workload ``name``. Raises UsageError listing the names when there is none."""
    return WORKLOADS.get(name)


def workload_names() -> list[str]:
    """All profile names, sorted."""
    return WORKLOADS.names()
