"""Where ``fourfold quantize`` takes its calibration set from: what the user named, or the model itself."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fourfold.compress import Recipe
    from fourfold.compress.calibrated.run import Spread
    from fourfold.compress.calibration import Calibration
    from fourfold.engine import Engine

GREEDY_TOKENS = 3
SEQUENCES_AT_A_TIME = 32


def choose_device(name: str | None, recipe: "Recipe") -> str:
    """``name``, or cuda where there is one and the recipe has use for it. Raises UsageError for what this
    machine does not have.
    """
    import torch

    from fourfold.compress.pipeline import is_calibrated
    from fourfold.core.errors import UsageError

    if name is None:
        return "cuda" if is_calibrated(recipe) and torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: choose cpu or cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch {torch.__version__} sees no GPU here. Use --device cpu.")
    return name


def spread_for(workers: int | None, model: str, recipe: "Recipe", device: str) -> "Spread | None":
    """How layers are shared among ``workers``, if any. Raises UsageError where they cannot be."""
    if workers is None:
        return None
    from fourfold.cluster import spread_over

    return spread_over(workers, model, recipe, device)


def gpu_name(device: str) -> str | None:
    """What the GPU is called, if ``device`` is one."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


def gpu_peak_bytes(device: str) -> int | None:
    """The most memory that torch held on the GPU, if ``device`` is one."""
    import torch

    return torch.cuda.max_memory_reserved(device) if device.startswith("cuda") else None


def calibration_for(
    recipe: "Recipe",
    model: str,
    source: str | None,
    samples: int,
    sequence_tokens: int,
    seed: int,
    device: str,
) -> "Calibration | None":
    """The calibration set that ``recipe`` needs; None when it needs none.

    Raises UsageError for a ``source`` that such a recipe would not look at.
    """
    from fourfold.compress.pipeline import is_calibrated
    from fourfold.core.errors import UsageError

    if is_calibrated(recipe):
        return choose_calibration(model, source, samples, sequence_tokens, seed)
    if source is not None:
        raise UsageError(
            f"The recipe '{recipe.name}' looks at no activations, so --calibration {source} would change "
            "nothing. Remove it, or choose a recipe with calibrated passes."
        )
    return None


def choose_calibration(
    model: str, source: str | None, samples: int, sequence_tokens: int, seed: int
) -> "Calibration":
    """The calibration set for ``model``: from ``source`` (a file, a dataset's name), or None for text that
    the model writes.

    Raises UsageError for a source that is not there or too short, or sequences longer than the model takes.
    """
    from fourfold.checkpoint import open_checkpoint
    from fourfold.compress.calibration import SelfWritten
    from fourfold.compress.calibration_data import read_calibration
    from fourfold.core.errors import UsageError
    from fourfold.engine import Tokenizer

    checkpoint = open_checkpoint(model)
    positions = checkpoint.config.get("max_position_embeddings")
    if isinstance(positions, int) and sequence_tokens > positions:
        raise UsageError(
            f"--sequence-tokens {sequence_tokens} is more than the {positions} positions of {model}."
        )
    if source is not None:
        return read_calibration(source, Tokenizer.load(checkpoint), samples, sequence_tokens, seed)
    return SelfWritten(
        samples, sequence_tokens, seed, EngineAuthor(model, samples, sequence_tokens, seed).write
    )


class EngineAuthor:
    """Lets the model write sequences of ``sequence_tokens``, with the engine, loaded when first asked.

    A sequence begins as the model's texts do, with one token at random from the vocabulary; the next few are
    the likeliest, so that a beginning makes sense, and the rest are drawn from the model's own distribution
    (LLM-QAT, arXiv:2305.17888: "hybrid" sampling). Where a text ends the next one begins.
    """

    def __init__(self, model: str, samples: int, sequence_tokens: int, seed: int):
        self.model, self.samples, self.sequence_tokens, self.seed = model, samples, sequence_tokens, seed
        self._engine: Engine | None = None

    def write(self, first: int, count: int) -> "torch.Tensor":
        """The sequences from number ``first`` on, [count, T]: each follows from its number and the seed."""
        import torch

        from fourfold.engine import SamplingParams

        engine = self._engine = self._engine or self._load()
        length, numbers = self.sequence_tokens, range(first, first + count)
        begun = [self._beginning(engine, number)[:length] for number in numbers]
        for tokens, temperature in ((GREEDY_TOKENS, 0.0), (length, 1.0)):
            wanted = [min(tokens, length - len(ids)) for ids in begun]
            settings = [
                SamplingParams(
                    max_tokens=max(1, more), temperature=temperature, seed=self._seed(n), ignore_eos=True
                )
                for n, more in zip(numbers, wanted, strict=True)
            ]
            done = engine.generate(begun, settings)
            begun = [(ids + c.token_ids)[:length] for ids, c in zip(begun, done, strict=True)]
        if first + count >= self.samples:
            self._engine = engine = None  # its memory is needed for the layers
        return torch.tensor(begun, dtype=torch.int64)

    def _load(self) -> "Engine":
        import torch

        from fourfold.engine import Engine, EngineConfig

        room = SEQUENCES_AT_A_TIME * (self.sequence_tokens + 2 * 16)
        config = EngineConfig(
            max_batch_size=SEQUENCES_AT_A_TIME,
            max_batch_tokens=512,
            kv_cache_tokens=room,
            prefix_cache=False,
            threads=torch.get_num_threads(),
        )
        return Engine.load(self.model, config)

    def _seed(self, number: int) -> int:
        # 32 bits, for torch's generator on the CPU looks at no more
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{number}".encode()).digest()[:4])

    def _beginning(self, engine: "Engine", number: int) -> list[int]:
        """The beginning token, where the model was trained with one, and a token that stands for text."""
        import torch

        generator = torch.Generator().manual_seed(self._seed(number))
        start = engine.tokenizer.encode("", add_special_tokens=True)[:1]
        vocabulary = min(len(engine.tokenizer), engine.model.shape.vocabulary)
        while True:
            token = int(torch.randint(vocabulary, (1,), generator=generator))
            if engine.tokenizer.decode([token]):
                return [*start, token]
