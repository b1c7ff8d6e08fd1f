"""Fourfold, embedded: the engine without its server, one step at a time."""

import worker

from fourfold.engine import Engine, EngineConfig, Request, SamplingParams


class Fourfold:
    """The engine behind the three calls that are timed."""

    def __init__(self, model: str, threads: int, sequences: int, tokens: int, settings: dict | None = None):
        sizes = {"max_batch_size": sequences, "kv_cache_tokens": tokens, "threads": threads}
        self.engine = Engine.load(model, EngineConfig(prefix_cache=False, **sizes, **(settings or {})))

    @property
    def busy(self) -> bool:
        """Whether anything is unfinished."""
        return self.engine.has_work

    def add(self, key: int, prompt: list[int], count: int) -> None:
        """Queue."""
        sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        self.engine.add(Request(str(key), prompt, sampling))

    def step(self) -> list[tuple[int, int]]:
        """One step."""
        return [(int(output.request_id), output.token_id) for output in self.engine.step()]


if __name__ == "__main__":
    worker.serve(Fourfold, "fourfold", "torch")
