"""Passes: what may be done to a model, and which sequences of them make sense.

A pass is one file in compress/passes exporting ``PASS``. Passes run in the recipe's order; those that change
weights come first, and exactly one, the last, rounds them to their formats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fourfold.compress.model import Model
from fourfold.compress.recipe import Recipe
from fourfold.core.errors import UsageError
from fourfold.core.registry import Registry
from fourfold.formats import ScaleRule, get_format

CalibrationSet = Sequence[Sequence[int]]  # sequences of token ids

PASSES = Registry("fourfold.compress.passes", "PASS", "pass")


@dataclass(frozen=True)
class Pass:
    """``apply(model, calibration) -> model``. ``rounds``: afterwards the scheme's weights are in their
    formats.
    """

    name: str
    apply: Callable[[Model, CalibrationSet | None], Model]
    rounds: bool


def get_pass(name: str) -> Pass:
    """The pass ``name``. Raises UsageError that lists the known ones."""
    return PASSES.get(name)


def run_passes(recipe: Recipe, model: Model, calibration: CalibrationSet | None = None) -> Model:
    """``model`` after all passes of ``recipe``; nothing is computed before a tensor is asked for."""
    for name in recipe.passes:
        model = get_pass(name).apply(model, calibration)
    return model


def check_recipe(recipe: Recipe) -> None:
    """Raise UsageError when the recipe's formats do not exist or its passes do not add up."""
    for rule in recipe.rules:
        if rule.weight is None and (rule.activation or rule.scale_rule):
            raise UsageError(
                f"{_who(recipe)}: a rule that keeps its modules (weight: null) cannot have an activation "
                "format or a scale rule. Remove those, or give a weight format."
            )
        _check_formats(recipe, rule.weight, rule.scale_rule, rule.activation)
    _check_passes(recipe)
    if not recipe.formats and recipe.dtype is None and recipe.kv_cache is None:
        raise UsageError(
            f"{_who(recipe)} changes nothing. Give a rule with a weight format, a dtype, or a kv_cache; to "
            "change only the dialect use `fourfold convert`."
        )


def _check_formats(recipe: Recipe, weight: str | None, rule: str | None, activation: str | None) -> None:
    for name in filter(None, (weight, activation)):
        get_format(name)
    if weight is None or rule is None:
        return
    default = get_format(weight).default_rule
    if default is None:
        raise UsageError(
            f"{_who(recipe)}: {weight} has no power-of-two scale, so it takes no scale_rule ('{rule}')."
        )
    if rule not in list(ScaleRule):
        raise UsageError(
            f"{_who(recipe)}: unknown scale_rule '{rule}'. Choose one of: {', '.join(ScaleRule)}."
        )


def _check_passes(recipe: Recipe) -> None:
    rounding = [i for i, name in enumerate(recipe.passes) if get_pass(name).rounds]
    listed = ", ".join(recipe.passes) or "none"
    if recipe.formats and not rounding:
        raise UsageError(
            f"{_who(recipe)} asks for {', '.join(sorted(recipe.formats))}, but none of its passes ({listed}) "
            "rounds weights. Add `rtn` as the last pass."
        )
    if rounding and not recipe.formats:
        raise UsageError(
            f"{_who(recipe)} lists the pass '{recipe.passes[rounding[0]]}', but no rule gives a weight "
            "format, so there is nothing to round. Remove the pass, or add a rule."
        )
    if len(rounding) > 1:
        raise UsageError(
            f"{_who(recipe)} rounds {len(rounding)} times (passes: {listed}). After the first, weights are "
            "in blocks and there is nothing left to round: keep one."
        )
    if rounding and rounding[0] != len(recipe.passes) - 1:
        after = recipe.passes[rounding[0] + 1]
        raise UsageError(
            f"{_who(recipe)} puts the pass '{after}' after '{recipe.passes[rounding[0]]}', which rounds. "
            "Passes that change weights come before the one that rounds."
        )


def _who(recipe: Recipe) -> str:
    return f"The recipe '{recipe.name}'"
