"""The engines that are measured: which Python, which script, which of a model's files, with what settings."""

import json
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ENGINES = Path(__file__).parent / "engines"


@dataclass(frozen=True)
class Contender:
    """``bits`` is what its weights are held in; ``judge`` the folder with the same values in bfloat16."""

    name: str
    peer: str
    script: str
    file: str
    bits: float
    judge: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


REFERENCE = "transformers bf16"
OURS = "Fourfold MXFP4"
CONTENDERS = [
    Contender(OURS, "fourfold", "fourfold_embedded.py", "mxfp4", 4.25, "mxfp4-as-bf16"),
    Contender("llama.cpp MXFP4", "llamacpp", "llamacpp.py", "mxfp4.gguf", 4.25, "mxfp4.gguf-as-bf16"),
    Contender("llama.cpp Q4_0", "llamacpp", "llamacpp.py", "q4_0.gguf", 4.5, "q4_0.gguf-as-bf16"),
    Contender("vLLM bf16", "vllm", "vllm_cpu.py", "bf16", 16, "bf16"),
    Contender(
        "vLLM MXFP4 by fourfold[vllm]", "vllm", "vllm_cpu.py", "mxfp4-vllm", 4.25, "mxfp4-vllm-as-bf16"
    ),
    Contender(REFERENCE, "transformers", "transformers_bf16.py", "bf16", 16, "bf16"),
]


class Process:
    """One engine in its own Python. It is stopped (SIGSTOP) whenever it is not asked something, so that no
    engine's idle threads take the processor from another."""

    def __init__(self, contender: Contender, python: str, threads: int, log: IO[bytes]):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | contender.environment
        self.contender = contender
        self.popen = subprocess.Popen(
            [python, str(ENGINES / contender.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a command, wait for its answer."""
        assert self.popen.stdin is not None and self.popen.stdout is not None
        os.killpg(self.popen.pid, signal.SIGCONT)
        self.popen.stdin.write((json.dumps({"do": do} | arguments) + "\n").encode())
        self.popen.stdin.flush()
        line = self.popen.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.contender.name} ended with code {self.popen.wait()}; see its log.")
        os.killpg(self.popen.pid, signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
