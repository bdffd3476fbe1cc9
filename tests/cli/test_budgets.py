"""Budgets asked for on the command line are met to the last weight."""

from __future__ import annotations

import pytest

from allot.sources import zoo
from cli.command import NET, done, exact, refused

NETS = sorted(zoo.MODELS)
# weights, MACs of one image and bytes of the file, where a limit lies well inside what can be met
LIMITS = ["macs=50%", "macs=1M", "params=20k", "params=12.5%", "bytes=25%", "bytes=300kB"]


def pruned(net: str, budget: str, more: str = "") -> dict:
    return done(f"prune zoo:{net} --budget {budget} --repair none --out RUN --json {more}").json


def planned(net: str, budget: str, more: str = "") -> dict:
    return done(f"plan zoo:{net} --budget {budget} --json {more}").json


@pytest.mark.parametrize("sparsity", ["0.5", "0.8", "0.9", "0.95", "0.98", "0.99"])
@pytest.mark.parametrize("net", NETS)
def test_sparsity_is_met_to_the_last_weight(net, sparsity):
    """A plan of each sparsity; of one, the run too, which keeps as many."""
    said = planned(net, f"sparsity={sparsity}")
    if sparsity == "0.95":
        run = pruned(net, f"sparsity={sparsity}")
        assert (run["layers"], run["budget"]) == (said["layers"], said["budget"])
    assert said["kept"] == exact(said["total"], sparsity) == sum(layer["kept"] for layer in said["layers"])
    assert said["budget"] == [{**said["budget"][0], "kind": "sparsity", "limit": float(sparsity), "met": True}]


@pytest.mark.parametrize(
    ("net", "limit"),
    [  # limits in bytes are checked on a run: of one number of them there is one, and of a share one for every net
        pytest.param(net, limit, marks=pytest.mark.slow if limit == "bytes=300kB" and f"zoo:{net}" != NET else ())
        for net in NETS
        for limit in LIMITS
    ],
)
def test_other_budgets_are_never_above_and_within_one_weight(net, limit, tmp_path):
    said = (pruned if limit.startswith("bytes") else planned)(net, limit, "--allocate uniform")
    row = said["budget"][0]
    assert row["met"] is True and row["achieved"] <= row["limit"]
    open_layers = [layer for layer in said["layers"] if layer["kept"] < layer["total"]]
    if row["kind"] == "macs":
        dearest = max(layer["macs"] / layer["total"] for layer in open_layers)
        assert row["limit"] - row["achieved"] < dearest
        spent = sum(layer["macs"] * layer["kept"] / layer["total"] for layer in said["layers"])
        assert row["achieved"] == pytest.approx(spent, abs=1)
    elif row["kind"] == "params":
        assert row["achieved"] == row["limit"] == said["kept"]
    else:
        size = (tmp_path / "RUN" / "model.bitmask.safetensors").stat().st_size
        assert size == row["achieved"] == said["bytes"]["file"]
        assert row["limit"] - size <= row["limit"] / 1000


def test_of_several_limits_all_hold_and_the_tightest_is_used_up():
    said = done(f"plan {NET} --budget sparsity=0.5,macs=20% --budget bytes=900kB --json").json
    assert [row["kind"] for row in said["budget"]] == ["sparsity", "macs", "bytes"]
    assert all(row["met"] for row in said["budget"])
    assert min(row["limit"] - row["achieved"] for row in said["budget"] if row["kind"] == "macs") < 300


@pytest.mark.parametrize("method", ["uniform", "erk", "lamp", "global", "global-normalised"])
def test_every_allocator_keeps_the_same_number_of_weights(method):
    said = done(f"plan {NET} --budget sparsity=0.9 --method {method} --json").json
    assert said["kept"] == 27061 and said["method"] == method


def test_two_of_four_is_refused_with_the_layer_that_does_not_divide():
    error = refused(f"prune {NET} --budget sparsity=0.5 --pattern 2:4 --repair none --out RUN", 3)
    assert "stem.0.weight" in error and "--exclude" in error


def test_two_of_four_leaves_excluded_layers_dense():
    line = f"prune {NET} --budget sparsity=0.5 --pattern 2:4 --exclude stem.* --repair none --out RUN --json"
    said = done(line).json
    assert {layer["density"] for layer in said["layers"]} == {0.5}
    assert said["skipped"]["stem.0.weight"] == "excluded by rule 'stem.*'"


def test_a_budget_that_the_pattern_cannot_meet_names_the_nearest_that_can():
    error = refused(f"plan {NET} --budget sparsity=0.8 --pattern 2:4 --exclude stem.*", 3)
    assert "sparsity=0.5" in error


def test_rules_on_layers_hold():
    rules = "--include blocks.* --include classify --exclude re:blocks.0.* --min-density classify=0.5"
    rules += " --max-density blocks.8.*=0.01 --floor 1/row"
    said = done(f"plan {NET} --budget sparsity=0.9 --json {rules}").json
    layers = {layer["name"]: layer for layer in said["layers"]}
    assert "stem.0.weight" not in layers and not any(name.startswith("blocks.0") for name in layers)
    assert said["skipped"]["stem.0.weight"] == "no include rule matches it"
    assert layers["classify.weight"]["density"] >= 0.5
    assert all(layer["density"] <= 0.01 for name, layer in layers.items() if name.startswith("blocks.8."))
    assert all(layer["kept"] >= layer["shape"][0] for layer in layers.values())
    assert said["kept"] == exact(said["total"], "0.9")


@pytest.mark.parametrize(("floor", "least"), [("7", 7), ("5%", 0.05)])
def test_no_layer_falls_below_the_floor(floor, least):
    layers = done(f"plan {NET} --budget sparsity=0.94 --floor {floor} --json").json["layers"]
    assert all(layer["kept"] >= (least if least > 1 else least * layer["total"]) for layer in layers)


@pytest.mark.parametrize(
    ("budget", "nearest"),
    [("bytes=10", "bytes="), ("params=1", "params="), ("macs=1", "macs="), ("sparsity=0.999999", "sparsity=")],
)
def test_a_budget_below_the_floors_names_the_nearest_that_can_be_met(budget, nearest):
    assert f"Nearest that can be met: {nearest}" in refused(f"plan {NET} --budget {budget}", 3)
    refused(f"prune {NET} --budget {budget} --repair none --out RUN", 3)
