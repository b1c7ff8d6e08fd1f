"""Round a bfloat16 GGUF as llama.cpp itself does: MODEL/{q4_0,mxfp4}.gguf, every matrix in the one type.

Also the head and the embedding: that is the fastest of llama.cpp's choices (its default holds the head in
Q6_K or Q8_0, which is read for every token). llama.cpp has no file type for dense MXFP4 (MXFP4_MOE means
experts), so the file type is Q4_0 and a tensor override names the type of each."""

import ctypes
import sys
from pathlib import Path

import llama_cpp as lib

TYPES = {
    "q4_0": lib.GGML_TYPE_Q4_0,
    "mxfp4": 39,
}  # GGML_TYPE_MXFP4 of ggml.h, which the binding does not name


def quantize(source: Path, out: Path, kind: int) -> None:
    """Every matrix of ``source`` in ``kind``."""
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = lib.LLAMA_FTYPE_MOSTLY_Q4_0, 2
    overrides = (lib.llama_model_tensor_override * 2)()
    overrides[0].pattern, overrides[0].type = b".*", kind
    params.tt_overrides = overrides
    partial = out.with_suffix(".partial")
    if lib.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not make {out}")
    partial.rename(out)


def main() -> None:
    """Both files, beside the source, unless they were made before."""
    source = Path(sys.argv[1])
    for name, kind in TYPES.items():
        out = source.with_name(f"{name}.gguf")
        if not out.exists():
            quantize(source, out, kind)


if __name__ == "__main__":
    main()
