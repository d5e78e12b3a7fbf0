"""The methods beside pruning by scores, each with what it needs to know and no more."""

from dataclasses import dataclass
from typing import ClassVar

from hf_disparse.config.base import is_number, require
from hf_disparse.config.pruning import TASK_CRITERIA, WEIGHT_CRITERIA, PruningConfig


def _above_zero(config: PruningConfig, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        require(is_number(value) and value > 0, key, "a number above 0", value)


@dataclass(frozen=True, kw_only=True)
class DynamicConfig(PruningConfig):
    """Dynamic sparse training: at the target sparsity from the first step, weights are dropped and others grow instead.

    Args:
        sparsity, target_modules, exclude_modules, quorum, seed: as in `PruningConfig`.
        criterion: of the first mask, and of what is dropped if tasks decide that.
        decision: `unanimous` (a weight grows if any task wants it most), `quorum`, or `joint`, which is RigL.
        start_step: of the first mask.
        update_every: steps from one exchange of weights to the next.
        end_step: of the last exchange; by default after three quarters of training.
        score_batches: batches per task behind every scoring; each takes a backward pass.
        allocation: how many weights each matrix has: `erk` (Erdos-Renyi: the larger, the sparser), `uniform`, or `global`,
            where all weights compete with one another. From a pretrained encoder and at 90 % the first mask decides: by
            `snip` over all matrices it is the vote's own; by `magnitude` with `erk`, as RigL starts, little is left.
        drop: `magnitude`, or `disentangled`: what all tasks can spare by the criterion, which then needs gradients.
        drop_fraction: of the live weights that are exchanged at first; it falls to 0 as a cosine does.
    """

    method: ClassVar[str] = "dynamic"
    criteria: ClassVar[tuple[str, ...]] = WEIGHT_CRITERIA
    decisions: ClassVar[tuple[str, ...]] = ("unanimous", "quorum", "joint")
    schedules: ClassVar[tuple[str, ...]] = ("constant",)
    granularities: ClassVar[tuple[str, ...]] = ("weight",)
    end_share: ClassVar[float | None] = 0.75

    criterion: str = "snip"
    schedule: str = "constant"
    update_every: int = 100
    score_batches: int = 4
    allocation: str = "global"
    drop: str = "magnitude"
    drop_fraction: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        for key, known in (("allocation", ("erk", "uniform", "global")), ("drop", ("magnitude", "disentangled"))):
            value = getattr(self, key)
            require(value in known, key, f"one of {', '.join(known)}", value)
        fits = self.drop == "magnitude" or self.criterion in TASK_CRITERIA
        require(fits, "drop", f"magnitude with criterion {self.criterion} (set criterion: disparse)", self.drop)
        good = is_number(self.drop_fraction) and 0 <= self.drop_fraction < 1
        require(good, "drop_fraction", "a number in [0, 1)", self.drop_fraction)


@dataclass(frozen=True, kw_only=True)
class RankConfig(PruningConfig):
    """Pruning of the rank: every prunable matrix becomes the product of two, and components of that product go.

    Args:
        sparsity: fraction of the parameters of the prunable matrices, as they were dense, that is saved. The budget is one for
            all of them, and a component of each stays.
        criterion, decision, quorum, schedule, start_step, end_step, update_every, score_batches, target_modules,
            exclude_modules, seed, max_drop: as in `PruningConfig`; a component's score is the sum of those of its weights, per weight.
    """

    method: ClassVar[str] = "rank"
    criteria: ClassVar[tuple[str, ...]] = WEIGHT_CRITERIA
    granularities: ClassVar[tuple[str, ...]] = ("rank",)

    granularity: str | tuple[str, ...] = "rank"


@dataclass(frozen=True, kw_only=True)
class GroupLassoConfig(PruningConfig):
    """Group sparsity by proximal AdamW: a penalty on the norms of groups drives them to zero while the model is trained.

    At `end_step` exactly `round(sparsity * groups)` of each kind, those with the smallest norms, are pruned for good.

    Args:
        sparsity: fraction of the groups of each kind.
        granularity: the groups: `head`, `neuron` (or both), or `channel`, an input channel: a column of one prunable matrix.
            Channels are zeros within a matrix, which `compact` cannot take out.
        penalty: lambda, times the learning rate what a group's root mean square loses per step; by default as much as
            zeroes the groups by `end_step`.
        start_step: of the first proximal step.
        end_step: of the pruning; by default after three quarters of training.
        target_modules, exclude_modules: as in `PruningConfig`, with channels only.
        The other fields are not used: the norms are those of the one model that all tasks train.
    """

    method: ClassVar[str] = "group_lasso"
    criteria: ClassVar[tuple[str, ...]] = ("magnitude",)
    decisions: ClassVar[tuple[str, ...]] = ("joint",)
    schedules: ClassVar[tuple[str, ...]] = ("linear",)
    granularities: ClassVar[tuple[str, ...]] = ("head", "neuron", "channel")
    end_share: ClassVar[float | None] = 0.75

    granularity: str | tuple[str, ...] = ("head", "neuron")
    criterion: str = "magnitude"
    decision: str = "joint"
    schedule: str = "linear"
    penalty: float | None = None

    def __post_init__(self):
        super().__post_init__()
        good = self.penalty is None or (is_number(self.penalty) and self.penalty > 0)
        require(good, "penalty", "a number above 0, or nothing", self.penalty)


@dataclass(frozen=True, kw_only=True)
class MovementConfig(PruningConfig):
    """Movement pruning: every task sums -w g over its own training batches; what it moves towards zero may go.

    Scores go on for pruned weights, which may come back with the value they had. Takes no backward passes of its own, and
    memory for T + 1 float32 numbers a prunable weight until the last update, T being the number of tasks (1 if joint).

    Args:
        decision: `unanimous`, `quorum`, `mean_rank` or `joint`, which has one sum over all tasks. Scores have signs, so that
            there is no `sum` or `max`.
        start_step, end_step, update_every: of the cubic schedule; by default it ends after 60 % of training.
        mode: `hard` keeps the exact count of the schedule at every update; `soft` keeps what has a sigmoid of its score
            above `threshold` for one task (a quorum: for so many), but never less than the final sparsity leaves, and ends
            in the exact count by `decision`.
        threshold: of soft mode, below 0.73, where the scores start.
        penalty: of soft mode, how strongly the sum of the sigmoids of the scores is pulled down.
        score_learning_rate: of soft mode; penalty and learning rate are in units of the root mean square of w g, so that
            the scale of the loss does not matter.
        sparsity, quorum, target_modules, exclude_modules, max_drop: as in `PruningConfig`; the others are not used.

    Source: Sanh et al. 2020 (arXiv 2005.07683).
    """

    method: ClassVar[str] = "movement"
    criteria: ClassVar[tuple[str, ...]] = ("movement",)
    decisions: ClassVar[tuple[str, ...]] = ("unanimous", "quorum", "joint", "mean_rank")
    schedules: ClassVar[tuple[str, ...]] = ("cubic",)
    granularities: ClassVar[tuple[str, ...]] = ("weight",)
    end_share: ClassVar[float | None] = 0.6

    criterion: str = "movement"
    schedule: str = "cubic"
    mode: str = "hard"
    threshold: float = 0.1
    penalty: float = 1.0
    score_learning_rate: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        require(self.mode in ("hard", "soft"), "mode", "one of hard, soft", self.mode)
        fits = self.mode == "hard" or self.decision != "mean_rank"
        require(fits, "decision", "one of unanimous, quorum, joint with mode soft", self.decision)
        good = is_number(self.threshold) and 0 < self.threshold < 0.73
        require(good, "threshold", "a number in (0, 0.73), for scores start at sigmoid(1)", self.threshold)
        _above_zero(self, "penalty", "score_learning_rate")


@dataclass(frozen=True, kw_only=True)
class PlatonConfig(PruningConfig):
    """PLATON: every task smooths |w g| and its uncertainty over its own training batches; their product is the score.

    Takes no backward passes of its own, and memory for 2 T float32 numbers a prunable weight until the last update, T being
    the number of tasks (1 if joint).

    Args:
        decision: as in `PruningConfig`; `joint` smooths over the batches of all tasks, one after the other.
        start_step, end_step, update_every: of the cubic schedule; by default it ends after 60 % of training.
        beta1, beta2: of the moving averages of the importance and of its uncertainty, per batch of the task.
        sparsity, quorum, target_modules, exclude_modules, max_drop: as in `PruningConfig`; the others are not used.

    Source: Zhang et al. 2022 (arXiv 2206.12562).
    """

    method: ClassVar[str] = "platon"
    criteria: ClassVar[tuple[str, ...]] = ("platon",)
    schedules: ClassVar[tuple[str, ...]] = ("cubic",)
    granularities: ClassVar[tuple[str, ...]] = ("weight",)
    end_share: ClassVar[float | None] = 0.6

    criterion: str = "platon"
    schedule: str = "cubic"
    beta1: float = 0.85
    beta2: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(is_number(value) and 0 <= value < 1, key, "a number in [0, 1)", value)


@dataclass(frozen=True, kw_only=True)
class L0Config(PruningConfig):
    """A hard-concrete gate for every weight, and a Lagrangian that pulls the expected sparsity to a rising target.

    The gates belong to the one model that all tasks train, hence `joint`. Takes no backward passes of its own, and memory
    for 6 float32 numbers a prunable weight until the last update. Clipping counts the gradients of the gated weights.

    Args:
        start_step, end_step: the target rises linearly over the first 80 % of the steps between them; at the end the weights
            with the largest log_alpha stay, an exact count, and their gates become part of them. By default after 60 % of
            training, which takes hundreds of steps: a gate moves by its learning rate at most.
        drop_rate: of the gates at first, about; 0.05 leaves every gate without noise at 1.
        gate_learning_rate: of Adam on log_alpha.
        multiplier_learning_rate: of the gradient ascent on the two multipliers, which are in units of the root mean square
            of the gates' gradients, so that neither the scale of the loss nor the size of the model matters.
        seed: of the gates' noise, together with the step.
        sparsity, target_modules, exclude_modules: as in `PruningConfig`; the others are not used.

    Sources: Louizos et al. 2018 (arXiv 1712.01312), the Lagrangian Wang et al. 2020 (arXiv 1910.04732).
    """

    method: ClassVar[str] = "l0"
    criteria: ClassVar[tuple[str, ...]] = ("l0",)
    decisions: ClassVar[tuple[str, ...]] = ("joint",)
    schedules: ClassVar[tuple[str, ...]] = ("linear",)
    granularities: ClassVar[tuple[str, ...]] = ("weight",)
    end_share: ClassVar[float | None] = 0.6

    criterion: str = "l0"
    decision: str = "joint"
    schedule: str = "linear"
    drop_rate: float = 0.05
    gate_learning_rate: float = 0.1
    multiplier_learning_rate: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        good = is_number(self.drop_rate) and 0 < self.drop_rate < 1
        require(good, "drop_rate", "a number in (0, 1)", self.drop_rate)
        _above_zero(self, "gate_learning_rate", "multiplier_learning_rate")


@dataclass(frozen=True, kw_only=True)
class FlopConfig(L0Config):
    """FLOP: a hard-concrete gate for every component of matrices in two factors, W = up diag(z) down, as in `L0Config`.

    Args:
        sparsity: as in `RankConfig`. The target that rises is the fraction of the dense matrices' parameters that is saved, from
            below 0 on: at full rank, two factors take more than the matrix.
        The others are those of `L0Config`. The memory is that of one factor of each matrix.

    Source: Wang et al. 2020 (arXiv 1910.04732), sections 3.1 and 3.2.
    """

    method: ClassVar[str] = "flop"
    granularities: ClassVar[tuple[str, ...]] = ("rank",)

    granularity: str | tuple[str, ...] = "rank"
