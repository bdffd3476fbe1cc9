"""A recipe file says the same as options; a run says how to make it again; allocations are replayed."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
import yaml

from cli.command import MLP, NET, SAMPLES, done, refused


def digest(run: str) -> str:
    return hashlib.sha256(Path(run, "model.safetensors").read_bytes()).hexdigest()


def planned(line: str) -> dict:
    return done(f"plan {line} --json").json


def recipe(text: str) -> str:
    Path("recipe.yaml").write_text(text)
    return "--recipe recipe.yaml"


def test_a_recipe_file_says_the_same_as_options():
    text = f"""
model: {NET}
budget: {{sparsity: 0.9, macs: 50%}}
method: lamp
exclude: [classify]
min_density: {{stem.*: 0.5}}
max_density: {{blocks.8.*: 0.05}}
floor: 2/row
"""
    line = f"{NET} --budget sparsity=0.9,macs=50% --method lamp --exclude classify --min-density stem.*=0.5"
    assert planned(recipe(text)) == planned(f"{line} --max-density blocks.8.*=0.05 --floor 2/row")


@pytest.mark.parametrize("budget", ["sparsity=0.9", "[sparsity=0.9]", "{sparsity: 0.9}", "{sparsity: 90%}"])
def test_a_budget_may_be_written_in_several_ways(budget):
    assert planned(recipe(f"model: {NET}\nbudget: {budget}"))["kept"] == 27061


def test_options_override_the_file_and_settings_override_both():
    text = f"model: {NET}\nbudget: sparsity=0.9\nmethod: lamp\nfloor: 1"
    assert planned(recipe(text) + " --budget sparsity=0.5 --method erk") == planned(f"{NET} --budget sparsity=0.5")
    assert planned(recipe(text) + " --method global --set method=erk --set budget.sparsity=0.5") == planned(
        f"{NET} --budget sparsity=0.5"
    )
    bounded = planned(recipe(text) + " --set min_density.stem.0.weight=0.75 --set floor=5%")
    assert bounded["layers"][0]["kept"] >= 0.75 * 144


def test_two_to_four_is_a_pattern_and_not_minutes_and_seconds():
    expected = planned(f"{NET} --budget sparsity=0.5 --pattern 2:4 --exclude stem.*")
    text = f"model: {NET}\nbudget: sparsity=0.5\nexclude: stem.*"
    assert planned(recipe(f"{text}\npattern: 2:4")) == expected
    assert planned(recipe(text) + " --set pattern=2:4") == expected


def test_numbers_in_settings_are_numbers_and_reach_the_method():
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --repair variance --out RUN"
    done(f"{line} --set options.variance.limit=2e0")
    hyperparameters = json.loads(Path("RUN/run.json").read_text())["configuration"]["hyperparameters"]
    assert hyperparameters["repair"] == [{"type": "OutputMoments", "scale": True, "limit": 2.0}]


def test_an_option_goes_by_its_own_name_wherever_the_method_holds_it():
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --method uniform --repair distill --out RUN"
    said = done(f"{line} --set options.distill.steps=5 --set options.distill.every=2 --json").json
    assert said["images"]["backward"] == 5 * 24  # of 40 samples, 16 are watched
    (used,) = json.loads(Path("RUN/run.json").read_text())["configuration"]["hyperparameters"]["repair"]
    assert (used["training"]["steps"], used["schedule"]["every"], used["schedule"]["freeze_at"]) == (5, 2, 0.8)
    assert used["training"]["learning_rate"] == done("methods distill --json").json["options"]["learning_rate"]


@pytest.mark.parametrize("start", ["uniform", "auto", "plan.json"])
def test_an_option_that_is_a_method_takes_what_allocate_takes(start):
    done(f"plan {MLP} --budget sparsity=0.5 --method uniform --save plan.json")
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --method fcpts --out RUN --json"
    # without a ramp and without learning, what it starts from is what it ends with
    options = {"start": start, "steps": 2, "ramp": 1, "distance": 0}
    said = done(line + "".join(f" --set options.fcpts.{key}={value}" for key, value in options.items())).json
    expected = said["diagnostics"]["auto"]["chosen"] if start == "auto" else "uniform"
    planned_kept = planned(f"{MLP} --budget sparsity=0.5 --method {expected}")["layers"]
    assert [row["kept"] for row in said["layers"]] == [row["kept"] for row in planned_kept]


def test_the_resolved_recipe_of_a_run_makes_the_same_run():
    line = f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --budget sparsity=0.6 --allocate lamp --score random"
    first = done(
        f"{line} --repair bias,variance --set options.variance.limit=3 --seed 7 --samples 24 --json --out A"
    ).json
    saved = yaml.safe_load(Path("A/recipe.yaml").read_text())
    assert saved["allocate"] == "lamp" and saved["score"] == "random" and saved["pattern"] == "unstructured"
    assert saved["repair"] == "bias,variance" and saved["seed"] == 7 and saved["options"]
    again = done(f"prune {MLP} --data {SAMPLES} --test {SAMPLES} --recipe A/recipe.yaml --out B --json").json
    for said in (first, again):
        for key in ("run", "seconds", "exports", "sha256"):
            del said[key]
    assert again == first
    assert digest("B") == digest("A")


def test_a_run_without_repair_is_made_again_without_repair():
    done(f"prune {MLP} --budget sparsity=0.6 --repair none --out A")
    done(f"prune {MLP} --recipe A/recipe.yaml --out B")
    assert digest("B") == digest("A")


def test_an_allocation_is_replayed_from_a_run_its_file_and_a_plan():
    line = f"prune {MLP} --budget sparsity=0.6 --repair none"
    first = done(f"{line} --method lamp --out A --json").json
    done(f"plan {MLP} --budget sparsity=0.6 --method lamp --save plan.json")
    for number, source in enumerate(("A", "A/allocation.json", "plan.json")):
        said = done(f"{line} --allocate {source} --out R{number} --json").json
        assert said["layers"] == first["layers"] and digest(f"R{number}") == digest("A")
        assert said["allocate"] == source
    assert json.loads(Path("plan.json").read_text()) == json.loads(Path("A/allocation.json").read_text())


def test_an_allocation_edited_by_hand_keeps_its_proportions_and_meets_the_budget():
    done(f"plan {NET} --budget sparsity=0.9 --save plan.json")
    content = json.loads(Path("plan.json").read_text())
    content["layers"]["classify.weight"]["density"] = 0.01
    del content["budget"]
    Path("edited.json").write_text(json.dumps(content))
    said = planned(f"{NET} --budget sparsity=0.9 --allocate edited.json")
    assert said["kept"] == 27061
    assert said["layers"][-1]["name"] == "classify.weight" and said["layers"][-1]["density"] < 0.02
    Path("short.json").write_text(json.dumps({name: row["density"] for name, row in content["layers"].items()}))
    assert planned(f"{NET} --budget sparsity=0.9 --allocate short.json")["layers"] == said["layers"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda layers: layers.pop("0.weight"), "missing 0.weight"),
        (lambda layers: layers.update({"new": {"density": 0.5}}), "unknown new"),
        (lambda layers: layers["0.weight"].update(density=1.5), "0.weight is 1.5"),
        (lambda layers: layers["0.weight"].update(density="much"), "'much'"),
        (lambda layers: layers["0.weight"].pop("density"), "density"),
    ],
)
def test_an_allocation_that_does_not_fit_is_refused(change, told):
    done(f"plan {MLP} --budget sparsity=0.6 --save plan.json")
    content = json.loads(Path("plan.json").read_text())
    change(content["layers"])
    Path("plan.json").write_text(json.dumps(content))
    assert told in refused(f"plan {MLP} --budget sparsity=0.6 --allocate plan.json")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: [", "not YAML"),
        ("- a", "no mapping"),
        ("metod: erk", "did you mean 'method'?"),
        ("1: 2", "unknown recipe key '1'"),
        ("min_density: null", "LAYERS=DENSITY is accepted"),
        ("max_density: [1, 2]", "LAYERS=DENSITY is accepted"),
        ("min_density: 5", "LAYERS=DENSITY is accepted"),
        ("!!python/object/apply:os.system ['touch made']", "not YAML"),
        ("seed: many", "seed='many'"),
        ("budget: [[0.5]]", "budget"),
        ("options: {bn: 3}", "options.bn=3"),
        ("min_density: fc", "LAYERS=DENSITY"),
        ("input: [3, 0, 8]", "input.1=0"),
    ],
)
def test_a_recipe_that_says_nothing_sensible_is_refused(text, told):
    assert told in refused(f"plan {NET} {recipe(text)}")
    assert not Path("made").exists()


def test_a_recipe_that_cannot_be_read_is_refused():
    Path("latin.yaml").write_bytes(b"model: \xff\xfe")
    for path in ("none.yaml", ".", "latin.yaml"):
        assert f"cannot read the recipe {path}" in refused(f"plan --recipe {path}")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("seed", "KEY=VALUE"),
        ("'seed=[1'", "not YAML"),
        ("sed=1", "did you mean 'seed'?"),
        ("seed=1.5", "seed=1.5"),
        ("options.variance.limt=5 --method erk", "did you mean 'limit'?"),
        ("options.erk.densities=5", "densities"),
        ("options.lamp.x=1", "lamp"),
        ("options.fcpts.stepps=5 --method fcpts", "unknown option of fcpts 'stepps': did you mean 'steps'?"),
        ("options.fcpts.evry=5 --method fcpts", "did you mean 'every'?"),
        ("options.fcpts.training=5 --method fcpts", "unknown option of fcpts 'training'"),
        ("options.fcpts.start=ekr --method fcpts", "unknown allocator 'ekr': did you mean 'erk'?"),
        ("options.fcpts.start=bn --method fcpts", "unknown allocator 'bn'"),
        ("options.fcpts.start=3 --method fcpts", "int is no method with role 'allocate'"),
        ("options.auto.among=[ekr] --allocate auto", "unknown allocator 'ekr': did you mean 'erk'?"),
        ("options.auto.among=3 --allocate auto", "names of allocators are accepted"),
        ("options.distill.steps=0 --repair distill", "steps=0"),
        ("options.distill.loss=[kl] --repair distill", "unknown loss"),
        ("seed.a=1", "seed"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(setting, told):
    assert told in refused(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --out RUN --set {setting}")
    assert not Path("RUN").exists()


def bomb(levels: int, link: str) -> str:
    first = f"options:\n  a0: &a0 {'{x: 1}' if link else '[x, x, x, x, x, x, x, x, x]'}\n"
    return first + "".join(
        f"  a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n"
        if link
        else f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
        for i in range(1, levels + 1)
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (bomb(8, ""), "holds 490,3"),
        (bomb(8, "<<"), "aliases written out"),
        ("options: &a {erk: *a}", "refers to itself"),
        ("budget: &a [*a]", "refers to itself"),
        ("options: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("options: " + "{a: " * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("\n".join(" " * i + "a:" for i in range(900)), "nested too deeply"),
        ("options: " + "x" * 10_000, "options="),
    ],
)
def test_a_recipe_that_grows_or_has_no_end_is_refused_at_once(text: str, says: str):
    Path("r.yaml").write_text(text)
    started = time.process_time()
    error = refused(f"plan {NET} --recipe r.yaml --budget 0.9")
    assert says in error and len(error) < 1000
    assert time.process_time() - started < 5


def test_a_recipe_is_read_no_further_than_recipes_are_long():
    assert "longer than" in refused(f"plan {NET} --recipe /dev/zero --budget 0.9")


def test_aliases_of_modest_size_are_read():
    Path("r.yaml").write_text("min_density: &d {classify: 0.5}\nmax_density: *d\n")
    layers = done(f"plan {NET} --recipe r.yaml --budget 0.9 --json").json["layers"]
    assert next(layer["density"] for layer in layers if layer["name"] == "classify.weight") == 0.5


@pytest.mark.parametrize("budget", ["0.9", "{Sparsity: 0.9}", "[sparsity=0.9]", "'0.9'"])
def test_a_budget_in_a_recipe_is_a_number_a_mapping_or_text(budget: str):
    Path("r.yaml").write_text(f"budget: {budget}\n")
    assert done(f"plan {NET} --recipe r.yaml --json").json["kept"] == 27061
