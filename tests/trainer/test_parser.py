# SPDX-License-Identifier: Apache-2.0
"""YAML 1.2, overrides, names and types; and the command lines of training scripts. Mistakes in recipes are in test_recipe.py."""

import copy
import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agevlm.trainer import AgeVlmModelConfig, AgeVlmScriptArguments, AgeVlmSFTConfig, Recipe, load_recipe, parse_script
from agevlm.trainer.parser import apply_override, parse, read_yaml

CLASSES = (AgeVlmScriptArguments, AgeVlmSFTConfig, AgeVlmModelConfig)
NEEDED = ["dataset_name=rows", "output_dir=out", "use_cpu=true", "bf16=false"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("-2E+3", -2000.0), (".5", 0.5), ("1.", 1.0), ("7", 7), (".inf", float("inf")), ("1e", "1e"),
        ("true", True), ("False", False), ("no", "no"), ("on", "on"), ("null", None), ("~", None), ("a: [1, b]", {"a": [1, "b"]}),
        ("1_000", 1000), ("'1'", "1"),
    ],
)  # fmt: skip
def test_values_are_those_of_yaml_1_2(text, value):
    read = read_yaml(text, "here")
    assert (read, type(read)) == (value, type(value))


def test_yaml_makes_no_objects():
    with pytest.raises(ValueError, match="here is not YAML"):
        read_yaml("!!python/object/apply:os.getcwd []", "here")


def test_overrides_go_to_their_place():
    values = {"a": {"b": 1}, "list": [{"name": "x", "c": 1}, {"name": "y"}, 3], "empty": None}
    for override in ("a.b=2", "a.new.deep=1e-3", "list.0.c=[4]", "list.y.c=5", "list.2=4", "empty.d=x=y", "top="):
        apply_override(values, override)
    assert values == {
        "a": {"b": 2, "new": {"deep": 0.001}},
        "list": [{"name": "x", "c": [4]}, {"name": "y", "c": 5}, 4],
        "empty": {"d": "x=y"},
        "top": None,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("list.z.c=1", r"list\.z\.c=1: list has the entries 0 to 1 \(x, y\), no 'z'"),
        ("list.2.c=1", "list has the entries 0 to 1"),
        ("a.b.c=1", r"a\.b is 1, in which there is no 'c'"),
        ("a", "'a' is no override: write key=value"),
        ("=1", "'=1' is no override"),
        ("a=[", r"a=\[ is not YAML"),
    ],
)
def test_overrides_without_a_place_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        apply_override({"a": {"b": 1}, "list": [{"name": "x"}, {"name": "y"}]}, override)


@dataclass
class Part:
    path: str
    size: float = 1.0


@dataclass
class Whole:
    parts: list[Part] | None = None
    kind: Literal["a", "b"] = "a"
    part: Part = field(default_factory=lambda: Part("p"))


