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
        body = self.endpoint.body(list(prompt), output_tokens)
        request = self.http.build_request("POST", "/v1/completions", json=body)
        reading, error = StreamReading(), None
        clock, zero_s = time.perf_counter, self.zero_s
        start_s = clock() - zero_s
        try:
            response = await self._send(request)
            try:
                if response.status_code == 200:
                    async for data in response.aiter_raw():
                        reading.feed(data, clock() - zero_s)
                else:
                    await response.aread()
                    error = f"HTTP {response.status_code}: {refusal(response)}"
            finally:
                await response.aclose()
        except httpx.HTTPError as failure:
            error = f"{type(failure).__name__}: {failure}".rstrip(": ")
        end_s = clock() - zero_s
        return self._record(request_id, len(prompt), output_tokens, start_s, end_s, reading, error)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        """Send once more when the server closed a kept connection just as it was used: no byte was answered.

        llama.cpp's server does so; the lost time counts, as it would for its users.
        """
        try:
            return await self.http.send(request, stream=True)
        except httpx.RemoteProtocolError:
            return await self.http.send(request, stream=True)

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
