"""Recipes: what they say, and what is refused with which words."""

import pytest

from fourfold.compress import Recipe, load_recipe, recipe_names
from fourfold.compress.pipeline import check_recipe
from fourfold.core.errors import UsageError

MXFP4_RULE = {"weight": "mxfp4"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_sound_and_named_as_its_file(name):
    recipe = load_recipe(name)
    check_recipe(recipe)
    assert recipe.name == name
    assert recipe.description


def test_the_shipped_recipes_are_the_promised_ones():
    assert {"mxfp4", "bf16", "mxfp4-a8", "mxfp4-a6", "mxfp4-a4"} <= set(recipe_names())
    assert load_recipe("mxfp4").rules[0].activation is None
    assert load_recipe("mxfp4-a6").rules[0].activation == "mxfp6-e2m3"
    assert load_recipe("bf16").passes == []


def test_a_file_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nrules:\n  - {modules: ['*.mlp.*'], weight: mxfp8-e4m3}\npasses: [rtn]\n")
    recipe = load_recipe(path)
    assert recipe.rule_for("model.layers.0.mlp.up_proj").weight == "mxfp8-e4m3"
    assert recipe.rule_for("model.layers.0.self_attn.q_proj") is None


def test_a_pass_with_a_colon_and_no_options_has_none(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nrules:\n  - weight: mxfp4\npasses:\n  - awq\n  - gptq:\n")
    assert load_recipe(path).uses == [("awq", {}), ("gptq", {})]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nrulez: []\n", ["unknown key `rulez`", "rules"]),
        (
            "name: x\nrules: [{weights: mxfp4}]\n",
            ["`rules.0.weight`", "key `rules.0.weights`", "modules"],
        ),
        ("rules: []\n", ["`name`"]),
        ("- a\n", ["YAML map"]),
        ("name: [x\n", ["not YAML"]),
        ("name: x\nkv_cache: int3\n", ["`kv_cache`"]),
    ],
)
def test_a_file_that_is_wrong_is_explained(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    assert all(word in str(error.value) for word in [*words, str(path)])


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"no recipe 'mxfp5'.*bf16, mxfp4"):
        load_recipe("mxfp5")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rules": [MXFP4_RULE], "passes": []}, "none of its passes .none. rounds"),
        ({"rules": [MXFP4_RULE], "passes": ["rtn", "rtn"]}, "rounds 2 times"),
        ({"rules": [MXFP4_RULE], "passes": ["gptq-plus"]}, "Unknown pass 'gptq-plus'. Choose one of: .*rtn"),
        ({"rules": [], "passes": ["rtn"], "dtype": "bf16"}, "nothing to round"),
        ({"rules": [{"weight": "mxfp3"}], "passes": ["rtn"]}, "Unknown format 'mxfp3'"),
        ({"rules": [{"weight": "mxfp4", "activation": "fp3"}], "passes": ["rtn"]}, "Unknown format 'fp3'"),
        (
            {"rules": [{"weight": "mxfp4", "scale_rule": "odd"}], "passes": ["rtn"]},
            "unknown scale_rule 'odd'",
        ),
        (
            {"rules": [{"weight": None, "activation": "mxfp4"}, MXFP4_RULE], "passes": ["rtn"]},
            "keeps its modules",
        ),
        ({}, "changes nothing"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_with_the_reason(changes, words):
    with pytest.raises(UsageError, match=words):
        check_recipe(Recipe.model_validate({"name": "mine"} | changes))


def test_the_first_matching_rule_wins():
    rules = [
        {"modules": ["*.down_proj"], "weight": None},
        {"modules": ["*.mlp.*"], "weight": "mxfp8-e4m3"},
        {"weight": "mxfp4"},
    ]
    recipe = Recipe.model_validate({"name": "mixed", "rules": rules, "passes": ["rtn"]})
    found = [
        recipe.rule_for(f"model.layers.0.{m}").weight for m in ("mlp.down_proj", "mlp.up_proj", "self_attn.q")
    ]
    assert found == [None, "mxfp8-e4m3", "mxfp4"]
