"""A model by its hub name: from the local cache, else downloaded; weights in safetensors only."""

from pathlib import Path

from fourfold.core.errors import FourfoldError, UsageError

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt"]


def download(name: str) -> Path:
    """The folder of the hub model ``name`` (``owner/model``) on this machine.

    Raises UsageError when ``name`` cannot be a hub name (most often a mistyped path), FourfoldError when it
    is neither in the cache nor to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(
            f"'{name}' is neither a folder nor a file here, nor a hub name (owner/model). Check the path."
        )
    try:
        cached = Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
        if any(cached.glob("*.safetensors")):  # others may have fetched only config or tokenizer
            return cached
    except HFValidationError as error:
        raise UsageError(f"'{name}' is neither a path here nor a valid hub name (owner/model).") from error
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (
        Exception
    ) as error:  # the hub client raises network, HTTP, gating and file errors of many libraries
        raise FourfoldError(
            f"'{name}' is not a path here, and the hub could not deliver it ({type(error).__name__}). "
            "Check the name and the network, log in with `hf auth login` for a gated model, or download the "
            "folder elsewhere and name its path."
        ) from error
