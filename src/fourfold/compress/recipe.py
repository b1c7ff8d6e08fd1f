"""A recipe: which tensors get which format, by which passes. A short YAML file that a person can read and
copy.

A module is looked up in this order, and the first answer holds: the patterns of ``keep``; the parts that are
kept unless ``keep_default`` is false (embeddings are never rounded at all); the rules, from the top. A module
that no rule matches is kept. Patterns are globs on module names (``model.layers.*.mlp.*``); ``*`` crosses
dots.
"""

import re
from collections.abc import Sequence
from fnmatch import translate
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field, ValidationError

from fourfold.core.errors import UsageError
from fourfold.core.quantization import KVCacheFormat, LayerScheme
from fourfold.core.records import Record

SHIPPED = files("fourfold.compress") / "recipes"


class Rule(Record):
    """What the modules that match any of ``modules`` become; ``weight: null`` keeps them."""

    modules: list[str] = ["*"]
    weight: str | None
    scale_rule: str | None = None
    activation: str | None = None

    def scheme(self) -> LayerScheme | None:
        """The rule as a layer's scheme, None when it keeps."""
        if self.weight is None:
            return None
        return LayerScheme(weight=self.weight, scale_rule=self.scale_rule, activation=self.activation)


class PassUse(NamedTuple):
    """A pass of a recipe, by name, with its options as they are written."""

    name: str
    options: dict[str, Any]


class Recipe(Record):
    """The whole document. ``dtype`` casts every float tensor that is kept; null leaves each as the source has
    it.
    """

    name: str
    description: str = ""
    rules: list[Rule] = []
    keep: list[str] = Field([], description="globs of module names that are never rounded")
    keep_default: bool = Field(
        True, description="norms, routers, lm_head and vision or audio towers are kept"
    )
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    kv_cache: KVCacheFormat | None = None
    inputs: Literal["quantized", "original"] = Field(
        "quantized",
        description="what calibrated passes see: the outputs of the quantized layers before, whose errors "
        "they can make up for; or those of the original ones, so that several workers can share the layers",
    )
    passes: list[str | dict[str, dict[str, Any] | None]] = Field(
        [], description="names, or a name with its options: `gptq: {damping: 0.05}`"
    )

    @property
    def uses(self) -> list[PassUse]:
        """The passes in order, each with the options that are given to it."""
        return [use for entry in self.passes for use in _uses(entry)]

    def rule_for(self, module: str) -> Rule | None:
        """The first rule that matches ``module``, None when none does. ``keep`` is not looked at."""
        return next((rule for rule in self.rules if first_match(rule.modules, module)), None)

    @property
    def formats(self) -> set[str]:
        """Every weight format that some rule asks for."""
        return {rule.weight for rule in self.rules if rule.weight is not None}


def _uses(entry: str | dict[str, dict[str, Any] | None]) -> list[PassUse]:
    return [PassUse(entry, {})] if isinstance(entry, str) else [PassUse(n, o or {}) for n, o in entry.items()]


def first_match(patterns: Sequence[str], module: str) -> str | None:
    """The first glob of ``patterns`` that matches the whole name, or None."""
    return next((pattern for pattern in patterns if _compiled(pattern).match(module)), None)


def recipe_names() -> list[str]:
    """The shipped recipes: the file names of compress/recipes."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in SHIPPED.iterdir() if entry.name.endswith(".yaml")
    )


def load_recipe(name_or_file: str | Path | Recipe) -> Recipe:
    """A shipped recipe by name, or any YAML file by path. Raises UsageError for what cannot be read or
    understood.
    """
    if isinstance(name_or_file, Recipe):
        return name_or_file
    text, place = _read(str(name_or_file))
    try:
        document: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{place} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(document, dict):
        raise UsageError(f"{place} must be a YAML map with at least `name` and `rules`.")
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise UsageError(f"{place} is not a recipe: {_explain(error)}") from None


def _read(name: str) -> tuple[str, str]:
    if name in recipe_names():
        return (SHIPPED / f"{name}.yaml").read_text(), f"The shipped recipe '{name}'"
    path = Path(name)
    if path.is_file():
        try:
            return path.read_text(), f"The recipe {path}"
        except UnicodeDecodeError:
            raise UsageError(f"The recipe {path} is not UTF-8 text.") from None
    raise UsageError(
        f"There is no recipe '{name}'. Choose one of: {', '.join(recipe_names())}, or give the path of a "
        "YAML file."
    )


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = Rule.model_fields if place.startswith("rules.") else Recipe.model_fields
            parts.append(f"unknown key `{place}` (known here: {', '.join(known)})")
        else:
            parts.append(f"`{place}`: {item['msg']}")
    return "; ".join(parts) + "."


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))
