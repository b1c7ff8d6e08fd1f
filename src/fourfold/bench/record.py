"""From finished requests to a RunRecord: every figure in it is computed from them."""

from fourfold.bench.client import Client
from fourfold.bench.endpoint import Endpoint
from fourfold.bench.metric import duration_s, error_rate, measure_all
from fourfold.bench.prompts import TokenRange
from fourfold.core.machine import describe_machine
from fourfold.core.records import RequestRecord, RunRecord, RunSettings

EXCLUDED_ABOVE = 0.10
BUSY_CLIENT = 0.5


def make_record(
    created: str,
    target: str,
    endpoint: Endpoint,
    settings: RunSettings,
    requests: list[RequestRecord],
    notes: list[str],
) -> RunRecord:
    """The record of finished requests: every figure in it is computed from them."""
    share = error_rate(requests)
    return RunRecord(
        created=created,
        target=target,
        model_name=endpoint.model_name,
        model=endpoint.card,
        settings=settings,
        machine=describe_machine(),
        duration_s=duration_s(requests),
        error_rate=share,
        excluded=share > EXCLUDED_ABOVE,
        metrics=measure_all(requests),
        requests=requests,
        notes=notes,
    )


def run_notes(client: Client, tokens: TokenRange, busy: float) -> list[str]:
    """What a reader must know of how a run was measured."""
    notes = [
        *client.endpoint.notes,
        f"Prompts are random token ids {tokens.low} to {tokens.high - 1}: {tokens.source}.",
    ]
    if client.estimated:
        notes.append(
            f"In {client.estimated} requests the server's token count differed from the chunks received; "
            "tokens between the first and the last chunk were spread evenly, so ITL is an estimate."
        )
    if client.uncounted:
        notes.append(
            f"{client.uncounted} requests came without a token count: each chunk was counted as one token."
        )
    if client.cached_tokens:
        notes.append(
            f"The server took {client.cached_tokens} prompt tokens from its cache: TTFT is flattered."
        )
    if busy > BUSY_CLIENT:
        notes.append(
            f"The client itself used {busy:.0%} of a core: high speeds may be its limit, not the server's."
        )
    return notes
