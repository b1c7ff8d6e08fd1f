"""Passes: what may be done to a model, and which sequences of them make sense.

A pass is one file in compress/passes exporting ``PASS``. Passes run in the recipe's order: channels are
smoothed, then inputs are rotated, then weights are rounded; at most one of each, and exactly one rounds.

A pass is data-free (``apply``: the whole model, lazily) or calibrated (``layer``: one decoder layer after the
other, by :mod:`fourfold.compress.calibrated`). A calibrated one may say beforehand what it will change in the
checkpoint's scheme (``prepare``), and may learn over the whole model first (``learn``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError

from fourfold.checkpoint.kv_scales import PER_HEAD, SCALED
from fourfold.compress.model import Model
from fourfold.compress.recipe import PassUse, Recipe
from fourfold.core.errors import UsageError
from fourfold.core.records import Record
from fourfold.core.registry import Registry
from fourfold.formats import ScaleRule, get_format

if TYPE_CHECKING:
    from fourfold.compress.calibrated.skeleton import Skeleton
    from fourfold.compress.calibrated.whole import WholeModel
    from fourfold.compress.calibrated.work import LayerWork
    from fourfold.compress.calibration import CalibrationSet

PASSES = Registry("fourfold.compress.passes", "PASS", "pass")
ORDER = ("smooth", "rotate", "inputs", "round")
Change = Callable[["WholeModel"], None]
Tell = Callable[[str, int, int], bool]
"""Called as ``tell(what, done, total)`` before each unit of work; True: no more of it is wanted."""


def silent(what: str, done: int, total: int) -> bool:
    """A ``Tell`` that nobody listens to."""
    return False


class NoOptions(Record):
    """A pass that takes no options."""


@dataclass(frozen=True)
class Pass:
    """One step of a recipe. ``kind`` places it in ``ORDER``; after ``round`` weights are in their formats.

    ``learn(skeleton, calibration, options, change, tell)`` sees the whole model before any layer is worked
    on; ``change(model)`` does to a WholeModel what the passes before this one will do to its layers.
    ``needs_base(options)``: its ``layer`` reads ``work.base_inputs``; with ``shows_base`` it observes all of
    them before it changes the layer, so that nobody else need run them. ``options`` is the schema of what a
    recipe may say. ``only_after`` are the passes that may come before it; None: any.
    """

    name: str
    kind: Literal["smooth", "rotate", "inputs", "round"]
    apply: Callable[[Model], Model] | None = None
    prepare: Callable[[Model, Any], Model] | None = None
    learn: "Callable[[Skeleton, CalibrationSet, Any, Change, Tell], dict[str, torch.Tensor]] | None" = None
    layer: "Callable[[LayerWork, Any], None] | None" = None
    options: type[Record] = NoOptions
    needs_base: Callable[[Any], bool] = lambda options: False
    shows_base: bool = False
    only_after: tuple[str, ...] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it looks at activations."""
        return self.layer is not None


def get_pass(name: str) -> Pass:
    """The pass ``name``. Raises UsageError that lists the known ones."""
    return PASSES.get(name)


def options_of(use: PassUse, who: str) -> Record:
    """The options of ``use``, checked. Raises UsageError that names the key."""
    schema = get_pass(use.name).options
    try:
        return schema.model_validate(use.options)
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(str(part) for part in item["loc"])
        known = ", ".join(schema.model_fields) or "none"
        raise UsageError(
            f"{who}: the pass '{use.name}' cannot take `{key}`: {item['msg']}. Its options: {known}."
        ) from None


def is_calibrated(recipe: Recipe) -> bool:
    """Whether ``recipe`` looks at activations: in some pass, or for the scales of a KV cache's heads."""
    return recipe.kv_cache == PER_HEAD or any(get_pass(use.name).calibrated for use in recipe.uses)


def takes_calibration(recipe: Recipe) -> bool:
    """Whether a calibration set changes what ``recipe`` makes: it needs one, or calibrates with one the
    scales of its KV cache, which are ones without.
    """
    return recipe.kv_cache in SCALED or is_calibrated(recipe)


def prepare(recipe: Recipe, model: Model) -> Model:
    """``model`` with what the passes change in the scheme and add to its tensors, before any is computed."""
    for use in recipe.uses:
        if (change := get_pass(use.name).prepare) is not None:
            model = change(model, options_of(use, recipe.name))
    return model


def run_passes(recipe: Recipe, model: Model) -> Model:
    """``model`` with every weight in its format, as data-free passes make it when it is asked for.

    What calibrated passes make has the same formats and sizes, and takes the place of these tensors.
    """
    if not recipe.formats:
        return model
    round_to_nearest = get_pass("rtn").apply
    assert round_to_nearest is not None
    return round_to_nearest(model)


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
    for use in recipe.uses:
        options_of(use, _who(recipe))
    kinds = [get_pass(use.name).kind for use in recipe.uses]
    names = [use.name for use in recipe.uses]
    listed = ", ".join(names) or "none"
    if recipe.formats and "round" not in kinds:
        raise UsageError(
            f"{_who(recipe)} asks for {', '.join(sorted(recipe.formats))}, but none of its passes ({listed}) "
            "rounds weights. Add `rtn` as the last pass."
        )
    if names and not recipe.formats:
        raise UsageError(
            f"{_who(recipe)} lists the pass '{names[0]}', but no rule gives a weight format, so there is "
            "nothing to round. Remove the pass, or add a rule."
        )
    if kinds.count("round") > 1:
        raise UsageError(
            f"{_who(recipe)} rounds {kinds.count('round')} times (passes: {listed}). After the first, "
            "weights are in blocks and there is nothing left to round: keep one."
        )
    _check_order(recipe, names, kinds)
    _check_before(recipe, names)


def _check_order(recipe: Recipe, names: list[str], kinds: list[str]) -> None:
    why = {
        "round": "which rounds. Passes that change weights come before the one that rounds.",
        "rotate": "which mixes the channels that a smoothing pass would scale one by one. Smooth first.",
        "inputs": "which says how inputs are rounded; only a pass that rounds comes after it.",
        "smooth": "which scales every channel too, and the second would undo the first. Keep one.",
    }
    for (first, kind), (second, next_kind) in zip(
        zip(names, kinds, strict=True), list(zip(names, kinds, strict=True))[1:], strict=False
    ):
        if ORDER.index(next_kind) > ORDER.index(kind):
            continue
        reason = why[kind]
        if kind == next_kind == "rotate":
            reason = "which rotates as well: two rotations are one rotation. Keep one."
        raise UsageError(f"{_who(recipe)} puts the pass '{second}' after '{first}', {reason}")


def _check_before(recipe: Recipe, names: list[str]) -> None:
    for place, name in enumerate(names):
        allowed = get_pass(name).only_after
        refused = [before for before in names[:place] if allowed is not None and before not in allowed]
        if refused:
            others = f"; {', '.join(allowed)} may come before it" if allowed else ""
            raise UsageError(
                f"{_who(recipe)} puts the pass '{refused[0]}' before '{name}', which learns on the weights "
                "as they are in the checkpoint and would not know of the change. Remove one of the two"
                f"{others}."
            )


def _who(recipe: Recipe) -> str:
    return f"The recipe '{recipe.name}'"
