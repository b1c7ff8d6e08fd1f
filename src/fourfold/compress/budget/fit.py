"""From a recipe and a budget to the recipe that is best within it: measured, chosen, and written by name."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fourfold.checkpoint import TensorInfo
from fourfold.checkpoint.dialect import Dialect, get_writable
from fourfold.compress.budget.budgets import Budget, parse_budget
from fourfold.compress.budget.candidates import candidates, stored_bytes
from fourfold.compress.budget.choose import (
    Choice,
    Group,
    frontier,
    numel,
    undominated,
    within_bytes,
    within_cost,
)
from fourfold.compress.budget.groups import experts_of, fused_groups
from fourfold.compress.budget.sensitivity import Costs, sensitivities
from fourfold.compress.calibrated.memory import is_out_of_memory
from fourfold.compress.calibrated.skeleton import Skeleton
from fourfold.compress.calibration import CalibrationSet
from fourfold.compress.model import Model
from fourfold.compress.pipeline import check_recipe, prepare, run_passes
from fourfold.compress.recipe import Recipe, Rule, load_recipe
from fourfold.compress.resolve import DTYPES, open_source, resolve
from fourfold.core.errors import FourfoldError, UsageError
from fourfold.core.quantization import LayerScheme
from fourfold.core.records import FormatGroup, Frontier, FrontierPoint

KEPT = "kept"
# each sequence is one sample of every cost, however long it is: with 128 a cost is known within some 13 %
SEQUENCES = 128
SEQUENCE_TOKENS = 128

UNTOUCHED = LayerScheme(weight="untouched")

Schemes = dict[str, dict[str, LayerScheme]]
"""Module name -> format -> scheme."""


@dataclass(frozen=True)
class Measured:
    """What each group of ``model`` costs and weighs in each format; ``rest`` is the bytes of all else."""

    source: str
    recipe: Recipe
    dialect: str
    model: Model
    schemes: Schemes
    groups: list[Group]
    rest: int
    calibration: CalibrationSet
    notes: list[str]


def fit_budget(
    source: str | Path,
    recipe: str | Path | Recipe,
    dialect: str,
    budget: str | Budget,
    calibration: CalibrationSet,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Recipe, Frontier]:
    """``recipe`` with rules by module name that keep to ``budget``, and the frontier it was chosen from.

    Raises as ``measure`` and ``within`` do.
    """
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    return within(measure(source, recipe, dialect, calibration, device, progress), budget)


def measure(
    source: str | Path,
    recipe: str | Path | Recipe,
    dialect: str,
    calibration: CalibrationSet,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """What there is to choose from for the weights that ``recipe`` rounds.

    The formats weighed are the recipe's own, MXFP4, MXFP6 (E2M3), MXFP8 (E4M3), FP8 per channel, and the
    weight as it is, as far as ``dialect`` can store them. ``progress(done, sequences)`` is told of the
    measurement. Raises UsageError for a recipe that rounds nothing, and FourfoldError where the whole model
    does not fit into memory.
    """
    recipe, target = load_recipe(recipe), get_writable(dialect)
    check_recipe(recipe)
    if not recipe.formats:
        raise UsageError(f"The recipe '{recipe.name}' rounds nothing, so a budget has nothing to choose.")
    resolved = resolve(open_source(source), recipe)
    model = resolved.model
    schemes = _schemes(model, target)
    costs = _measured(Skeleton(model, torch.device(device)), schemes, calibration, progress)
    groups, rest = _groups(model, target, recipe, schemes, costs), _rest_bytes(model, target, recipe)
    notes = [*resolved.notes, *_notes(schemes, costs)]
    return Measured(str(source), recipe, dialect, model, schemes, groups, rest, calibration, notes)


def within(measured: Measured, budget: Budget) -> tuple[Recipe, Frontier]:
    """The recipe with rules by module name that is best within ``budget``, and the frontier.

    Raises UsageError for a budget that cannot be kept, or that nothing must be rounded for.
    """
    groups, rest = measured.groups, measured.rest
    chosen, choices = _with_frontier(groups, _choose(groups, budget, rest))
    if set(chosen.formats) == {KEPT}:
        why = "can be rounded within" if budget.kind == "kl" else "needs to be rounded for"
        raise UsageError(f"Nothing {why} the budget {budget.text}. {_range(groups, rest)}")
    formats = {m: f for g, f in zip(groups, chosen.formats, strict=True) for m in g.modules}
    schemes = {m: measured.schemes[m].get(f) for m, f in formats.items()}
    samples, length = measured.calibration.token_ids.shape
    record = Frontier(
        source=measured.source,
        recipe=measured.recipe.name,
        dialect=measured.dialect,
        budget=budget.text,
        points=[_point(groups, choice, rest) for choice in choices],
        chosen=choices.index(chosen),
        groups=[
            FormatGroup(modules=list(g.modules), weights=g.numel, format=form, predicted_kl=g.cost)
            for g, form in zip(groups, chosen.formats, strict=True)
        ],
        samples=samples,
        sequence_tokens=length,
        notes=measured.notes,
    )
    return _recipe(measured.recipe, budget, measured.model, schemes), record


def _schemes(model: Model, dialect: Dialect) -> Schemes:
    return {
        module: {s.weight: s for s in candidates(dialect, _weight(model, module), scheme)}
        for module, scheme in model.quantization.layers.items()
    }


def _weight(model: Model, module: str) -> TensorInfo:
    return model.entries[f"{module}.weight"].info


def _measured(
    skeleton: Skeleton,
    schemes: Schemes,
    calibration: CalibrationSet,
    progress: Callable[[int, int], None] | None,
) -> Costs:
    try:
        by_module = {module: list(by_format.values()) for module, by_format in schemes.items()}
        return sensitivities(skeleton, calibration, by_module, progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise FourfoldError(
            f"The model does not fit into the memory of {skeleton.device} as a whole, with gradients, which "
            "measuring for a budget needs (some 20 bytes a weight). Use a larger device, or give formats by "
            "name in a recipe."
        ) from error


def _groups(model: Model, dialect: Dialect, recipe: Recipe, schemes: Schemes, costs: Costs) -> list[Group]:
    groups = []
    for modules in fused_groups(schemes):
        forms = [f for f in schemes[modules[0]] if all(f in schemes[m] for m in modules)]
        if not all(module in costs for module in modules) or not forms:
            groups += [_fixed(model, dialect, module) for module in modules]
            continue
        infos = [_weight(model, module) for module in modules]
        sizes = [stored_bytes(dialect, info, forms) for info in infos]
        nbytes = {form: sum(size[form] for size in sizes) for form in forms}
        nbytes[KEPT] = sum(_kept_bytes(info, recipe) for info in infos)
        nbytes = dict(sorted(nbytes.items(), key=lambda item: item[1]))
        cost = {f: 0.0 if f == KEPT else sum(costs[m][f] for m in modules) for f in nbytes}
        groups.append(Group(modules, sum(info.numel for info in infos), nbytes, cost))
    return groups


def _fixed(model: Model, dialect: Dialect, module: str) -> Group:
    """A module that nothing is known of: the recipe's format, at no cost."""
    info, form = _weight(model, module), model.quantization.layers[module].weight
    return Group((module,), info.numel, stored_bytes(dialect, info, [form]), {form: 0.0})


