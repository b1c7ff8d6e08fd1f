"""A Hugging Face folder on disk: its JSON files and its shards, checked before any tensor is read."""

from pathlib import Path
from typing import Any

from fourfold.checkpoint.storage.header import StoredTensor, broken, parse_object, read_header, short
from fourfold.core.errors import FourfoldError, UsageError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# any of these is a tokenizer; the others only belong to one
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
)
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``. Raises FourfoldError when it is absent or broken."""
    if not path.is_file():
        raise FourfoldError(
            f"{path.parent} holds no {path.name}. A model folder needs it: copy it from the model's origin."
        )
    return parse_object(path, path.read_bytes(), "text")


def read_model_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands. Raises FourfoldError when it is absent, broken or names no model_type."""
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise FourfoldError(
            f"{folder / CONFIG} names no model_type, so nobody can tell what model this is. "
            "Copy config.json from the model's origin."
        )
    return config


def read_optional_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``, or an empty one when there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_shards(folder: Path) -> dict[str, StoredTensor]:
    """Every stored tensor of ``folder`` in file order. Raises FourfoldError for the first defect."""
    index = folder / INDEX
    weight_map = weight_map_of(index) if index.is_file() else None
    files = sorted(set(weight_map.values())) if weight_map is not None else [_single_file(folder)]
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise FourfoldError(
                f"{folder} lacks the shard {name}, which {INDEX} names. Fetch that file again "
                "(an interrupted download often leaves this)."
            )
        for tensor in read_header(path).values():
            if tensor.name in tensors:
                other = tensors[tensor.name].path.name
                raise broken(path, f"tensor '{short(tensor.name)}' is also in {other}")
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_map(index, weight_map, tensors)
    return tensors


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files that are in ``folder``."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` holds a file that a tokenizer can be made from."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor name -> file of its folder. Raises FourfoldError for anything else."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise broken(index, "its weight_map is not a map from tensor names to files")
    for tensor, file in weight_map.items():
        # a name from the index becomes a path, so it must be a plain file name of this folder
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or "\0" in file:
            raise broken(
                index, f"tensor '{short(tensor)}' points to {short(repr(file))}, not a file in its folder"
            )
        if not file.endswith(".safetensors"):
            raise broken(index, f"tensor '{short(tensor)}' points to '{short(file)}', not a safetensors file")
    return weight_map


def _check_map(index: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise broken(index, f"it puts tensor '{short(name)}' into {file}, which does not hold it")


def _single_file(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in names:
        return SINGLE
    if len(names) == 1:
        return names[0]
    if names:
        raise FourfoldError(
            f"{folder} holds {len(names)} safetensors files but no {INDEX} that says which belong to the "
            "model. Fetch the index from the model's origin."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise UsageError(
            f"{folder} holds pickled weights (.bin or .pt), which Fourfold does not open because pickle "
            "runs code. Convert them to safetensors first (transformers: save_pretrained)."
        )
    raise FourfoldError(f"{folder} holds no *.safetensors file. Check the path, or fetch the weights.")
