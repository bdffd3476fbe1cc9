"""Models, data and callers that are not ordinary: checkpoints, augmentation, inference mode, things made on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import allot
from allot.errors import Stopped, UsageError
from allot.methods import METHODS
from allot.methods.training.distillation import Training
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.problem import Candidate

INPUTS = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
TRAINING = [name for name in METHODS if name in ("fcpts", "fcpts-paper", "distill", "unipts", "auto")]


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


def pruned(model: nn.Module, data: Any = INPUTS, name: str = "fcpts", **given: Any) -> allot.Result:
    options = {name: {"steps": 12}} | given.pop("options", {})
    part = (
        {"repair": name, "allocate": "uniform"}
        if METHODS[name].role == "repair"
        else {"allocate": name, "repair": "bn"}
    )
    return allot.prune(model, data, "sparsity=0.6", options=options, **part, **given)


class Checkpointed(nn.Module):
    def __init__(self, *, again: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        norm = nn.BatchNorm1d(12, momentum=None)  # its mean is the same where each batch goes through twice
        self.body = nn.Sequential(nn.Linear(6, 12), norm, nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
        self.head, self.again = nn.Linear(12, 4), again

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x))


@pytest.mark.parametrize("name", TRAINING)
def test_parts_that_run_again_for_gradients_run_with_the_weights_that_are_trained(name: str):
    models = [Checkpointed(again=again).train() for again in (True, False)]
    before = {key: value.clone() for key, value in models[0].state_dict().items()}
    found = [pruned(model, name=name).state_dict() for model in models]
    assert all(torch.allclose(found[0][key], found[1][key], atol=1e-5) for key, _ in models[0].named_parameters())
    assert all(torch.equal(value, before[key]) for key, value in models[0].state_dict().items())


class Augmented(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((6,), i / 20.0) + torch.rand(6)


def test_a_run_on_augmented_data_goes_on_in_a_process_that_drew_something_else(tmp_path):
    model = net()
    whole = pruned(model, Augmented(), save_to=tmp_path / "whole")
    asked = iter([False] * 7)
    torch.manual_seed(5)
    with pytest.raises(Stopped):
        pruned(model, Augmented(), save_to=tmp_path / "parts", should_stop=lambda: next(asked, True))
    torch.manual_seed(6)
    parts = pruned(model, Augmented(), save_to=tmp_path / "parts")
    assert all(torch.equal(value, parts.state_dict()[key]) for key, value in whole.state_dict().items())


def test_a_model_that_draws_leaves_the_callers_stream_alone():
    class Drawing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, training=True))

    state = torch.random.get_rng_state()
    pruned(Drawing(nn.Linear(6, 16), nn.Linear(16, 4)), save_to=None)
    assert not torch.equal(state, torch.random.get_rng_state())  # by the weights of the model, just made
    model, state = Drawing(nn.Linear(6, 16), nn.Linear(16, 4)), torch.random.get_rng_state()
    pruned(model)
    assert torch.equal(state, torch.random.get_rng_state())


def test_samples_that_are_sometimes_flipped_do_not_count_as_repeating():
    class Flipped(Augmented):
        def __getitem__(self, i: int) -> Tensor:
            x = torch.arange(6.0) + i
            return x.flip(0) if torch.rand(()) < 0.5 else x

    for seed in range(20):
        torch.manual_seed(seed)
        assert not Calibration.of(Flipped(), batch_size=1).repeats()
    assert Calibration.of(INPUTS, batch_size=1).repeats()


@pytest.mark.parametrize("name", TRAINING)
def test_samples_of_several_shapes_one_at_a_time(name: str):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    samples = [torch.randn(3, 6 + i % 3, 7) for i in range(12)]
    assert pruned(model, samples, name, batch_size=1).report()["kept"]


@pytest.mark.parametrize("made_inside", [True, False])
@pytest.mark.parametrize("name", [*TRAINING, "layerwise"])
def test_callers_and_models_in_inference_mode(name: str, made_inside: bool):
    model = net()
    with torch.inference_mode():
        if made_inside:
            model = net()
        result = pruned(model, name=name)
    expected = pruned(net(), name=name)
    assert all(torch.equal(value, result.state_dict()[key]) for key, value in expected.state_dict().items())


def test_classes_are_the_first_dimension_of_volumes_too():
    model = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.Conv3d(6, 4, 1))
    x = torch.randn(2, 2, 3, 4, 5)
    problem = make_problem(model, allot.Budget(sparsity=0.5), allot.Unstructured(), calibration=Calibration.of(x))
    training = Training(temperature=1.0)
    pruned_weights = {"1.weight": torch.zeros(4, 6, 1, 1, 1)}
    answers: dict[str, list[Tensor]] = {}
    loss, _ = training.judge(problem, pruned_weights, 0, answers)
    (y,) = answers["0"]
    with torch.no_grad():
        z = torch.func.functional_call(model, pruned_weights, problem.inputs().batch(0)[0])
    expected = (y.softmax(1) * (y.log_softmax(1) - z.log_softmax(1))).sum(1).mean()
    assert loss == pytest.approx(float(expected), rel=1e-4)
    assert training.begin(problem, Candidate.dense(problem))["repeat"]


def test_a_model_that_makes_tensors_when_it_first_runs_says_so():
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "place"):
                self.register_buffer("place", torch.ones(8))
            return self.out(self.inside(x) + self.place)

    model = Growing()
    with pytest.raises(UsageError, match="made place when it first ran"):
        pruned(model)
    assert not hasattr(model, "place")  # as before the call
    model(INPUTS)
    assert pruned(model).report()["kept"]


# options


def test_a_start_takes_its_own_options_and_is_not_its_own_start():
    options = {"fcpts": {"steps": 4, "start": "auto"}, "auto": {"steps": 2, "loss": "mse"}}
    told = pruned(net(), options=options).report()["diagnostics"]
    assert told["auto"]["chosen"] and told["fcpts"]["trajectory"]
    with pytest.raises(UsageError, match=r"options\.fcpts\.start: fcpts cannot be that of itself"):
        pruned(net(), options={"fcpts": {"start": "fcpts"}})
    with pytest.raises(UsageError, match=r"options\.fcpts\.start: unknown allocator 'lampe'"):
        pruned(net(), options={"fcpts": {"start": "lampe"}})
    with pytest.raises(UsageError, match="no method of this run is called 'lamp'"):
        pruned(net(), options={"lamp": {}})


def test_a_repair_that_is_done_twice_has_its_options_twice():
    result = allot.prune(
        net(), INPUTS, "sparsity=0.6", allocate="uniform", repair="distill,distill",
        options={"distill": {"steps": 3, "learning_rate": 0.05}},
    )  # fmt: skip
    assert result.log.backward == 2 * 3 * 18


def test_functions_and_methods_among_the_options_are_written_down_by_name(tmp_path):
    def doubled(output: Tensor) -> Tensor:
        return 2 * output

    options = {"fcpts": {"steps": 3, "outputs": doubled, "start": METHODS["lamp"]}}
    pruned(net(), options=options, save_to=tmp_path / "run")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "doubled" in recipe and (tmp_path / "run" / "run.json").exists()


def test_a_run_that_ended_before_its_first_step_does_not_hold_its_directory(tmp_path):
    with pytest.raises(Stopped):
        pruned(net(), should_stop=lambda: True, save_to=tmp_path / "run")
    assert (tmp_path / "run" / "run.json").exists() and not (tmp_path / "run" / "steps.jsonl").read_text()
    pruned(net(), seed=1, save_to=tmp_path / "run")  # another configuration
    assert (tmp_path / "run" / "steps.jsonl").read_text()


def test_a_run_that_failed_leaves_no_directory(tmp_path):
    def wrong(output: Tensor) -> Tensor:
        raise KeyError("logits")

    with pytest.raises(UsageError, match=r"outputs failed on a model output of type Tensor: KeyError\('logits'\)"):
        pruned(net(), name="distill", options={"distill": {"outputs": wrong}}, save_to=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    pruned(net(), name="distill", save_to=tmp_path / "run")
    with pytest.raises(UsageError, match="outputs failed"):
        pruned(net(), options={"fcpts": {"steps": 2, "start": "uniform", "outputs": wrong}})


@pytest.mark.parametrize(
    ("outputs", "gave"), [(lambda z: z.argmax(1), "int64 values"), (lambda z: None, "NoneType"), (lambda z: [], "list")]
)
def test_a_function_that_gives_what_cannot_be_compared_is_named(outputs: Any, gave: str):
    with pytest.raises(UsageError, match=f"outputs gave {gave}"):
        pruned(net(), options={"fcpts": {"outputs": outputs}})


@pytest.mark.parametrize(("name", "flag"), [("auto", "--allocate auto"), ("distill", "--repair distill")])
def test_a_part_that_is_no_recipe_says_where_it_belongs(name: str, flag: str):
    with pytest.raises(UsageError, match=flag):
        allot.prune(net(), INPUTS, "sparsity=0.5", method=name)


@pytest.mark.parametrize(
    ("positional", "keywords"),
    [((0.75,), {}), (({"sparsity": 0.75},), {}), ((), {"sparsity": 0.75}), ((), {"sparsity": "75%", "params": "25%"})],
)
def test_a_number_a_dict_and_keywords_are_budgets(positional: tuple[Any, ...], keywords: dict[str, Any]):
    result = allot.prune(nn.Linear(8, 8), None, *positional, repair="none", **keywords)
    assert result.report()["kept"] == 16


def test_no_budget_two_budgets_and_misspelt_keywords_are_refused():
    with pytest.raises(UsageError, match="no budget"):
        allot.prune(net(), INPUTS)
    with pytest.raises(UsageError, match="two budgets"):
        allot.prune(net(), INPUTS, 0.5, sparsity=0.5)
    with pytest.raises(TypeError, match="'alocate'"):
        allot.prune(net(), INPUTS, 0.5, alocate="erk")
