"""The OpenAI-compatible HTTP server over one engine: ``launch.serve``; ``local`` is the engine without one.

Nothing is imported here, so that a terminal waits for no web framework.
"""
