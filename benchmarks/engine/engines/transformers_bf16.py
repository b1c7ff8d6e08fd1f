"""transformers in bfloat16: the model as it was published. It also judges the other engines' tokens."""

import torch
import worker
from transformers import AutoModelForCausalLM, DynamicCache


class Transformers:
    """Prompts of one length, all added before the first step: what the library batches without padding."""

    def __init__(self, model: str, threads: int, sequences: int, tokens: int, settings: dict | None = None):
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self.rows: list[tuple[int, list[int]]] = []
        self.left, self.cache, self.last = 0, DynamicCache(), torch.empty(0)

    @property
    def busy(self) -> bool:
        """Whether anything is unfinished."""
        return self.left > 0

    def add(self, key: int, prompt: list[int], count: int) -> None:
        """Queue."""
        if not self.busy:
            self.rows = []
        self.rows.append((key, prompt))
        self.left, self.cache = count, DynamicCache(config=self.model.config)
        self.last = torch.tensor([prompt for _, prompt in self.rows])

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """One token of every sequence."""
        output = self.model(self.last, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.last = output.logits[:, -1:].argmax(-1)[:, 0, None]
        self.left -= 1
        return list(zip((key for key, _ in self.rows), self.last[:, 0].tolist(), strict=True))

    @torch.inference_mode()
    def score(self, prompts: list[list[int]], tokens: list[list[int]]) -> list[dict[str, list[float]]]:
        """For each continuation: ln p of its tokens, and of the likeliest token at each of its places.

        All of them are equally long, prompts and continuations.
        """
        ids, count = torch.tensor([p + t for p, t in zip(prompts, tokens, strict=True)]), len(tokens[0])
        logits = self.model(ids, logits_to_keep=count + 1).logits[:, :-1]
        found = []
        for row, continuation in zip(logits, torch.tensor(tokens), strict=True):
            each = row.float().log_softmax(-1)
            own = each.gather(-1, continuation[:, None])[:, 0]
            found.append({"own": own.tolist(), "best": each.amax(-1).tolist()})
        return found


if __name__ == "__main__":
    worker.serve(Transformers, "transformers", "torch")
