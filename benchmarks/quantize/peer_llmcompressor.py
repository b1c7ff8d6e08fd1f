"""llm-compressor's way: `model_free_ptq` with MXFP4 weights and 16-bit activations. Runs in its own venv.

python peer_llmcompressor.py MODEL OUT
"""

import sys

from llmcompressor import model_free_ptq


def main() -> None:
    """Quantize MODEL into OUT; only the linear layers of the decoder, as the other two do."""
    model, out = sys.argv[1:]
    model_free_ptq(
        model_stub=model,
        save_directory=out,
        scheme="MXFP4A16",
        ignore=["lm_head", "re:.*embed_tokens$"],
        max_workers=2,
        device="cpu",
    )


if __name__ == "__main__":
    main()
