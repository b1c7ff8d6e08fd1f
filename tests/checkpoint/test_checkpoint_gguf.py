"""GGUF files: a tiny one made by the gguf package, read by transformers and by us."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from fourfold.checkpoint import open_checkpoint
from fourfold.checkpoint.convert import convert
from fourfold.checkpoint.gguf.rope import llama3_parameters
from fourfold.core.errors import FourfoldError

HIDDEN, WIDTH, HEADS, KV_HEADS, VOCABULARY, LAYERS = 64, 96, 4, 2, 40, 2
# transformers 5.23 does not read the width of heads for qwen3 and takes its default
# nor by what gemma3's queries are scaled, nor how wide the experts of qwen3moe are
HEADS_OF = {"llama": 16, "qwen3": 128, "gemma3": 256}
EXPERTS, EXPERT_WIDTH = 4, 768
Q4_1, Q8_0, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F32"))


DENSE = ("ffn_gate", "ffn_up", "ffn_down")


def layer_shapes(architecture: str, experts: bool) -> dict[str, tuple[int, ...]]:
    head = HEADS_OF.get(architecture, 16)
    shapes = {
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "attn_q": (HEADS * head, HIDDEN),
        "attn_k": (KV_HEADS * head, HIDDEN),
        "attn_v": (KV_HEADS * head, HIDDEN),
        "attn_output": (HIDDEN, HEADS * head),
        "ffn_gate": (WIDTH, HIDDEN),
        "ffn_up": (WIDTH, HIDDEN),
        "ffn_down": (HIDDEN, WIDTH),
    }
    if architecture == "qwen2":
        shapes |= {f"{name}.bias": shapes[name][:1] for name in ("attn_q", "attn_k", "attn_v")}
    if experts:
        shapes |= {f"ffn_{name}_exps": (EXPERTS, EXPERT_WIDTH, HIDDEN) for name in ("gate", "up")}
        shapes |= {"ffn_down_exps": (EXPERTS, HIDDEN, EXPERT_WIDTH), "ffn_gate_inp": (EXPERTS, HIDDEN)}
        shapes = {name: shape for name, shape in shapes.items() if name not in DENSE}
    if architecture in ("qwen3", "qwen3moe", "gemma3"):
        shapes |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
    if architecture == "gemma3":
        shapes |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
    return shapes


def write_gguf(
    path: Path,
    architecture: str = "llama",
    tied: bool = True,
    numbers: dict[str, object] | None = None,
    divisors: np.ndarray | None = None,
    experts: bool = False,
    **metadata,
) -> Path:
    """Random weights in Q4_1, embeddings in Q8_0, norms in F32, and a vocabulary of letters.

    ``numbers`` replaces integers of the metadata, ``divisors`` becomes rope_freqs.weight.
    """
    writer, head = gguf.GGUFWriter(path, architecture), HEADS_OF.get(architecture, 16)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(EXPERT_WIDTH if experts else WIDTH)
    if experts:
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    add_tokenizer(writer)
    if architecture == "gemma3":
        writer.add_sliding_window(8)
    for key, value in (numbers or {}).items():
        kind = gguf.GGUFValueType.ARRAY if isinstance(value, list) else gguf.GGUFValueType.UINT32
        writer.kv_data[0][f"{architecture}.{key}"] = gguf.GGUFValue(value, kind)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    random = np.random.default_rng(7)
    shapes = {
        f"blk.{i}.{n}": s for i in range(LAYERS) for n, s in layer_shapes(architecture, experts).items()
    }
    shapes |= {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {} if tied else {"output": (VOCABULARY, HIDDEN)}
    for name, shape in shapes.items():
        kind = F32 if len(shape) == 1 else Q8_0 if name == "token_embd" else Q4_1
        values = random.standard_normal(shape).astype(np.float32) * 0.1 + (len(shape) == 1)
        name += "" if name.endswith(".bias") else ".weight"
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = ["<|bos|>", "<|eos|>", *(chr(ord("a") + i) for i in range(26)), "ab", "cd"]
    tokens += [f"<{i}>" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (VOCABULARY - 2))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def peers_model(path: Path):
    from transformers import AutoModelForCausalLM, GgufConfig

    expanded = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=expanded
    ).eval()


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        ("llama", True),
        ("llama", False),
        ("qwen2", False),
        ("qwen3", True),
        ("qwen3moe", False),
        ("gemma3", True),
    ],
)
def test_the_model_is_the_one_that_transformers_reads(tmp_path, architecture, tied):
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "tiny.gguf", architecture, tied, experts=architecture == "qwen3moe")
    theirs = peers_model(path)
    convert(path, tmp_path / "plain", "plain")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    rounded = {name: value.bfloat16().float() for name, value in theirs.state_dict().items()}
    assert set(ours.state_dict()) == set(rounded)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, rounded[name]), name
    theirs.load_state_dict(rounded)
    with torch.no_grad():
        tokens = torch.arange(2, 30)[None]
        # the same weights to the bit through the same code: nothing may differ
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)


def test_experts_of_a_mixtral_are_cut_from_their_stacks(tmp_path):
    """Which transformers does not read."""
    path = write_gguf(tmp_path / "tiny.gguf", experts=True)
    stacks = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["model_type"] == "mixtral" and checkpoint.config["num_local_experts"] == EXPERTS
    assert checkpoint.config["num_experts_per_tok"] == 2
    for layer in range(LAYERS):
        for theirs, ours in {"gate": "w1", "up": "w3", "down": "w2"}.items():
            stack = stacks[f"blk.{layer}.ffn_{theirs}_exps.weight"]
            values = torch.from_numpy(gguf.dequantize(stack.data, stack.tensor_type)).bfloat16()
            for expert in range(EXPERTS):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{ours}.weight"
                assert torch.equal(checkpoint.load(name), values[expert])
    convert(path, tmp_path / "plain", "plain")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)[1]
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]


def test_experts_that_are_not_as_many_as_said_have_no_place(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", experts=True, numbers={"expert_count": 3})
    assert "ffn_" in refused(path) and "no place" in refused(path)


def test_tokenizer_card_and_settings_come_from_the_file(tmp_path):
    from transformers import AutoTokenizer

    path = write_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(path)
    card = checkpoint.card()
    assert checkpoint.dialect == "gguf" and card.name == "tiny" and card.weight_format == "bf16"
    rounded = "The weights were once rounded to Q4_1 (14 tensors), Q8_0 (1 tensor) in a GGUF file"
    assert len(card.notes) == 1 and card.notes[0].startswith(rounded)
    assert checkpoint.config["rope_theta"] == 5000.0 and checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.generation_config == {"bos_token_id": 0, "eos_token_id": 1}
    convert(path, tmp_path / "plain", "plain")
    assert open_checkpoint(tmp_path / "plain").card().notes == card.notes
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer("abcde", add_special_tokens=False).input_ids == [28, 29, 6]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"


def refused(path: Path) -> str:
    with pytest.raises(FourfoldError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    assert "'mamba'. From GGUF, Fourfold reads llama, qwen2, qwen3" in refused(
        write_gguf(tmp_path / "x.gguf", "mamba")
    )


def test_what_cannot_be_expressed_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", llama__rope__scaling__type="yarn")
    assert "scales its rotary embeddings" in refused(path)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"attention.head_count": 0}, "'llama.attention.head_count' in its metadata: 0"),
        ({"attention.head_count": 3, "attention.head_count_kv": 1}, "64 rows, no pairs for 3 heads"),
        ({"attention.head_count_kv": 0}, "'llama.attention.head_count_kv' in its metadata: 0"),
        ({"attention.head_count_kv": 3}, "'llama.attention.head_count_kv' in its metadata: 3"),
        ({"attention.head_count_kv": [2, 1]}, "'llama.attention.head_count_kv' in its metadata: [2, 1]"),
        ({"block_count": 3_000_000}, "'llama.block_count' in its metadata: 3000000"),
        ({"embedding_length": [64]}, "'llama.embedding_length' in its metadata: [64]"),
        ({"attention.key_length": 0}, "'llama.attention.key_length' in its metadata: 0"),
        ({"rope.freq_base": 0}, "'llama.rope.freq_base' in its metadata: 0"),
    ],
)
def test_numbers_that_no_model_has_are_refused(tmp_path, numbers, expected):
    assert expected in refused(write_gguf(tmp_path / "x.gguf", numbers=numbers))


def test_an_empty_tensor_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf")
    content = path.read_bytes()
    shape = content.index(b"output_norm.weight") + len(b"output_norm.weight") + 4
    path.write_bytes(content[:shape] + struct.pack("<Q", 0) + content[shape + 8 :])
    assert "'output_norm.weight' has the shape [0], which is empty" in refused(path)


def llama3_divisors(factor: float, theta: float = 5000.0, head_dim: int = 16) -> np.ndarray:
    """As llama.cpp's converter makes them, from transformers' frequencies with and without scaling."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor} | scaled
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope)
    slow, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (theta ** (-torch.arange(0, head_dim, 2).float() / head_dim) / slow).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_found_again(tmp_path, factor):
    divisors = llama3_divisors(factor)
    assert len(np.unique(divisors.round(3))) == 3  # waves that are kept, blended and stretched
    path = write_gguf(tmp_path / "x.gguf", divisors=divisors)
    checkpoint = open_checkpoint(path)
    assert "rope_freqs" not in " ".join(checkpoint.names())
    rope = checkpoint.config["rope_parameters"]
    assert rope["rope_type"] == "llama3" and rope["factor"] == pytest.approx(factor, rel=1e-6)
    convert(path, tmp_path / "plain", "plain")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    plain = 5000.0 ** (-torch.arange(0, 16, 2).float() / 16)
    turned = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(turned, plain / torch.from_numpy(divisors), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_the_divisors_of_llama_3_1_and_3_2_are_known(factor, head_dim):
    found = llama3_parameters(llama3_divisors(factor, 500000.0, head_dim), 500000.0)
    assert found is not None and found["factor"] == pytest.approx(factor, rel=1e-6)
    assert found["rope_type"] == "llama3" and found["original_max_position_embeddings"] == 8192


def test_another_scaling_of_the_rotary_embeddings_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    for divisors in (
        llama3_divisors(8.0) * 1.01,
        np.full(8, 2.0),
        llama3_divisors(8.0)[:4],
        np.full(8, np.nan),
    ):
        assert "in another way than Llama 3.1" in refused(write_gguf(path, divisors=divisors))


def test_damage_never_gives_anything_but_our_error(tmp_path):
    good = write_gguf(tmp_path / "good.gguf").read_bytes()
    path = tmp_path / "damaged.gguf"
    for defect, expected in (
        (b"", "ends inside its header"),
        (b"GGML" + good[4:], "letters GGUF"),
        (good[:4] + struct.pack("<I", 9) + good[8:], "version 9"),
        (good[:8] + struct.pack("<Q", 2**60) + good[16:], "damaged"),
        (good[:-50], "ends inside the tensor"),
    ):
        path.write_bytes(defect)
        assert expected in refused(path)
    header = good.index(b"output_norm.weight") + 60
    source, opened = np.random.default_rng(0), 0
    for _ in range(800):
        data = bytearray(good)
        for place in source.integers(0, header, source.integers(1, 4)):
            data[place] = source.integers(256)
        path.write_bytes(bytes(data))
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.names():
                checkpoint.load(name)
            opened += 1
        except FourfoldError:
            pass
    assert 0 < opened < 800  # some only change a token or a float


def test_a_file_cut_after_opening_is_an_error(tmp_path):
    path = write_gguf(tmp_path / "x.gguf")
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FourfoldError, match="ends inside the tensor"):
        checkpoint.load(checkpoint.names()[-1])
