"""``fourfold serve``."""

from typing import Annotated

import typer

from fourfold.cli.arithmetic import ArithmeticOption
from fourfold.cli.kv_cache import KVCacheOption, check_kv_cache
from fourfold.cli.speculation import SpeculativeTokensOption
from fourfold.core.imports import importing


def serve(
    model: Annotated[str, typer.Argument(help="A model folder, a GGUF file or a hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 8000,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(min=1, help="Requests that decode together.")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens the KV cache holds.")] = None,
    kv_cache: KVCacheOption = None,
    arithmetic: ArithmeticOption = None,
    speculative_tokens: SpeculativeTokensOption = 0,
) -> None:
    """Serve a model with the OpenAI API until Ctrl-C.

    Example: `fourfold serve ./SmolLM2-mxfp4 --port 8000`
    """
    with importing():
        from pydantic import ValidationError

        from fourfold.core.errors import UsageError
        from fourfold.engine import EngineConfig
        from fourfold.server.launch import serve as run

    options = {"threads": threads, "max_batch_size": max_batch_size, "kv_cache_tokens": kv_cache_tokens}
    options |= {"kv_cache": check_kv_cache(kv_cache), "arithmetic": arithmetic}
    options |= {"speculative_tokens": speculative_tokens}
    try:
        config = EngineConfig.model_validate({name: v for name, v in options.items() if v is not None})
    except ValidationError as error:
        raise UsageError(f"These options do not go together: {error.errors()[0]['msg']}.") from error
    run(model, host, port, config)
