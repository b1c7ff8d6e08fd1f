"""A chat with any OpenAI-compatible server, over HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

from fourfold.core.errors import FourfoldError

CONTEXT_FULL = "context_length_exceeded"  # OpenAI's error code
TIMEOUT = httpx.Timeout(10.0, read=None)  # a long prompt may take long to its first token


class ContextFullError(FourfoldError):
    """Prompt and wanted answer together are longer than the model's context."""


class RemoteChat:
    """Answers with the model behind ``url`` (with or without ``/v1``). Raises FourfoldError."""

    def __init__(self, url: str, options: dict[str, Any]):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.options = options
        self.client = httpx.Client(timeout=TIMEOUT)
        self.name = self._first_model()

    def _first_model(self) -> str:
        try:
            response = self.client.get(f"{self.url}/v1/models")
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise FourfoldError(
                f"No OpenAI-compatible server answers at {self.url} ({type(error).__name__}: {error}). "
                "Start one with 'fourfold serve MODEL', or give the address it printed."
            ) from error

    def reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The next turn, piece by piece; leaving early closes the connection, which aborts the answer.

        Where the context leaves less room than ``max_tokens``, the answer may be as long as there is room.
        """
        body = {"model": self.name, "messages": messages, "stream": True} | self.options
        try:
            yield from self._answer(body)
        except ContextFullError:
            yield from self._answer({name: v for name, v in body.items() if name != "max_tokens"})

    def _answer(self, body: dict[str, Any]) -> Iterator[str]:
        try:
            with self.client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    kind = ContextFullError if CONTEXT_FULL in response.text else FourfoldError
                    raise kind(f"{self.url} refused: {error_message(response.text)}")
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield piece_of(json.loads(line.removeprefix("data: ")), self.url)
        except (httpx.HTTPError, ValueError) as error:
            raise FourfoldError(
                f"The connection to {self.url} broke ({type(error).__name__}: {error}). Look at the "
                "server's log and ask again."
            ) from error


def piece_of(event: dict[str, Any], url: str) -> str:
    """The text in one event. Raises FourfoldError when the event is an error."""
    if "error" in event:
        raise FourfoldError(f"{url} failed: {error_message(json.dumps(event))}")
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def error_message(text: str) -> str:
    """OpenAI's error message, or the text as it is, shortened."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text[:300]
