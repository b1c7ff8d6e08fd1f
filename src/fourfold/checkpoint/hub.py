"""A model by its hub name: from the local cache, else downloaded; weights in safetensors only."""

import re
from pathlib import Path

from fourfold.checkpoint.folder import CONFIG, INDEX, TOKENIZER_FILES, has_tokenizer, weight_map_of
from fourfold.core.errors import FourfoldError, UsageError

WANTED = ["*.safetensors", "*.json", "*.jinja", *(n for n in TOKENIZER_FILES if not n.endswith(".json"))]
UNWANTED = ["*/*"]  # other forms of the same model, such as original/ and onnx/
ONE_OF_SEVERAL = re.compile(r"-\d+-of-\d+\.safetensors$")


def download(name: str) -> Path:
    """The folder of the hub model ``name`` (``owner/model``) on this machine.

    Raises UsageError when ``name`` cannot be a hub name (most often a mistyped path), FourfoldError when it
    is neither whole in the cache nor to be had.
    """
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(
            f"'{name}' is neither a folder nor a file here, nor a hub name (owner/model). Check the path."
        )
    try:
        cached = _snapshot(name, local_files_only=True)
        if has_weights(cached) and has_tokenizer(cached):
            return cached
    except HFValidationError as error:
        raise UsageError(f"'{name}' is neither a path here nor a valid hub name (owner/model).") from error
    except LocalEntryNotFoundError:
        pass
    try:
        folder = _snapshot(name, local_files_only=False)
    except Exception as error:  # the hub client raises errors of many libraries
        raise _undelivered(name, type(error).__name__) from error
    # without a network the client hands out what is in the cache, whole or not; and a model whose weights are
    # pickles has none of the files that were asked for
    if not has_weights(folder):
        raise _undelivered(name, "not with config.json and all its safetensors files")
    return folder


def has_weights(folder: Path) -> bool:
    """Whether a cached snapshot is whole: others may have fetched only its config, or its first shard."""
    if not (folder / CONFIG).is_file():
        return False
    if (folder / INDEX).is_file():
        return all((folder / file).is_file() for file in weight_map_of(folder / INDEX).values())
    return any(not ONE_OF_SEVERAL.search(path.name) for path in folder.glob("*.safetensors"))


def _snapshot(name: str, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=local_files_only
        )
    )


def _undelivered(name: str, reason: str) -> FourfoldError:
    return FourfoldError(
        f"'{name}' is not a path here, and the hub could not deliver it ({reason}). Check the name and the "
        "network, log in with `hf auth login` for a gated model, or download the folder elsewhere and name "
        "its path."
    )
