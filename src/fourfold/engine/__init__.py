"""Requests to tokens: a model in memory, packed as its checkpoint is, continuing many prompts at once."""

from fourfold.engine.echo import echo
from fourfold.engine.engine import Engine
from fourfold.engine.requests import (
    Completion,
    EngineConfig,
    EngineStats,
    Request,
    SamplingParams,
    TokenOutput,
)
from fourfold.engine.tokenizer import TextStream, Tokenizer

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Request",
    "SamplingParams",
    "TextStream",
    "TokenOutput",
    "Tokenizer",
    "echo",
]
