"""A model behind an OpenAI-compatible URL: its name, its card if it tells one, and its answers."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from pydantic import ValidationError

from fourfold.core.errors import FourfoldError
from fourfold.core.records import ModelCard

LONGEST_ANSWER_S = 600.0
CONTEXT_FULL = ("context_length", "context length", "maximum context", "too long")


class Endpoint:
    """One of the models of a server, by default its first. Raises FourfoldError when none answers."""

    def __init__(self, url: str, model: str | None = None, headers: dict[str, str] | None = None):
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.headers = headers or {}
        self.client = httpx.Client(timeout=httpx.Timeout(10.0, read=LONGEST_ANSWER_S), headers=headers)
        entries = self._models()
        names = [str(entry.get("id")) for entry in entries]
        if model is not None and model not in names:
            raise FourfoldError(f"{self.url} does not serve '{model}'; it serves: {', '.join(names)}.")
        entry = entries[names.index(model) if model else 0]
        self.model_name = str(entry.get("id"))
        self.card = _card(entry)
        longest = entry.get("max_model_len")
        self.max_positions = longest if isinstance(longest, int) and longest > 0 else None

    def complete(self, prompt: str, **fields: Any) -> list[str] | None:
        """The texts that follow ``prompt``, one per choice; None when it does not fit the model's context.

        ``fields`` are those of `POST /v1/completions`. Raises FourfoldError for any other refusal.
        """
        choices = self._ask("/v1/completions", {"prompt": prompt} | fields)
        return None if choices is None else [str(choice.get("text")) for choice in choices]

    def reply(self, question: str, **fields: Any) -> list[str] | None:
        """The answers to ``question`` in a chat, as ``complete`` gives texts."""
        messages = [{"role": "user", "content": question}]
        choices = self._ask("/v1/chat/completions", {"messages": messages} | fields)
        return (
            None if choices is None else [str(choice["message"].get("content") or "") for choice in choices]
        )

    def ask_all(
        self,
        ask: Callable[..., list[str] | None],
        prompts: Sequence[str],
        concurrency: int,
        done: Callable[[int], None],
        **fields: Any,
    ) -> list[list[str] | None]:
        """``complete`` or ``reply`` for every prompt, ``concurrency`` at a time; the first error ends it."""
        results: list[list[str] | None] = []
        with ThreadPoolExecutor(concurrency) as pool:
            futures = [pool.submit(ask, prompt, **fields) for prompt in prompts]
            try:
                for future in futures:
                    results.append(future.result())
                    done(len(results))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results

    def _ask(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The choices of an answer, in order; None when the model's context is too short."""
        try:
            response = self.client.post(self.url + path, json={"model": self.model_name} | body)
            if response.status_code == 400 and any(w in response.text.lower() for w in CONTEXT_FULL):
                return None
            if response.is_error:
                raise FourfoldError(
                    f"{self.url}{path} refused (HTTP {response.status_code}): {_said(response)}"
                )
            choices = {int(choice["index"]): choice for choice in response.json()["choices"]}
            return [choices[index] for index in range(body.get("n", 1))]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise FourfoldError(
                f"{self.url} broke off or gave no answer ({type(error).__name__}: {error}). Look at the "
                "server's log and run the same command again."
            ) from error

    def _models(self) -> list[dict[str, Any]]:
        try:
            response = self.client.get(f"{self.url}/v1/models")
            response.raise_for_status()
            entries = response.json()["data"]
            if not entries or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError("no model is listed")
            return entries
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise FourfoldError(
                f"No OpenAI-compatible server answers at {self.url} ({type(error).__name__}: {error}). "
                "Start one with `fourfold serve MODEL`, or give the address it printed."
            ) from error


def _card(entry: dict[str, Any]) -> ModelCard | None:
    """The card that a Fourfold server attaches; nothing is invented for other servers."""
    try:
        return ModelCard.model_validate(entry["fourfold"]) if "fourfold" in entry else None
    except ValidationError:
        return None


def _said(response: httpx.Response) -> str:
    """A server's error message in one line."""
    try:
        return str(response.json()["error"]["message"])[:300]
    except (ValueError, LookupError, TypeError):
        return " ".join(response.text.split())[:300]
