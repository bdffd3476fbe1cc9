"""Judge an allocation by a short repair: trained on one half of the calibration samples, scored on the other.

    masks       the best-scored weights in the counts of the allocation, selected again while weights train
    training    `steps` steps of distillation on the training half (none where `one_shot`)
    statistics  batch-norm re-estimation on the training half, say; without batch norm, a correction in its place
    loss        mean loss against the dense net on the judging half, in eval mode

Without training, or with too little, a net is near chance at high sparsity, and its loss no judge: decision 0010.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from allot.errors import UsageError, check_flag
from allot.methods.training.batch_loss import Kept
from allot.methods.training.distillation import Training, distil, distilled, distilling
from allot.methods.training.schedule import Schedule
from allot.processes import one_per_process, world_size
from allot.run.driver import repeatable
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.store import State


@dataclass(frozen=True)
class Trial:
    """How an allocation is judged; functions of a state, like those of a method.

    Args:
        training: the short repair, and the loss that judges.
        schedule: of masks and budget in this training.
        statistics: repairs after it; the first one that has anything to do in this model is done, and none where batch
            norms keep their running statistics.
        one_shot: no training; the masks of the candidate are judged.
    State:
        stage: 0: training; 1 ..: statistics; then judging; then done.
        candidate: `Candidate.to_state`, after the stages that are done.
        inner: state of this stage.
        losses: of each batch of the judging half so far.
        taken: steps taken.
    """

    training: Training = field(default_factory=lambda: Training(steps=40))
    schedule: Schedule = field(default_factory=Schedule)
    statistics: tuple[Method, ...] = ()
    one_shot: bool = False

    def __post_init__(self) -> None:
        check_flag("one_shot", self.one_shot)

    def steps(self, problem: Problem, candidate: Candidate) -> int:
        train, judge = halves(problem)
        statistics = self.statistics if train.batch_norm == "batch" else ()
        of_statistics = next((n for m in statistics if (n := m.init(train, candidate)["steps"])), 0)
        return int(of_statistics) + judge.inputs().batches + (0 if self.one_shot else self.training.fixed_length)

    def begin(self, problem: Problem, candidate: Candidate) -> State:
        """The state before the first step.

        Args:
            candidate: the allocation to judge, with masks where `one_shot`.
        Raises:
            UsageError: fewer than 2 calibration samples.
        """
        state: State = {"stage": -1, "candidate": candidate.to_state(), "inner": {}, "losses": [], "taken": 0}
        self._advance(halves(problem)[0], candidate, state)
        return state

    def step(self, problem: Problem, state: State, answers: Kept) -> Metrics:
        """One calibration batch, in place.

        Args:
            answers: as in `Distance.judge`, of the judging half, kept from trial to trial.
        """
        state["taken"] += 1
        train, judge = halves(problem)
        candidate = Candidate.from_state(state["candidate"], problem)
        stage, inner = state["stage"], state["inner"]
        with repeatable(problem.model, problem.seed, "trial", state["taken"]):  # the same draws for every individual
            if stage == 0:
                metrics = distil(self.training, self.schedule, train, candidate, inner)
                if finished(inner):
                    self._advance(train, distilled(self.training, train, candidate, inner), state)
                return metrics
            if stage <= len(self.statistics):
                method = self.statistics[stage - 1]
                metrics = method.step(train, candidate, inner)
                if finished(inner):
                    state |= {"stage": self._judging, "candidate": method.finish(train, candidate, inner).to_state()}
                return metrics
            loss, forward = self.training.judge(judge, candidate.effective(problem), len(state["losses"]), answers)
        state["losses"].append(loss)
        state["stage"] += len(state["losses"]) == judge.inputs().batches
        return {"forward": forward, "backward": 0, "loss": loss}

    def try_first(
        self, problem: Problem, state: State, waiting: Sequence[Callable[[], Candidate]], answers: Kept
    ) -> tuple[Metrics, list[float]]:
        """(metrics, losses of the first of `waiting`): one step of the first trial, whose loss is there at its end.

        Where processes share the work, whole trials of the first few, one a process.

        Args:
            state: of the method that tries: "step" counts, and "trial" is the current one.
            waiting: functions that make the candidates to be tried, with masks where `one_shot`.
        """
        if world_size() > 1:
            state["step"] -= state.pop("trial", {"taken": 0})["taken"]  # begun by one process alone: it begins again
            trials = one_per_process(waiting, lambda make: self._whole_trial(problem, make(), answers))
            state["step"] += sum(taken for *_, taken in trials)
            pushed = {key: sum(metrics[key] for metrics, *_ in trials) for key in ("forward", "backward")}
            return {**pushed, "loss": trials[-1][1]}, [loss for _, loss, _ in trials]
        if "trial" not in state:
            state["trial"] = self.begin(problem, waiting[0]())
        metrics = self.step(problem, state["trial"], answers)
        state["step"] += 1
        return metrics, [self.loss(state.pop("trial"))] if self.done(state["trial"]) else []

    def _whole_trial(self, problem: Problem, candidate: Candidate, answers: Kept) -> tuple[Metrics, float, int]:
        """(samples pushed, loss, steps) of a trial from its first step to its last."""
        state = self.begin(problem, candidate)
        pushed: Metrics = {"forward": 0, "backward": 0}
        while not self.done(state):
            metrics = self.step(problem, state, answers)
            pushed = {key: pushed[key] + metrics[key] for key in pushed}
        return pushed, self.loss(state), state["taken"]

    def done(self, state: State) -> bool:
        return bool(state["stage"] > self._judging)

    def loss(self, state: State) -> float:
        """The mean loss on the judging half."""
        return math.fsum(state["losses"]) / len(state["losses"])

    @property
    def _judging(self) -> int:
        return len(self.statistics) + 1

    def _advance(self, train: Problem, candidate: Candidate, state: State) -> None:
        """Begin the next stage that has a step to take."""
        state |= {"stage": state["stage"] + 1, "candidate": candidate.to_state(), "inner": {}}
        if state["stage"] == 0:
            if self.one_shot:
                return self._advance(train, candidate, state)
            state["inner"] = distilling(self.training, train, candidate)
        elif state["stage"] < self._judging:
            method = self.statistics[state["stage"] - 1]
            state["inner"] = method.init(train, candidate)
            if finished(state["inner"]) or train.batch_norm == "frozen":
                return self._advance(train, candidate, state)
        return None


def halves(problem: Problem) -> tuple[Problem, Problem]:
    """(problem on the training half of the calibration samples, on the judging half).

    Raises:
        UsageError: fewer than 2 calibration samples.
    """
    calibration = problem.inputs()
    if len(calibration) < 2:
        raise UsageError("an allocation is judged on samples that it was not trained on: give 2 or more.")
    train, judge = (replace(calibration, indices=calibration.indices[first::2]) for first in (0, 1))
    return replace(problem, calibration=train), replace(problem, calibration=judge)
