"""What to do when memory ends inside a layer: the same again in smaller batches, or a clear word."""

import gc

import torch

from fourfold.core.errors import FourfoldError

CPU_WORDS = "can't allocate memory"  # torch raises a plain RuntimeError where the system has no more


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that there is no memory left, on a GPU or not."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or CPU_WORDS in str(error)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def no_room(what: str, device: torch.device, reason: str) -> FourfoldError:
    """The error when even a single sequence at a time is too much."""
    return FourfoldError(
        f"{what} does not fit into the memory of {device}, even one sequence at a time "
        f"({' '.join(reason.split())[:200]}). Finished layers are kept: end what else uses this memory, and "
        "run the same command with --resume; or start anew with a smaller --sequence-tokens or --samples, or "
        "with --device cpu."
    )