def _kept_bytes(info: TensorInfo, recipe: Recipe) -> int:
    return info.numel * DTYPES[recipe.dtype].itemsize if recipe.dtype else info.nbytes


def _rest_bytes(model: Model, dialect: Dialect, recipe: Recipe) -> int:
    """Bytes of the tensors that the recipe keeps, and of those its passes add. KV scales are not counted."""
    planned = run_passes(recipe, prepare(recipe, model))
    weights = {f"{module}.weight" for module in model.quantization.layers}
    rest = [info for info in planned.infos() if info.name not in weights]
    return sum(p.nbytes for info in rest for p in dialect.plan(info))


def _choose(groups: list[Group], budget: Budget, rest: int) -> Choice:
    if budget.kind == "kl":
        return within_cost(groups, budget.value)
    nbytes = budget.value * numel(groups) / 8 if budget.kind == "bits" else budget.value - rest
    if nbytes < sum(min(g.nbytes.values()) for g in groups):
        raise UsageError(f"The budget {budget.text} cannot be kept. {_range(groups, rest)}")
    return within_bytes(groups, nbytes)


def _with_frontier(groups: list[Group], chosen: Choice) -> tuple[Choice, list[Choice]]:
    """The frontier with ``chosen`` in it, or with the point that is no larger and no worse than that."""
    choices = undominated([*frontier(groups), chosen])
    return [choice for choice in choices if choice.nbytes <= chosen.nbytes][-1], choices


