"""A folder of results as two calls of bench and one of evaluate leave it."""

from pathlib import Path

import pytest
from report_records import BASE, QUANTIZED, evaluation, requests, run_record, write


@pytest.fixture
def results(tmp_path) -> Path:
    """A base and a quantized model: faster at one user, slower at four, one run excluded."""
    folder = tmp_path / "results"
    write(folder / "base" / "chat-c1.json", run_record(BASE, requests(0.20, 0.040)))
    write(folder / "base" / "chat-c4.json", run_record(BASE, requests(0.40, 0.050), concurrency=4))
    write(folder / "base" / "chat-c8.json", run_record(BASE, requests(0.50, 0.060), concurrency=8))
    write(folder / "mxfp4" / "chat-c1.json", run_record(QUANTIZED, requests(0.22, 0.020)))
    write(folder / "mxfp4" / "chat-c4.json", run_record(QUANTIZED, requests(0.30, 0.075), concurrency=4))
    write(
        folder / "mxfp4" / "chat-c8.json",
        run_record(QUANTIZED, requests(0.1, 0.01, failing=2), concurrency=8),
    )
    write(folder / "mxfp4" / "quality.json", evaluation())
    return folder
