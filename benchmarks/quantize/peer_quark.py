"""Quark's way: file-to-file quantization with weight-only OCP MXFP4. Runs in its own venv.

python peer_quark.py MODEL OUT
"""

import sys

from quark.torch import ModelQuantizer
from quark.torch.quantization.config.config import OCP_MXFP4Spec, QConfig, QLayerConfig


def main() -> None:
    """Quantize MODEL into OUT; only the linear layers of the decoder, as the other two do."""
    model, out = sys.argv[1:]
    weight = OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False).to_quantization_spec()
    config = QConfig(
        global_quant_config=QLayerConfig(weight=weight), exclude=["lm_head", "*embed_tokens*", "*norm*"]
    )
    ModelQuantizer(config).direct_quantize_checkpoint(
        pretrained_model_path=model, save_path=out, device="cpu"
    )


if __name__ == "__main__":
    main()
