"""What cannot work says so, in words a person can act on."""

import json
import shutil

import pytest
import torch
from engine_models import continue_all, drain, greedy, load, prompt
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model

from fourfold.core.errors import FourfoldError, UsageError
from fourfold.engine import EngineConfig, Request, SamplingParams


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", ["mamba", "../llama", "registry"])
def test_unknown_architecture_is_named_with_the_known(folder, model_type):
    change_config(folder, model_type=model_type)
    with pytest.raises(UsageError, match=rf"'{model_type}'.*gemma2, .*llama, .*qwen3-moe"):
        load(folder)


def test_a_config_without_architecture(folder):
    change_config(folder, model_type=None)
    with pytest.raises(FourfoldError, match="model_type"):
        load(folder)


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "rms_norm_eps"])
def test_a_missing_size_is_named(folder, key):
    change_config(folder, **{key: None})
    with pytest.raises(FourfoldError, match=key):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "many"}, "many"),
        ({"num_hidden_layers": 1e999}, "infinity"),
        ({"num_attention_heads": 0}, "heads is 0"),
        ({"num_attention_heads": 0, "head_dim": None}, "zero"),
        ({"num_hidden_layers": 0}, "layers is 0"),
        ({"hidden_size": -64}, "hidden is -64"),
        ({"max_position_embeddings": 0}, "max_positions is 0"),
        ({"head_dim": 31}, "even"),
        ({"rms_norm_eps": -1}, "eps is -1"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 3}, "3 key heads"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ],
)
def test_a_config_beyond_the_engine(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(FourfoldError, match=message):
        load(folder)


def test_a_context_beyond_all_memory_costs_nothing(folder):
    expected = continue_all(load(folder), [prompt(9)], greedy(5))
    change_config(folder, max_position_embeddings=10**12)
    assert continue_all(load(folder, kv_cache_tokens=64), [prompt(9)], greedy(5)) == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_a_weight_that_is_no_plain_float_is_refused(folder, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    said = str(dtype).removeprefix("torch.")
    with pytest.raises(FourfoldError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight.*{said}.*bfloat16"):
        load(folder)


def test_a_missing_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(FourfoldError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_a_wrong_shape_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    with pytest.raises(FourfoldError, match=r"model\.norm\.weight.*\[32\].*\[64\]"):
        load(folder)


def test_a_missing_tokenizer_has_a_remedy(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FourfoldError, match=r"[Cc]opy the tokenizer"):
        load(folder)


def test_a_broken_tokenizer_has_a_remedy(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(FourfoldError, match=r"[Cc]opy the tokenizer"):
        load(folder)


def test_no_chat_template_is_a_usage_error(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    tokenizer = load(folder).tokenizer
    assert not tokenizer.has_chat_template
    with pytest.raises(UsageError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_mistral_config_without_a_word_of_windows_has_one(tmp_path):
    folder = build_tiny_model(tmp_path / "silent", "mistral", max_position_embeddings=8192)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("sliding_window") == 4096  # what transformers takes when nothing is said
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).model.layers[0].attention.scoring.window == 4096


def test_a_request_that_can_never_fit_is_refused_and_the_rest_goes_on(tiny_llama):
    engine = load(tiny_llama, kv_cache_tokens=64)
    engine.add(Request("fits", prompt(4), greedy(5)))
    with pytest.raises(UsageError, match=r"kv_cache_tokens"):
        engine.add(Request("large", prompt(60), greedy(30)))
    assert len(drain(engine)) == 5


def test_the_largest_request_that_fits_does(tiny_llama):
    engine = load(tiny_llama, kv_cache_tokens=64)
    assert len(continue_all(engine, [prompt(40)], greedy(24))[0]) == 24
    assert len(continue_all(engine, [prompt(40)], greedy(None))[0]) == 24


def test_the_context_ends_the_longest_request(tiny_llama):
    engine = load(tiny_llama)
    done = engine.generate([prompt(500)], greedy(100))[0]
    assert done.finish_reason == "length" and len(done.token_ids) == 12
    assert engine.max_positions == engine.max_request_tokens == 512


@pytest.mark.parametrize(
    ("tokens", "message"), [([], "no tokens"), ([-1], "-1"), ([3, 256], "0 to 255"), ([5] * 512, "positions")]
)
def test_unusable_prompts(tiny_llama, tokens, message):
    with pytest.raises(UsageError, match=message):
        load(tiny_llama).add(Request("x", tokens))


def test_an_id_in_use(tiny_llama):
    engine = load(tiny_llama)
    engine.add(Request("x", [5]))
    with pytest.raises(UsageError, match="'x'"):
        engine.add(Request("x", [5]))
    with pytest.raises(UsageError, match="idle"):
        engine.generate([[5]])


def test_a_failed_generate_leaves_nothing_behind(tiny_llama):
    engine = load(tiny_llama)
    with pytest.raises(UsageError):
        engine.generate([[5], []])
    assert not engine.has_work and engine.stats.kv_tokens_used == 0


def test_too_few_sampling_params(tiny_llama):
    with pytest.raises(UsageError, match="2 prompts but 1"):
        load(tiny_llama).generate([[5], [6]], [greedy(1)])


def test_a_step_that_raised_can_be_repeated(tiny_llama, monkeypatch):
    expected = continue_all(load(tiny_llama), [prompt(9), prompt(5)], greedy(6, presence_penalty=1.5))
    engine = load(tiny_llama)
    for i, tokens in enumerate((prompt(9), prompt(5))):
        engine.add(Request(str(i), tokens, greedy(6, presence_penalty=1.5, logprobs=2)))
    outputs = engine.step() + engine.step()
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("fourfold.engine.sampling.logprobs_all", failing)
        engine.step()
    outputs += drain(engine)
    for i, tokens in enumerate(expected):
        assert [output.token_id for output in outputs if output.request_id == str(i)] == tokens


def failing(*_, **__):
    raise MemoryError


@pytest.mark.parametrize("tokens", [[], [5] * 513, [999]])
def test_logits_of_unusable_sequences(tiny_llama, tokens):
    with pytest.raises(UsageError):
        load(tiny_llama).logits(tokens)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"stop": [""]},
        {"max_tokens": 0},
        {"stop_token_ids": [-1]},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"x": 1},
    ],
)
def test_sampling_out_of_range(values):
    with pytest.raises(ValidationError):
        SamplingParams(**values)


def test_a_step_must_hold_every_decode():
    with pytest.raises(ValidationError, match="max_batch_size"):
        EngineConfig(max_batch_tokens=4, max_batch_size=8)


def test_a_cache_of_less_than_a_block(tiny_llama):
    with pytest.raises(FourfoldError, match="block"):
        load(tiny_llama, kv_cache_tokens=8)


def test_a_seed_too_large_for_the_command_is_misuse():
    from typer.testing import CliRunner

    from fourfold.cli.main import app

    result = CliRunner().invoke(app, ["generate", "model", "--prompt", "x", "--seed", str(2**64)])
    assert result.exit_code == 2 and str(2**64 - 1) in result.output
