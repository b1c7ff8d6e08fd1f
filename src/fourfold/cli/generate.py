"""``fourfold generate``."""

from pathlib import Path
from typing import Annotated

import typer

from fourfold.cli.arithmetic import ArithmeticOption
from fourfold.cli.kv_cache import KVCacheOption, check_kv_cache
from fourfold.cli.speculation import ALONE, SpeculativeTokensOption
from fourfold.core.imports import importing


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, a GGUF file or a hub name.")],
    prompt: Annotated[str, typer.Option(help="The text to continue, as it is: no chat template.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=-(2**63), max=2**64 - 1, help="Equal seeds give equal texts.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")] = None,
    kv_cache: KVCacheOption = None,
    arithmetic: ArithmeticOption = None,
    speculative_tokens: SpeculativeTokensOption = ALONE,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write tokens, text and timings here.")
    ] = None,
) -> None:
    """Continue a text and print it as it comes.

    Example: `fourfold generate ./SmolLM2-mxfp4 --prompt "The capital of France is" --max-tokens 32`
    """
    with importing():
        from fourfold.cli.output import check_json_path, stderr, write_json
        from fourfold.engine import Engine, EngineConfig, SamplingParams
        from fourfold.server.local import timed_generation

    check_json_path(json_file)
    config = EngineConfig(
        threads=threads,
        max_batch_size=1,
        kv_cache=check_kv_cache(kv_cache),
        arithmetic=arithmetic or "auto",
        speculative_tokens=speculative_tokens,
    )
    engine = Engine.load(model, config)
    stderr.print(f"Computed: {engine.computed}", style="dim")
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    record = timed_generation(engine, prompt, sampling, show=lambda text: typer.echo(text, nl=False))
    typer.echo()
    write_json(json_file, record)