def _range(groups: list[Group], rest: int) -> str:
    low, high = (sum(pick(g.nbytes.values()) for g in groups) for pick in (min, max))
    worst = sum(max(g.cost.values()) for g in groups)
    weights = numel(groups) / 8
    return (
        f"For this model and recipe budgets go from {low / weights:.3f} to {high / weights:.3f} bits a "
        f"weight, from {(low + rest) / 1e9:.4g} to {(high + rest) / 1e9:.4g} GB, and up to a predicted KL of "
        f"{worst:.3g}."
    )


def _point(groups: list[Group], choice: Choice, rest: int) -> FrontierPoint:
    counts = Counter(choice.formats)
    by_size = dict.fromkeys(f for g in sorted(groups, key=lambda g: -len(g.nbytes)) for f in g.nbytes)
    return FrontierPoint(
        bits=8 * choice.nbytes / numel(groups),
        size_bytes=choice.nbytes + rest,
        predicted_kl=choice.cost,
        groups={form: counts[form] for form in by_size if form in counts},
    )


def _recipe(recipe: Recipe, budget: Budget, model: Model, chosen: dict[str, LayerScheme | None]) -> Recipe:
    """``recipe`` whose rules name every module that it rounded, one rule for each scheme."""
    rules: dict[LayerScheme | None, list[str]] = {}
    for pattern, scheme in _shortened(model, chosen).items():
        rules.setdefault(scheme, []).append(pattern)
    return recipe.model_copy(
        update={
            "name": f"{recipe.name} within {budget.text}",
            "description": f"{recipe.description} Formats chosen by measurement for {budget.text}.".strip(),
            "rules": [_rule(modules, scheme) for scheme, modules in rules.items()],
        }
    )


def _rule(modules: list[str], scheme: LayerScheme | None) -> Rule:
    if scheme is None:
        return Rule(modules=modules, weight=None)
    return Rule(
        modules=modules, weight=scheme.weight, scale_rule=scheme.scale_rule, activation=scheme.activation
    )


def _shortened(model: Model, chosen: dict[str, LayerScheme | None]) -> dict[str, LayerScheme | None]:
    """One glob for all experts of a layer that have one scheme, because large models have tens of thousands
    of them; none where another module's name would match it.
    """
    schemes: dict[str, set[LayerScheme | None]] = {}
    for name in model.entries:
        if name.endswith(".weight") and (experts := experts_of(name)) is not None:
            # what the recipe keeps stands apart from every scheme, also from "chosen to be kept"
            module = name.removesuffix(".weight")
            schemes.setdefault(experts, set()).add(chosen.get(module, UNTOUCHED))
    alike = {experts for experts, found in schemes.items() if len(found) == 1 and UNTOUCHED not in found}
    short = {}
    for module, scheme in chosen.items():
        experts = experts_of(module)
        short[f"{experts}.*" if experts in alike else module] = scheme
    return short


def _notes(schemes: Schemes, costs: Costs) -> list[str]:
    unknown = sorted(set(schemes) - set(costs))
    if not unknown:
        return []
    return [
        f"{len(unknown)} modules that transformers does not build as linear layers ({unknown[0]}, …) keep "
        "the recipe's format; what they cost is not in the predicted KL."
    ]
