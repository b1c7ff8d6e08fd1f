"""One request, from sending to the last byte, as a RequestRecord."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from fourfold.bench.endpoint import Endpoint, refusal
from fourfold.bench.stream import StreamReading
from fourfold.core.records import RequestRecord


@dataclass
class Client:
    """Sends completions to an endpoint; ``zero_s`` is the run's start on ``time.perf_counter``'s clock.

    ``http`` has the transport of ``open_http``, which calls while bytes arrive.
    ``estimated`` and ``cached_tokens`` collect what the notes of a run must mention.
    """

    http: httpx.AsyncClient
    endpoint: Endpoint
    zero_s: float = 0.0
    estimated: int = 0
    uncounted: int = 0
    cached_tokens: int = 0

    async def complete(self, request_id: str, prompt: Sequence[int], output_tokens: int) -> RequestRecord:
        """Send one request and read its stream; whatever goes wrong is the record's ``error``."""
        reading, error = StreamReading(), None
        clock, zero_s = time.perf_counter, self.zero_s
        request = self.http.build_request(
            "POST",
            "/v1/completions",
            json=self.endpoint.body(list(prompt), output_tokens),
            extensions={"on_data": lambda data, at_s: reading.feed(data, at_s - zero_s)},
        )
        start_s = clock() - zero_s
        try:
            response = await self.http.send(request)
            if response.status_code != 200:
                error = f"HTTP {response.status_code}: {refusal(response)}"
        except httpx.HTTPError as failure:
            error = f"{type(failure).__name__}: {failure}".rstrip(": ")
        end_s = clock() - zero_s
        return self._record(request_id, len(prompt), output_tokens, start_s, end_s, reading, error)

    def _record(
        self,
        request_id: str,
        prompt_tokens: int,
        output_tokens: int,
        start_s: float,
        end_s: float,
        reading: StreamReading,
        error: str | None,
    ) -> RequestRecord:
        times_s = reading.token_times_s()
        self.estimated += reading.estimated
        self.uncounted += error is None and reading.completion_tokens is None
        self.cached_tokens += reading.cached_tokens
        read = prompt_tokens if reading.prompt_tokens is None else reading.prompt_tokens
        return RequestRecord(
            request_id=request_id,
            prompt_tokens=read,
            output_tokens=len(times_s),
            start_s=start_s,
            token_times_s=times_s,
            end_s=end_s,
            error=error or reading.error or mismatch(prompt_tokens, read, output_tokens, len(times_s)),
        )


def mismatch(asked_in: int, read: int, asked_out: int, written: int) -> str | None:
    """The error of a request whose token counts are not those asked for, else None."""
    if read != asked_in:
        return f"sent {asked_in} prompt tokens, the server counted {read}"
    if written != asked_out:
        return f"asked for {asked_out} output tokens, got {written}"
    return None
