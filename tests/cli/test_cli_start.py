"""What a start waits for: text comes without importing what it does not need."""

import subprocess
import sys

HEAVY = ("transformers", "fastapi", "uvicorn", "huggingface_hub", "scipy", "jinja2", "rich", "gguf", "pandas")
ANSWER = """
import sys
from fourfold.engine import Engine, EngineConfig, SamplingParams
from fourfold.server.local import timed_generation

engine = Engine.load(sys.argv[1], EngineConfig(threads=1))
timed_generation(engine, "hi", SamplingParams(max_tokens=2, ignore_eos=True), show=str)
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_slow_imports_are_left_out(tiny_llama):
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(tiny_llama)], capture_output=True, text=True, check=True
    )
    assert "torch" in done.stdout.split()
    assert not set(HEAVY) & set(done.stdout.split())
