"""What serving kernels fuse, and so must share a format: told from module names.

vLLM and SGLang multiply q, k and v of a layer as one matrix, gate and up likewise, the input projections of a
hybrid's linear attention in pairs, and the first projections of multi-head latent attention. All projections
of all experts of a layer go through one fused kernel, and vLLM refuses experts of several schemes. Everything
else stands alone. Source: ``packed_modules_mapping`` and the MoE methods of compressed-tensors and Quark in
vLLM.
"""

import re
from collections.abc import Iterable, Mapping

from fourfold.core.quantization import LayerScheme

FUSED: tuple[frozenset[str], ...] = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    frozenset({"in_proj_qkv", "in_proj_z"}),
    frozenset({"in_proj_a", "in_proj_b"}),
)
SHOWN = 3  # names of a group; experts are hundreds
EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def fused_groups(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """``modules`` in groups that share a format, sorted by name, layer 2 before layer 10."""
    groups: dict[tuple[str, frozenset[str]], list[str]] = {}
    for module in sorted(modules, key=_natural):
        groups.setdefault(_key(module), []).append(module)
    return [tuple(members) for members in groups.values()]


def unlike(modules: Iterable[str], layers: Mapping[str, LayerScheme]) -> list[str]:
    """A note on ``modules`` that kernels fuse and whose schemes in ``layers`` differ, if there are any."""
    groups = fused_groups(modules)
    mixed = [group for group in groups if any(layers.get(m) != layers.get(group[0]) for m in group)]
    if not mixed:
        return []
    first, count = mixed[0], len(mixed)
    named = ", ".join(first[:SHOWN]) + (", …" if len(first) > SHOWN else "")
    others = f", and {count - 1} more such group{'s' if count > 2 else ''}" if count > 1 else ""
    return [
        f"{named} have several formats{others}. vLLM and SGLang compute them as one and refuse that; a rule "
        "that matches all of them gives them one."
    ]


def experts_of(module: str) -> str | None:
    """``model.layers.3.mlp.experts`` of one of its experts' modules, None of any other."""
    found = EXPERT.match(module)
    return found.group(1) if found else None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _key(module: str) -> tuple[str, frozenset[str]]:
    if (experts := experts_of(module)) is not None:
        return experts, frozenset()
    parent, _, leaf = module.rpartition(".")
    return parent, next((fused for fused in FUSED if leaf in fused), frozenset({leaf}))
