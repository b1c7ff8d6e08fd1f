"""The OpenAI-compatible HTTP server over one engine."""

from fourfold.server.app import create_app
from fourfold.server.launch import serve
from fourfold.server.loop import EngineLoop

__all__ = ["EngineLoop", "create_app", "serve"]
