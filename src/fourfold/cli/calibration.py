"""Where ``fourfold quantize`` takes its calibration set from: what the user named, or the model itself."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fourfold.compress import Recipe
    from fourfold.compress.calibrated.run import Spread
    from fourfold.compress.calibration import Calibration


class Asked(NamedTuple):
    """The calibration set that the user asks for; ``source`` None: text that the model writes."""

    source: str | None
    samples: int
    sequence_tokens: int
    seed: int


def choose_device(name: str | None, recipe: "Recipe", measures: bool = False) -> str:
    """``name``, or cuda where there is one and the recipe has use for it, or a budget ``measures``. Raises
    UsageError for what this machine does not have.
    """
    import torch

    from fourfold.compress.pipeline import is_calibrated
    from fourfold.core.errors import UsageError

    if name is None:
        return "cuda" if (measures or is_calibrated(recipe)) and torch.cuda.is_available() else "cpu"
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
    recipe: "Recipe", model: str, asked: Asked, device: str, measured: bool = False
) -> "Calibration | None":
    """The calibration set that ``recipe`` needs, or has use for and the user named; None when it is neither.

    Raises UsageError for a source that nobody looks at: neither such a recipe, nor a budget that was
    ``measured`` on it.
    """
    from fourfold.compress.pipeline import is_calibrated, takes_calibration
    from fourfold.core.errors import UsageError

    if is_calibrated(recipe) or (asked.source is not None and takes_calibration(recipe)):
        return choose_calibration(model, asked, device)
    if asked.source is not None and not measured:
        raise UsageError(
            f"The recipe '{recipe.name}' looks at no activations, so --calibration {asked.source} would "
            "change nothing. Remove it, or choose a recipe with calibrated passes."
        )
    return None


def choose_calibration(model: str, asked: Asked, device: str) -> "Calibration":
    """The calibration set for ``model``: from a file or a dataset, or text that the model writes.

    Raises UsageError for a source that is not there or too short, or sequences longer than the model takes.
    """
    from fourfold.checkpoint import open_checkpoint
    from fourfold.cli.authors import author_for
    from fourfold.compress.calibration import SelfWritten
    from fourfold.compress.calibration_data import read_calibration
    from fourfold.core.errors import UsageError
    from fourfold.engine import Tokenizer

    source, samples, sequence_tokens, seed = asked
    checkpoint = open_checkpoint(model)
    positions = checkpoint.config.get("max_position_embeddings")
    if isinstance(positions, int) and sequence_tokens > positions:
        raise UsageError(
            f"--sequence-tokens {sequence_tokens} is more than the {positions} positions of {model}. Give "
            "that many or fewer."
        )
    if source is not None:
        found = read_calibration(source, Tokenizer.load(checkpoint), samples, sequence_tokens, seed)
        vocabulary, highest = checkpoint.config.get("vocab_size"), int(found.token_ids.max())
        if isinstance(vocabulary, int) and highest >= vocabulary:
            raise UsageError(
                f"The tokenizer of {model} makes the token {highest} of the calibration text, but the model "
                f"has embeddings for {vocabulary} only. Put the tokenizer that it was trained with there."
            )
        return found
    write = author_for(model, samples, sequence_tokens, seed, device)
    return SelfWritten(samples, sequence_tokens, seed, write)
