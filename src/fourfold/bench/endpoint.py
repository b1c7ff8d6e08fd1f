"""What a server says about itself, and which optional request fields it takes.

Both are learnt once, before anything is measured, with the fewest assumptions: `/v1/models` for the name,
the card, the vocabulary and the longest sequence, and one tiny streamed completion for the fields. Servers
differ: vLLM and SGLang take all of them; llama.cpp ignores what it does not know; strict servers answer 400
or 422, and then the field they name goes, else the next in the ladder.
"""

from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import ValidationError

from fourfold.bench.stream import StreamReading, error_text
from fourfold.core.errors import FourfoldError
from fourfold.core.records import ModelCard

OPTIONAL_FIELDS = (
    "continuous_usage_stats",
    "stream_options",
    "timings_per_token",
    "min_tokens",
    "ignore_eos",
)
"""In the order in which they are given up when a refusal names none of them."""

CONSEQUENCES = {
    "continuous_usage_stats": "tokens per chunk are taken from the final count",
    "stream_options": "token counts of the server may be missing",
    "timings_per_token": "tokens per chunk are taken from the final count",
    "min_tokens": "the length of answers rests on ignore_eos",
    "ignore_eos": "answers may end early, which counts as an error",
}


@dataclass(frozen=True)
class Endpoint:
    """A model behind a URL, and how to ask it."""

    base_url: str
    model_name: str
    card: ModelCard | None = None
    vocabulary: int | None = None
    max_positions: int | None = None
    fields: frozenset[str] = frozenset(OPTIONAL_FIELDS) - {"timings_per_token"}
    notes: list[str] = field(default_factory=list)

    def body(self, prompt: list[int], output_tokens: int) -> dict[str, Any]:
        """A request for exactly ``output_tokens`` greedy tokens after ``prompt``, streamed."""
        body: dict[str, Any] = {"model": self.model_name, "prompt": prompt, "max_tokens": output_tokens}
        body |= {"temperature": 0, "stream": True}
        if "stream_options" in self.fields:
            body["stream_options"] = {"include_usage": True}
            if "continuous_usage_stats" in self.fields:
                body["stream_options"]["continuous_usage_stats"] = True
        if "min_tokens" in self.fields:
            body["min_tokens"] = output_tokens
        return body | {name: True for name in ("ignore_eos", "timings_per_token") if name in self.fields}


async def discover(http: httpx.AsyncClient, base_url: str, model: str | None) -> Endpoint:
    """Ask the server who it is and settle the request fields. Raises FourfoldError when it cannot be used."""
    endpoint = read_models(base_url, await list_models(http), model)
    return await settle_fields(http, endpoint)


async def list_models(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The entries of `/v1/models`. Raises FourfoldError when the server does not list any."""
    try:
        response = await http.get("/v1/models")
    except httpx.HTTPError as error:
        raise FourfoldError(
            f"{http.base_url} does not answer ({error or type(error).__name__}). Is the server "
            "running, and is the URL right?"
        ) from error
    try:
        entries = response.json()["data"] if response.status_code == 200 else None
    except (ValueError, KeyError, TypeError):
        entries = None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise FourfoldError(
            f"{http.base_url}v1/models lists no model (HTTP {response.status_code}). The target must be the "
            "base URL of an OpenAI-compatible server, such as http://localhost:8000."
        )
    return entries


def read_models(base_url: str, entries: list[dict[str, Any]], model: str | None) -> Endpoint:
    """The endpoint for ``model``, or for the first model listed. Raises FourfoldError for an unknown name."""
    names = [str(entry.get("id")) for entry in entries]
    if model is not None and model not in names:
        raise FourfoldError(f"{base_url} does not serve '{model}'; it serves: {', '.join(names)}.")
    entry = entries[names.index(model) if model else 0]
    meta = entry.get("meta") or {}
    card, notes = read_card(entry)
    fields = set(Endpoint.fields)
    if entry.get("owned_by") == "llamacpp":
        fields.add("timings_per_token")
    return Endpoint(
        base_url=base_url,
        model_name=str(entry.get("id")),
        card=card,
        vocabulary=whole(entry.get("vocab_size")) or whole(meta.get("n_vocab")),
        max_positions=whole(entry.get("max_model_len")) or whole(meta.get("n_ctx")),
        fields=frozenset(fields),
        notes=notes,
    )


def whole(value: Any) -> int | None:
    """``value`` when it is a positive whole number; servers may send anything."""
    return value if isinstance(value, int) and value > 0 else None


def read_card(entry: dict[str, Any]) -> tuple[ModelCard | None, list[str]]:
    """The model card a Fourfold server attaches, or None; nothing is invented for other servers."""
    if "fourfold" not in entry:
        return None, []
    try:
        return ModelCard.model_validate(entry["fourfold"]), []
    except ValidationError as error:
        return None, [
            f"The server's model card is of another version and was not used: {error.errors()[0]['msg']}."
        ]


async def settle_fields(http: httpx.AsyncClient, endpoint: Endpoint) -> Endpoint:
    """Send a two-token completion, giving up one optional field per refusal until it is accepted."""
    fields, notes = set(endpoint.fields), list(endpoint.notes)
    while True:
        trial = Endpoint(**(vars(endpoint) | {"fields": frozenset(fields), "notes": notes}))
        try:
            response = await http.post("/v1/completions", json=trial.body([32, 33, 34, 35], 2))
        except httpx.HTTPError as error:
            raise FourfoldError(f"{endpoint.base_url} broke off a test request: {error!r}.") from error
        if response.status_code == 200:
            return trial if "stream_options" in fields else note_missing_usage(trial, response.content)
        reason = refusal(response)
        if response.status_code not in (400, 422) or not fields:
            raise FourfoldError(
                f"{endpoint.base_url}/v1/completions refuses a plain request of four token ids for "
                f"'{endpoint.model_name}': HTTP {response.status_code}, {reason}."
            )
        given_up = field_to_give_up(fields, reason)
        fields.discard(given_up)
        notes.append(f"The server refused {given_up}: {CONSEQUENCES[given_up]}.")


def field_to_give_up(fields: set[str], reason: str) -> str:
    """The field that a refusal names, else the first one left in the ladder."""
    left = [name for name in OPTIONAL_FIELDS if name in fields]
    return next((name for name in left if name in reason), left[0])


def note_missing_usage(endpoint: Endpoint, stream: bytes) -> Endpoint:
    """Say so when a server that refused ``stream_options`` sends no counts on its own either."""
    reading = StreamReading()
    reading.feed(stream, 0.0)
    if reading.completion_tokens is None:
        endpoint.notes.append("The server reports no token counts: each chunk was counted as one token.")
    return endpoint


def refusal(response: httpx.Response) -> str:
    """What a server says when it refuses, in one line."""
    try:
        return error_text(response.json())[:300]
    except ValueError:
        return response.text[:300].strip() or response.reason_phrase
