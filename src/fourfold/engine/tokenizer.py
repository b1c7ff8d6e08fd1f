"""Text to tokens and back, through the checkpoint's own tokenizer (never its remote code)."""

import tempfile
from pathlib import Path
from typing import Any

from fourfold.checkpoint import Checkpoint
from fourfold.checkpoint.checkpoint import no_tokenizer
from fourfold.checkpoint.folder import has_tokenizer
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.engine.plain_tokenizer import PlainTokenizer

# of others, AutoTokenizer may correct what their files say
PLAIN_MODELS = ("llama", "qwen3", "qwen3_moe", "gpt_oss")
NOT_YET_TEXT = "\ufffd"  # what decoders put for a character whose bytes are not all there


class Tokenizer:
    """A tokenizer, a plain one or transformers', behind the few operations that serving needs.

    ``eos_token_ids`` are all tokens that end a reply: those of the generation config, or else of the config,
    and the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: set[int]):
        self._tokenizer = tokenizer
        self._backend = plain_backend(tokenizer)
        self.eos_token_ids = eos_token_ids
        self.bos_token_id: int | None = tokenizer.bos_token_id

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> "Tokenizer":
        """The tokenizer of ``checkpoint``. Raises FourfoldError when it has none or it is broken."""
        eos = as_ids(checkpoint.generation_config.get("eos_token_id"))
        eos = eos or as_ids(checkpoint.config.get("eos_token_id"))
        with tempfile.TemporaryDirectory(prefix="fourfold-tokenizer-") as temporary:
            folder = checkpoint.folder
            if folder is None:
                folder = Path(temporary)
                checkpoint.write_tokenizer(folder)
            tokenizer = read_tokenizer(folder, checkpoint.source, checkpoint.config.get("model_type"))
        return cls(tokenizer, eos | as_ids(tokenizer.eos_token_id))

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``; ``add_special_tokens`` adds the beginning the model was trained with."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``, without special tokens unless asked for."""
        if self._backend is not None:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own, special tokens included, as logprob lists show it."""
        return self.decode([token_id], skip_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return self._tokenizer.chat_template is not None

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a conversation of {"role", "content"} messages, up to where the assistant begins.

        Raises UsageError when the checkpoint has no chat template or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise UsageError(
                "This model's tokenizer has no chat template, so it cannot take a conversation. Use the "
                "completions API, or an instruction-tuned model."
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False, **variables
            )
        except (
            Exception
        ) as error:  # a template is a program of its own; whatever it raises is about its input
            raise UsageError(f"The model's chat template refused these messages: {error}") from error
        return self.encode(text)

    def stream(self) -> "TextStream":
        """A fresh incremental detokenizer."""
        return TextStream(self)


class TextStream:
    """Incremental detokenizing: tokens in, printable text out, never half a character.

    Text of a token depends on its left neighbour (leading spaces), so each new piece is the difference of two
    decodings that begin at the same earlier token (the algorithm of vLLM and TGI). Bytes that never become a
    character stay unprinted.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[
            int
        ] = []  # those printed last, with the text ``_before``, and those not yet printed
        self._printed, self._before = 0, ""

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, possibly none."""
        self._tokens.append(token_id)
        after = self._tokenizer.decode(self._tokens)
        if len(after) <= len(self._before) or after.endswith(NOT_YET_TEXT):
            return ""
        text = after[len(self._before) :]
        del self._tokens[: self._printed]
        self._printed, self._before = len(self._tokens), self._tokenizer.decode(self._tokens)
        return text


def plain_backend(tokenizer: Any) -> Any | None:
    """The ``tokenizers`` object whose decoding is all that ``tokenizer``'s is; None when that does more.

    What transformers puts around it costs four times the decoding of a token.
    """
    if isinstance(tokenizer, PlainTokenizer):
        return tokenizer.backend_tokenizer
    from transformers import PreTrainedTokenizerFast as Plain

    kind = type(tokenizer)
    plain = isinstance(tokenizer, Plain) and kind.decode is Plain.decode and kind._decode is Plain._decode
    return tokenizer.backend_tokenizer if plain else None


def read_tokenizer(folder: Path, source: str, model_type: str | None = None) -> Any:
    """The tokenizer in ``folder``, transformers' unless it is plain.

    Raises FourfoldError naming ``source`` when there is none.
    """
    if not has_tokenizer(folder):
        raise no_tokenizer(source)
    try:
        if model_type in PLAIN_MODELS and (plain := PlainTokenizer.read(folder)) is not None:
            return plain
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; to a person all mean the same
        raise FourfoldError(
            f"The tokenizer of {source} cannot be read ({type(error).__name__}: {error}). Copy the tokenizer "
            "files of the original model into the folder again."
        ) from error


def as_ids(value: int | list[int] | None) -> set[int]:
    """An ``eos_token_id`` entry, which may be one id, several or none."""
    if value is None:
        return set()
    return set(value) if isinstance(value, list) else {value}
