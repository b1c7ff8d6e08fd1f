"""Chat templates, rendered as transformers renders them, but without its import of half a second.

A template comes with a checkpoint and is a program of somebody else: it runs in jinja's sandbox, sees only
plain values, and gets what ``transformers.utils.chat_template_utils`` (5.x) gives it; plain_tokenizer.py
leaves the few templates that ask for more to transformers.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def render(template: str, messages: list[dict[str, str]], **variables: Any) -> str:
    """The text of a conversation of {"role", "content"} messages; values that are None count as missing.

    Raises TypeError or ValueError for what is no conversation, and whatever the template does.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    if not all(isinstance(message, dict) for message in messages):
        raise TypeError("each message must be an object with a role and a content")
    said = [{key: value for key, value in message.items() if value is not None} for message in messages]
    given: dict[str, Any] = {"tools": None, "documents": None}
    return compiled(template).render(messages=said, **(given | variables))


@lru_cache
def compiled(template: str) -> Template:
    """``template`` as jinja's program."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": now, "namespace": Names}
    return environment.from_string(template)


class Names(Namespace):
    """What ``namespace()`` makes: it takes no names with an underscore in front, which Python itself uses."""

    def __init__(self, *args: Any, **kwargs: Any):
        for name in dict(*args, **kwargs):
            check_name(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


def check_name(name: str) -> None:
    """Raises SecurityError for a name of Python's own."""
    if name.startswith("_"):
        raise SecurityError(f"a template may not keep '{name}' in a namespace")


def to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, where jinja's own filter would write it for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def now(form: str) -> str:
    """The time of day, for templates that tell it to the model."""
    return datetime.now().strftime(form)


def refuse(message: str) -> NoReturn:
    """What a template calls for a conversation that it does not take."""
    raise TemplateError(message)
