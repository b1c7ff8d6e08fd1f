"""``fourfold evaluate``: is the model still good, and does it keep its gates?"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fourfold.cli import evaluate_options as options
from fourfold.cli.arithmetic import ArithmeticOption
from fourfold.cli.kv_cache import KVCacheOption, check_kv_cache

if TYPE_CHECKING:
    from fourfold.core.records import EvaluationRecord, LayerPicture, ScoresRecord
    from fourfold.engine import Engine


def evaluate(
    model: options.Model,
    task: options.TaskName = "heldout",
    against: options.Against = None,
    text: options.Text = None,
    gate: options.GateOption = None,
    window_tokens: options.WindowTokens = None,
    max_tokens_per_text: options.MaxTokens = None,
    layers: options.Layers = False,
    kv_cache: KVCacheOption = None,
    arithmetic: ArithmeticOption = None,
    questions: options.Questions = None,
    samples: options.Samples = None,
    chat: options.Chat = False,
    temperature: options.Temperature = None,
    max_tokens: options.AnswerTokens = None,
    seed: options.Seed = None,
    concurrency: options.Concurrency = None,
    tokenizer: options.Tokenizer = None,
    include: options.Include = None,
    model_name: options.ServedModel = None,
    api_key_env: options.ApiKey = None,
    threads: options.Threads = None,
    json: options.Json = None,
) -> None:
    """Perplexity with a 95 % interval, closeness to the model it was made from, and tasks.

    Example: `fourfold evaluate my-mxfp4 --against my-model --gate kl_divergence=0.05 --json quality.json`
    """
    from fourfold.cli.evaluate_tables import show, show_scores
    from fourfold.cli.output import check_json_path, write_json
    from fourfold.core.records import EvaluationRecord
    from fourfold.evaluate import ServedTask, get_task

    check_json_path(json)
    reading = {"against": against, "text": text, "window_tokens": window_tokens, "layers": layers}
    reading |= {"max_tokens_per_text": max_tokens_per_text}
    asking = {"questions": questions, "samples": samples, "temperature": temperature, "chat": chat}
    asking |= {"max_tokens": max_tokens, "seed": seed, "concurrency": concurrency}
    asking |= {"tokenizer": tokenizer, "include": include}
    server = {"model_name": model_name, "api_key_env": api_key_env}
    engine = {"threads": threads, "kv_cache": kv_cache, "arithmetic": arithmetic}
    if isinstance(get_task(task.partition(":")[0]), ServedTask):
        options.refuse(task, reading, "it asks a served model and reads no texts")
        record = ask(model, task, gate or [], asking, server, engine, json)
    else:
        options.refuse(task, asking | server, "it reads texts with the model in memory and asks nothing")
        record = read(model, task, gate or [], reading, engine)
    write_json(json, record)
    show(record) if isinstance(record, EvaluationRecord) else show_scores(record)
    if not all(result.passed for result in record.gates):
        raise typer.Exit(1)


def read(
    model: str, task: str, gate: list[str], reading: dict[str, Any], engine_options: dict[str, Any]
) -> "EvaluationRecord":
    """Load the model and its base, and let them read."""
    from fourfold.bench.target import is_url
    from fourfold.cli.output import progress_bar
    from fourfold.core.errors import UsageError
    from fourfold.engine import Engine, EngineConfig
    from fourfold.evaluate import Task, default_texts, get_task, parse_gates, read_texts
    from fourfold.evaluate import evaluate as measure

    against, chosen = reading["against"], get_task(task)
    assert isinstance(chosen, Task)
    if ":" in task or any(is_url(m) for m in (model, against) if m):
        raise UsageError(f"The task '{task}' reads a model's logits: name model folders, not a server.")
    if reading["layers"] and against is None:
        raise UsageError("--layers compares with a base layer by layer: add --against BASE.")
    gates = parse_gates(gate, against is not None, chosen.gates)
    texts = read_texts(reading["text"]) if reading["text"] else default_texts()
    # logits of whole windows go past the paged cache, so that one block of it is enough
    plain = EngineConfig(
        threads=engine_options["threads"],
        kv_block_size=16,
        kv_cache_tokens=16,
        arithmetic=engine_options["arithmetic"] or "auto",  # of the base too: exact keeps its float16
    )
    own = plain.model_copy(update={"kv_cache": check_kv_cache(engine_options["kv_cache"])})
    engine = Engine.load(model, own)
    base = None if against is None else Engine.load(against, plain)
    given = reading["max_tokens_per_text"]
    with progress_bar("windows") as progress:
        record = measure(
            engine,
            base,
            texts,
            task=task,
            window_tokens=reading["window_tokens"],
            max_tokens_per_text=chosen.max_tokens_per_text if given is None else given or None,
            gates=gates,
            progress=progress,
        )
    record = record.model_copy(update={"computed": engine.computed})
    if base is None or against is None or not reading["layers"]:
        return record
    return record.model_copy(update={"layers": look_inside(engine, base, texts, model, against)})


def look_inside(
    engine: "Engine", base: "Engine", texts: dict[str, str], model: str, against: str
) -> "LayerPicture":
    """The picture of layers and linears."""
    from fourfold.checkpoint import open_checkpoint
    from fourfold.cli.output import progress_bar
    from fourfold.evaluate import layer_picture, linear_errors

    with progress_bar("layers") as progress:
        picture = layer_picture(engine, base, texts, progress=progress)
    with progress_bar("weights") as progress:
        linears, notes = linear_errors(open_checkpoint(model), open_checkpoint(against), progress)
    return picture.model_copy(update={"linears": linears, "notes": notes})


def ask(
    target: str,
    task: str,
    gate: list[str],
    asking: dict[str, Any],
    server: dict[str, Any],
    engine_options: dict[str, Any],
    json: Path | None,
) -> "ScoresRecord":
    """Ask the server behind a URL, or serve the model for as long as it takes."""
    from pydantic import ValidationError

    from fourfold.bench.target import is_url, public_target, serving
    from fourfold.cli.bench import bearer
    from fourfold.cli.evaluate_tables import show_scores
    from fourfold.cli.output import progress_bar, write_json
    from fourfold.core.errors import UsageError
    from fourfold.evaluate import ServedOptions, check_served, evaluate_served, parse_score_gates

    gates = parse_score_gates(gate)
    try:
        asked = ServedOptions(**{name: value for name, value in asking.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{'-'.join(map(str, first['loc']))}: {first['msg']}.") from error
    check_served(task, asked, gates)
    if is_url(target):
        options.refuse(task, engine_options, "the server is running already")
    elif asked.tokenizer is None and (Path(target) / "tokenizer.json").is_file():
        asked = asked.model_copy(update={"tokenizer": target})
    chosen = {name: value for name, value in engine_options.items() if value is not None}
    words = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    headers = bearer(server["api_key_env"])
    with serving(target, words) as url, progress_bar("questions") as progress:
        record = evaluate_served(
            url,
            task=task,
            options=asked,
            model=server["model_name"],
            target=public_target(target),
            headers=headers,
            progress=progress,
        )
    record = record.model_copy(update={"settings": record.settings | chosen})
    try:
        return record.model_copy(update={"gates": [gate.judge_score(record.scores) for gate in gates]})
    except UsageError:  # a gate names a score that is not there: what was measured stays
        write_json(json, record)
        show_scores(record)
        raise
