"""A prompt as if it had been written: each of its tokens with its text and how likely the model found it.

One pass beside the paged cache, as for ``Engine.logits``, with the logits of few tokens at a time.
"""

from typing import TYPE_CHECKING

import torch

from fourfold.engine.requests import TokenOutput

if TYPE_CHECKING:
    from fourfold.engine.engine import Engine

ROWS_AT_A_TIME = 128


def echo(engine: "Engine", prompt_token_ids: list[int], logprobs: int | None) -> list[TokenOutput]:
    """One output for each token of the prompt, with ``logprobs`` likeliest tokens beside it, None: without.

    The first token has no log-probability. Must not run while the engine steps. Raises UsageError for ids
    that the model does not know.
    """
    text = engine.tokenizer.stream()
    outputs = [TokenOutput("", token_id, text.push(token_id)) for token_id in prompt_token_ids]
    if logprobs is None or len(outputs) < 2:
        return outputs
    states = engine.through(engine.embedded(prompt_token_ids), 0, engine.layer_count)
    for start in range(0, len(outputs) - 1, ROWS_AT_A_TIME):
        rows = torch.from_numpy(engine.logits_of(states[:-1][start : start + ROWS_AT_A_TIME])).log_softmax(-1)
        values, indices = (part.tolist() for part in rows.topk(min(logprobs, rows.shape[-1]), -1))
        for row, output in enumerate(outputs[start + 1 : start + 1 + len(rows)]):
            output.logprob = float(rows[row, output.token_id])
            output.top_logprobs = list(zip(indices[row], values[row], strict=True))
    return outputs
