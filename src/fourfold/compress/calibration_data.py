"""Calibration sequences from a text file, a JSONL file, or a dataset by name.

Documents are tokenized one after the other as the model was trained to read them (with its beginning token,
where it has one), joined, and cut at random places that do not overlap.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from fourfold.compress.calibration import CalibrationSet, cut
from fourfold.core.errors import FourfoldError, UsageError

PIECE_CHARACTERS = 1 << 16  # a text is tokenized in pieces of whole lines: tokenizers hold all of one at once
DATASET_SURPLUS = 16  # of a dataset, which may never end, this many times the tokens that are needed are read


class TextEncoder(Protocol):
    """What calibration needs of a tokenizer; the engine's is one."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``; ``add_special_tokens`` adds the beginning the model was trained with."""
        ...

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation."""
        ...


Document = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


def read_calibration(
    source: str, encoder: TextEncoder, samples: int, sequence_tokens: int, seed: int
) -> CalibrationSet:
    """``samples`` sequences from ``source``: a file (``*.jsonl`` line by line, all else as one text) or the
    name of a dataset, ``NAME`` or ``NAME:CONFIGURATION``.

    Raises UsageError for a file that is not there or too short, FourfoldError for one that cannot be read.
    """
    path = Path(source)
    if path.is_file():
        documents = read_jsonl(path) if path.suffix == ".jsonl" else iter([read_text(path)])
        return cut(_joined(documents, encoder), samples, sequence_tokens, seed, path.name)
    if path.suffix in (".txt", ".jsonl", ".json", ".md"):
        raise UsageError(
            f"There is no calibration file {source}. Give a text file, a JSONL file, or a dataset's name."
        )
    limit = DATASET_SURPLUS * samples * sequence_tokens
    return cut(_joined(read_dataset(source), encoder, limit), samples, sequence_tokens, seed, source)


def read_text(path: Path) -> str:
    """The whole file. Raises FourfoldError when it is not UTF-8."""
    try:
        return path.read_text("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise FourfoldError(
            f"The calibration text {path} is not UTF-8 (byte {error.start}). Convert it, e.g. with "
            "`iconv -t utf-8`."
        ) from error


def read_jsonl(path: Path) -> Iterator[Document]:
    """The ``text`` or the ``messages`` of each line. Raises FourfoldError that names the line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FourfoldError(f"Line {number} of {path} is not JSON ({error}).") from error
        yield _document(row, f"Line {number} of {path}")


def read_dataset(name: str) -> Iterator[Document]:
    """The ``text`` or ``messages`` of each row of a dataset's training split, through the library datasets.

    Raises FourfoldError when the library is not there, or the dataset cannot be had.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
        from huggingface_hub.constants import HF_HUB_OFFLINE
    except ImportError:
        raise FourfoldError(
            f"--calibration {name} is no file, and to read it as a dataset the library datasets is needed: "
            "pip install 'fourfold[datasets]'. Or give a text or JSONL file."
        ) from None
    repository, _, configuration = name.partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(
            repository, configuration or None, split="train", streaming=not HF_HUB_OFFLINE
        )
        for number, row in enumerate(rows):
            yield _document(row, f"Row {number} of the dataset {name}")
    except FourfoldError:
        raise
    except Exception as error:  # the library raises dozens of kinds; to a person all mean the same
        reason = " ".join(str(error).split())[:300]
        raise FourfoldError(
            f"--calibration {name} is no file, and cannot be read as a dataset ({type(error).__name__}: "
            f"{reason}). Check the name (NAME or NAME:CONFIGURATION, with a split 'train') and the network, "
            "or give a text or JSONL file."
        ) from error


def _document(row: object, place: str) -> Document:
    if isinstance(row, Mapping):
        text, messages = row.get("text"), row.get("messages")
        if isinstance(text, str):
            return text
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return messages
    raise FourfoldError(
        f"{place} has neither a `text` (a string) nor `messages` (a list of objects with role and content)."
    )


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def _joined(documents: Iterable[Document], encoder: TextEncoder, limit: int | None = None) -> torch.Tensor:
    """The tokens of all documents in a row, int32 [n]; reading ends after ``limit`` tokens."""
    pieces: list[torch.Tensor] = []
    count = 0
    for document in documents:
        for ids in _encoded(document, encoder):
            pieces.append(torch.tensor(ids, dtype=torch.int32))
            count += len(ids)
        if limit is not None and count >= limit:
            break
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)


def _encoded(document: Document, encoder: TextEncoder) -> Iterator[list[int]]:
    if not isinstance(document, str):
        try:
            yield encoder.apply_chat_template(document, add_generation_prompt=False)
        except FourfoldError as error:
            raise UsageError(
                f"The calibration data hold conversations, which this model cannot read: {error} Or give "
                "plain texts."
            ) from error
        return
    for index, piece in enumerate(_pieces(document)):
        yield encoder.encode(piece, add_special_tokens=index == 0)


def _pieces(text: str) -> Iterator[str]:
    """``text`` in pieces that end where lines do."""
    begin = 0
    while begin < len(text):
        end = len(text)
        if end - begin > PIECE_CHARACTERS:
            line_end = text.rfind("\n", begin, begin + PIECE_CHARACTERS)
            end = (line_end if line_end >= begin else begin + PIECE_CHARACTERS - 1) + 1
        yield text[begin:end]
        begin = end
