"""A tokenizer of which tokenizer.json says everything, read by ``tokenizers`` alone.

transformers would hold the same object and add nothing to it, after an import of 0.4 s and 80 MB. What it
would do to it is known only for the settings listed here; a folder that says anything else is not plain.
"""

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")
# of no effect on ids and texts; the two that ask for bos and eos are overruled by tokenizer.json
IDLE = (
    "tokenizer_class", "backend", "chat_template", "added_tokens_decoder", "model_max_length", "padding_side",
    "model_input_names", "clean_up_tokenization_spaces", "is_local", "local_files_only", "name_or_path",
    "add_bos_token", "add_eos_token",
)  # fmt: skip
# what chat_template.py does not render: a tag for training, a method of ``dict``
UNCOMMON = re.compile(r"{%[-+]?\s*generation\b|\bfromkeys\b")


class PlainTokenizer:
    """As much of transformers' tokenizer as an engine uses. ``named`` are the special tokens with a name."""

    def __init__(self, backend: Backend, named: dict[str, str], chat_template: str | None):
        self.backend_tokenizer, self.named, self.chat_template = backend, named, chat_template
        self.bos_token_id, self.eos_token_id = (
            backend.token_to_id(named[name]) if name in named else None for name in ("bos_token", "eos_token")
        )

    @classmethod
    def read(cls, folder: Path) -> "PlainTokenizer | None":
        """The tokenizer in ``folder``, or None when there is more to it."""
        settings = plain_settings(folder)
        if settings is None:
            return None
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        named = {name: text_of(settings[name]) for name in NAMED if settings.get(name) is not None}
        extra = [text_of(token) for key in EXTRA for token in settings.get(key) or ()]
        if not holds(backend, [*named.values(), *extra], settings.get("added_tokens_decoder", {})):
            return None
        template = folder / "chat_template.jinja"
        text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
        return None if text is not None and UNCOMMON.search(text) else cls(backend, named, text)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool, verbose: bool = False) -> list[int]:
        """Token ids of ``text``."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation. Raises what ``render`` raises."""
        from fourfold.engine.chat_template import render  # completions need no jinja

        assert self.chat_template is not None and not tokenize
        return render(self.chat_template, messages, **(self.named | variables))


def plain_settings(folder: Path) -> dict[str, Any] | None:
    """tokenizer_config.json of ``folder``, or None when tokenizer.json does not say all."""
    path = folder / "tokenizer_config.json"
    others = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
    if not path.is_file() or not (folder / "tokenizer.json").is_file():
        return None
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") not in CLASSES or not settings.keys() <= {*NAMED, *EXTRA, *IDLE}:
        return None
    # the older files are looked at only where the newer entry is missing
    if "added_tokens_decoder" not in settings and any((folder / name).exists() for name in others[:2]):
        return None
    if (folder / others[2]).exists() or not isinstance(settings.get("chat_template"), str | None):
        return None
    return None if any(isinstance(settings.get(key), dict) for key in EXTRA) else settings


def holds(backend: Backend, specials: list[str], added: dict[str, dict[str, Any]]) -> bool:
    """Whether ``backend`` pads and cuts nothing and has these special tokens and added ones already."""
    own = backend.get_added_tokens_decoder()
    if backend.padding is not None or backend.truncation is not None:
        return False
    if not {token.content for token in own.values()}.issuperset(specials):
        return False
    return {repr(AddedToken(**token)) for token in added.values()} <= {repr(token) for token in own.values()}


def text_of(token: str | dict[str, Any]) -> str:
    """A special token's text; transformers also writes ``{"content": ...}``."""
    return token if isinstance(token, str) else token["content"]
