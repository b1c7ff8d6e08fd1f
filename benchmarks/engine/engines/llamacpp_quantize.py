"""Round a bfloat16 GGUF as llama.cpp itself does: MODEL/{q4_0,mxfp4}.gguf and the same with a head in Q8_0.

``pure`` holds every matrix in the one type, also the head and the embedding. llama.cpp has no file type for
dense MXFP4 (MXFP4_MOE means experts), so there the file type is Q4_0 and a tensor override names the type of
each."""

import ctypes
import sys
from pathlib import Path

import llama_cpp as lib

Q4_0, Q8_0, MXFP4 = lib.GGML_TYPE_Q4_0, lib.GGML_TYPE_Q8_0, 39  # ggml.h
FILE_TYPE_Q4_0 = lib.LLAMA_FTYPE_MOSTLY_Q4_0


def quantize(source: Path, out: Path, kind: int, head: int) -> None:
    """Every matrix in ``kind``, ``output.weight`` in ``head``, the embedding in ``kind``."""
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = FILE_TYPE_Q4_0, 2, False
    patterns = [(b"^output\\.weight$", head), (b".*", kind)]
    overrides = (lib.llama_model_tensor_override * 3)()
    for place, (pattern, wanted) in enumerate(patterns):
        overrides[place].pattern, overrides[place].type = pattern, wanted
    params.tt_overrides = overrides
    partial = out.with_suffix(".partial")
    if lib.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not make {out}")
    partial.rename(out)


def main() -> None:
    """The four files, beside the source."""
    source = Path(sys.argv[1])
    for name, kind in (("q4_0", Q4_0), ("mxfp4", MXFP4)):
        for suffix, head in (("", kind), ("-head8", Q8_0)):
            out = source.with_name(f"{name}{suffix}.gguf")
            if not out.exists():
                quantize(source, out, kind, head)


if __name__ == "__main__":
    main()