def test_mappings_become_dataclasses():
    assert parse(Whole, {"parts": [{"path": "x", "size": 2}], "part": {"path": "y"}}) == Whole(
        [Part("x", 2)], part=Part("y")
    )
    assert parse(Whole, {"parts": None}) == Whole()
    for values, message in (
        ({"prats": []}, "no 'prats': did you mean 'parts'"),
        ({"parts": [{"size": 1}]}, r"parts\.0 has no path"),
        ({"parts": [{"path": "x", "size": True}]}, r"parts\.0\.size must be a number, got True"),
        ({"parts": {}}, "parts must be a list"),
        ({"part": {"path": "x", "siez": 1}}, r"no 'part\.siez': did you mean 'size'"),
        ({"kind": "c"}, "kind must be a or b, got 'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(Whole, values)


# --- scripts ---


@pytest.mark.parametrize("file", [["{file}"], ["--config", "{file}"]])
def test_scripts_read_files_overrides_and_flags_in_this_order(tmp_path, file, monkeypatch):
    monkeypatch.setenv("FROM_FILE", "before")
    path = tmp_path / "settings.yaml"
    path.write_text(
        "dataset_name: rows\noutput_dir: out\nlearning_rate: 1e-4\nmax_steps: 5\nstage: [adapter]\nuse_cpu: true\nbf16: false\n"
        "env: {FROM_FILE: 1}\n"
    )
    file = [argument.format(file=path) for argument in file]
    overrides = ["max_steps=6", "group_learning_rates.adapter=1e-3", "optim=muon", "optim_args='momentum=0.9'"]
    flags = ["--max_length", "77", "--use_peft", "false", "--lora_target_modules", "a", "b", "--save_steps", "3"]
    arguments = [*overrides, *file] if "--config" in file else [*file, *overrides]
    script, training, model = parse_script(CLASSES, [*arguments, *flags])
    assert script.dataset_name == "rows"
    assert (training.learning_rate, training.max_steps, training.stage) == (1e-4, 6, ["adapter"])
    assert (training.group_learning_rates, training.optim, training.optim_args) == (
        {"adapter": 1e-3}, "muon", "momentum=0.9",
    )  # fmt: skip
    assert (training.max_length, training.save_steps) == (77, 3)
    assert (model.use_peft, model.lora_target_modules) == (False, ["a", "b"])
    assert os.environ["FROM_FILE"] == "1"
    assert parse_script(CLASSES, [*file, "max_steps=6", "--max_steps", "7"])[1].max_steps == 7


def test_flags_alone_are_those_of_trl():
    arguments = ["--dataset_name", "rows", "--output_dir", "out", "--use_cpu", "--bf16=false", "--assistant_only_loss"]
    script, training, _ = parse_script(CLASSES, [*arguments, "--optim", "sgd", "--guided_layers", "2", "7"])
    assert (script.dataset_name, training.assistant_only_loss, training.guided_layers) == ("rows", True, [2, 7])
    assert training.optim == "sgd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NEEDED, "lerning_rate=1"], "There is no 'lerning_rate': did you mean 'learning_rate'?"),
        ([*NEEDED, "--lerning_rate", "1"], "There is no 'lerning_rate': did you mean 'learning_rate'?"),
        ([*NEEDED, "learning_rate=fast"], "learning_rate must be a number, got 'fast'"),
        ([*NEEDED, "--learning_rate", "fast"], "invalid float value: 'fast'"),
        ([*NEEDED, "stage=aling"], "There is no preset 'aling'"),
        ([*NEEDED, "max_steps"], "'max_steps' is no override"),
        (["--max_steps", "1"], "required: --dataset_name"),
        (["nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_mistakes_end_in_a_message_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_script(CLASSES, arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "usage:" not in said


# --- any text ---

# Pieces that mean something to YAML or to recipes, and any other characters between them.
PIECES = st.sampled_from(
    [
        *"[]{}:,.=-&*!#|>?%@`'\"\\ \n\t\0\ufeff\x85\ud800", "&a", "*a", "<<: ", "!!timestamp ", "!!int ", "!!float ", "!!bool ",
        "!!binary ", "!!set ", "!!python/none ", "? ", "- ", ": ", "1e-4", ".nan", "-.inf", "0x", "0b", "1:2:3", "2001-01-01",
        "9999-12-31T23:59:59-23:59", "null", "~", "true", "9" * 5000, "model", "model_args", "data", "data.0", "path", "rows", "training",
        "stages", "stages.first.", "share", "name", "weight_by", "learning_rate", "eval_data", "features", "=",
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join)
VALUES = {
    "model": "m",
    "data": [{"path": "d", "weight_by": None}],
    "training": {"output_dir": "o", "stage": "align", "max_steps": 4},
    "stages": [{"name": "first", "share": 0.5, "training": {}}],
}


@given(st.lists(TEXTS, max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_override_gives_a_recipe_or_says_what_is_wrong(overrides):
    try:
        recipe = load_recipe(parse(Recipe, copy.deepcopy(VALUES)), overrides)
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        message = json.dumps(dataclasses.asdict(recipe), default=str)
    assert message


@given(st.binary(max_size=60) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_a_recipe_or_says_what_is_wrong(tmp_path, content):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises((ValueError, OSError)) as refused:  # which is never a whole recipe by chance
        load_recipe(file)
    assert str(refused.value)


# JSON writes others in halves, which YAML does not join.
WORDS = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
@settings(max_examples=100, deadline=None)
def test_values_come_out_of_overrides_as_they_went_in(value):
    """Written as JSON, which YAML 1.2 contains."""
    values = {"a": {"b": [{"name": "c"}]}}
    apply_override(values, f"a.b.c.d={json.dumps(value)}")
    assert values == {"a": {"b": [{"name": "c", "d": value}]}}
    assert repr(values["a"]["b"][0]["d"]) == repr(value), "of the same types"


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "{a: " * 3000, "- " * 5000, "a: &a [*a]", "&a {b: *a}", "[" * 101 + "]" * 101,
     "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))])],
    ids=["list", "mapping", "entries", "itself", "its own value", "levels", "references"],
)  # fmt: skip
def test_what_is_nested_without_end_is_told(text):
    with pytest.raises(ValueError, match="here is nested too deeply"):
        read_yaml(text, "here")
    assert read_yaml("[" * 90 + "]" * 90, "here") is not None
    assert read_yaml("base: &b {x: 1}\nother: {<<: *b, y: 2}", "here") == {"base": {"x": 1}, "other": {"x": 1, "y": 2}}


@pytest.mark.parametrize("text", ["model: a\nmodel: b", "training: {stage: guide, 'stage': align}", "[{a: 1, a: 1}]"])
def test_a_key_that_stands_twice_is_refused(text):
    with pytest.raises(ValueError, match=r"the key '(model|stage|a)' stands twice"):
        read_yaml(text, "recipe.yaml")


def test_merged_keys_may_be_replaced():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}"
    assert read_yaml(text, "recipe.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}
