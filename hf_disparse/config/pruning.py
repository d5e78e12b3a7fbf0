"""How an encoder is made sparse: what all methods have in common."""

import dataclasses
import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import regex

from hf_disparse.config.base import Config, UserError, closest, is_count, is_number, one_line, require, strings

PRUNING_CONFIG_NAME = "pruning_config.json"
FORMAT_VERSION = 1

TASK_CRITERIA = ("snip", "disparse", "fisher")  # by gradients of a loss, so that they tell tasks apart
WEIGHT_CRITERIA = ("magnitude", *TASK_CRITERIA, "random")
PART_CRITERIA = ("taylor", "agreement")  # they judge a part as one, and no weight
CRITERIA = (*WEIGHT_CRITERIA, *PART_CRITERIA)
DECISIONS = ("unanimous", "quorum", "joint", "sum", "max", "mean_rank")
SCHEDULES = ("one_shot", "cubic")  # from no sparsity to all of it, so that a step can be undone
GRANULARITIES = ("weight", "head", "neuron", "layer", "channel", "rank")
_PATTERN = re.compile(r"(?P<n>[1-9]\d{0,4}):(?P<m>[1-9]\d{0,4})|block(?P<rows>[1-9]\d{0,4})x(?P<columns>[1-9]\d{0,4})")


@dataclass(frozen=True, kw_only=True)
class PruningConfig(Config):
    """How a shared encoder is made sparse by scores: criterion, decision, schedule.

    Args:
        sparsity: fraction of the prunable weights that ends up zero, in [0, 1); of the parts with another granularity.
        granularity: what goes: `weight`, or one or several of `head` (of attention), `neuron` (of the FFN) and `layer`, of
            each of which `sparsity` is pruned, but for the best one of its layer. Or a pattern of weights: `"2:4"` keeps 2
            of every 4 consecutive weights of a row (any N:M with sparsity 1 - N/M), `block16x16` prunes whole blocks.
        criterion: how one task scores a weight: `magnitude`, `snip` |w g|, `disparse` |g| w^2, `fisher` g^2 w^2 / 2, or
            `random`; of parts only also `taylor`, (sum of w g over the part)^2, and `agreement` of the tasks' gradients.
        decision: how the tasks' scores become one mask: `unanimous` (a weight goes only if all tasks spare it),
            `quorum` (it stays if at least `quorum` tasks want it), `sum` and `max` of the normalised scores,
            `mean_rank`, or `joint` (the losses are summed first: the control without disentangling).
        quorum: how many tasks must want a weight; only with `decision="quorum"`.
        schedule: `one_shot` at `start_step`, or `cubic` from `start_step` to `end_step`, scoring anew at each step.
        start_step, end_step, update_every: in optimizer steps; the last two only with `schedule="cubic"`.
        score_batches: batches per task behind each scoring.
        target_modules, exclude_modules: which Linear modules of the encoder to prune, with PEFT's meaning: a string is
            a regular expression for the whole name, a list holds names or their endings. Default: all in its layers.
        seed: of the random criterion and of the order of the scoring batches.
        max_drop: how many points (0 to 100, the mean of its metrics) pruning may cost a task, one number for all or task
            -> number. A step that costs more is undone and pruning ends. For a `DisparseTrainer` with evaluation data.
        reconstruct: after each change of the masks, fit what is left of every matrix (and its bias) by least squares to what
            the matrix did before, on the scoring batches, up to 8 of a task.
        reinitialise: draw the encoder's weights anew after the last update and train them within its masks: a control.
        keep_scores: store every task's scores of the last update in `scores/` of the Trainer's folder, 4 bytes a prunable
            weight and task, for `decide_again`.
    """

    method: ClassVar[str] = "saliency"
    # What a method knows of; its subclass narrows them, so that what cannot go together is refused at birth.
    criteria: ClassVar[tuple[str, ...]] = CRITERIA
    decisions: ClassVar[tuple[str, ...]] = DECISIONS
    schedules: ClassVar[tuple[str, ...]] = SCHEDULES
    granularities: ClassVar[tuple[str, ...]] = ("weight", "head", "neuron", "layer")
    end_share: ClassVar[float | None] = None  # of training, where `end_step` is left open

    sparsity: float = 0.8
    granularity: str | tuple[str, ...] = "weight"
    criterion: str = "disparse"
    decision: str = "unanimous"
    quorum: int = 1
    schedule: str = "one_shot"
    start_step: int = 0
    end_step: int | None = None
    update_every: int = 100
    score_batches: int = 32
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    seed: int = 0
    max_drop: float | dict[str, float] | None = None
    reconstruct: bool = False
    reinitialise: bool = False
    keep_scores: bool = False

    def __post_init__(self):
        for key, known, all_known in (
            ("criterion", self.criteria, CRITERIA),
            ("decision", self.decisions, DECISIONS),
            ("schedule", self.schedules, SCHEDULES),
        ):
            value = getattr(self, key)
            if value not in known and value in all_known:
                raise UserError(f"{key}: expected one of {', '.join(known)} with method {self.method}, got '{value}'")
            if value not in known:
                raise UserError(f"{key}: unknown value {value!r}{closest(value, known)}")
        for key, least in (("quorum", 1), ("start_step", 0), ("update_every", 1), ("score_batches", 1), ("seed", 0)):
            value = getattr(self, key)
            good = is_count(value, least) and value < 2**32
            require(good, key, f"a whole number of at least {least} and below 2^32", value)
        fits = self.quorum == 1 or self.decision == "quorum"
        require(fits, "quorum", f"1 with decision '{self.decision}' (set decision: quorum)", self.quorum)
        self._check_schedule()
        self._check_granularity()
        require(is_number(self.sparsity) and 0 <= self.sparsity < 1, "sparsity", "a number in [0, 1)", self.sparsity)
        self._check_pattern()
        self._check_modules()
        self._check_max_drop()
        self._check_keep_scores()
        for key in ("reconstruct", "reinitialise"):
            value = getattr(self, key)
            require(isinstance(value, bool), key, "true or false", value)
            fits = not value or self.method == PruningConfig.method
            require(fits, key, f"false with method {self.method}", True)
        fits = not self.reconstruct or "layer" not in self.granularity
        require(fits, "reconstruct", "false where layers are pruned, which leaves nothing to fit", True)
        if self.reinitialise:
            require(not self.reconstruct, "reconstruct", "false with reinitialise, which draws the weights anew", True)
            require(self.max_drop is None, "reinitialise", "false with max_drop, which measures trained weights", True)

    def _check_schedule(self) -> None:
        if self.schedule == "one_shot":
            require(self.end_step is None, "end_step", "nothing with schedule one_shot", self.end_step)
            return
        good = is_count(self.end_step, self.start_step + 1) or (self.end_step is None and self.end_share)
        expected = f"a step after start_step {self.start_step} for schedule {self.schedule}"
        require(bool(good), "end_step", expected, self.end_step)

    def _check_granularity(self) -> None:
        strings(self, "granularity", allow_empty=False)
        for kind in self.granularity:
            if kind not in self.granularities and not _PATTERN.fullmatch(kind):
                with_method = f" with method {self.method}" if kind in GRANULARITIES else ""
                known = (*self.granularities, *(("2:4", "block16x16") if self.method == PruningConfig.method else ()))
                raise UserError(f"granularity: unknown value {kind!r}{with_method}{closest(kind, known)}")
        alone = len(self.granularity) == 1 or all(kind in ("head", "neuron", "layer") for kind in self.granularity)
        require(alone, "granularity", "one alone, or several of head, neuron and layer", list(self.granularity))
        n, m = self.n_of_m or (0, 1)
        require(n < m, "granularity", "N below M in a pattern N:M", self.granularity[0])
        if self.criterion in PART_CRITERIA:
            require(self.prunes_parts, "granularity", f"parts with criterion {self.criterion}", self.granularity[0])
        if self.criterion == "agreement":
            fits = self.decision == "joint"
            require(fits, "decision", "joint with criterion agreement, which is of all tasks together", self.decision)

    def _check_modules(self) -> None:
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key)
            fits = value is None or not self.prunes_parts or self.granularity in (("rank",), ("channel",))
            require(fits, key, "nothing where parts are pruned, which go as a whole", value)
            if isinstance(value, str):
                _check_expression(value, key)
            elif value is not None:
                strings(self, key, allow_empty=False)

    def _check_keep_scores(self) -> None:
        require(isinstance(self.keep_scores, bool), "keep_scores", "true or false", self.keep_scores)
        if self.keep_scores:
            for key, why in (
                ("method", "" if self.method == PruningConfig.method else ", which has no scores of weights"),
                ("criterion", ", which has no scores of weights" if self.criterion in PART_CRITERIA else ""),
                ("decision", ", whose scores are of no single task" if self.decision == "joint" else ""),
                ("max_drop", ", which may undo the update they are of" if self.max_drop is not None else ""),
            ):
                require(not why, "keep_scores", f"false with {key} {getattr(self, key)}{why}", True)

    def _check_max_drop(self) -> None:
        drops = self.max_drop
        if drops is None:
            return
        fits = self.schedule in SCHEDULES
        require(
            fits, "max_drop", f"nothing with schedule {self.schedule}, whose sparsity does not grow in steps", drops
        )
        points = list(drops.values()) if isinstance(drops, dict) else [drops]
        good = bool(points) and all(is_number(value) and 0 <= value <= 100 for value in points)
        require(good, "max_drop", "points in 0 to 100, one number or a mapping of tasks to them", drops)
        if isinstance(drops, dict):
            object.__setattr__(self, "max_drop", dict(drops))

    def _check_pattern(self) -> None:
        kind = self.granularity[0]
        if self.n_of_m is None and self.block is None:
            return
        if self.method != PruningConfig.method:
            known = ", ".join(self.granularities)
            raise UserError(f"granularity: expected one of {known} with method {self.method}, got the pattern '{kind}'")
        if self.n_of_m is not None:
            n, m = self.n_of_m
            share = 1 - n / m
            fits = abs(self.sparsity - share) < 1e-9
            require(fits, "sparsity", f"{share:.10g} with granularity {kind}", self.sparsity)
            fits = self.schedule == "one_shot"
            require(fits, "schedule", f"one_shot with granularity {kind}, which has no steps", self.schedule)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) if the granularity is a pattern N:M."""
        match = _PATTERN.fullmatch(self.granularity[0])
        return (int(match["n"]), int(match["m"])) if match and match["n"] else None

    @property
    def block(self) -> tuple[int, int] | None:
        """(rows, columns) if the granularity is blocks."""
        match = _PATTERN.fullmatch(self.granularity[0])
        return (int(match["rows"]), int(match["columns"])) if match and match["rows"] else None

    @property
    def prunes_parts(self) -> bool:
        """True if heads, neurons or layers go as a whole."""
        return self.granularity != ("weight",) and self.n_of_m is None and self.block is None

    def to_dict(self) -> dict[str, Any]:
        """The fields, the method's name and the version of the format."""
        return {"method": self.method, "version": FORMAT_VERSION, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "") -> "PruningConfig":
        """The config of the method that `values` names; fields unknown to this version warn if a newer one wrote them."""
        values = dict(values) if isinstance(values, dict) else values
        if isinstance(values, dict):
            method, version = values.pop("method", cls.method), values.pop("version", FORMAT_VERSION)
            where = where or cls.__name__
            target = _method_class(method, where)
            known = {f.name for f in dataclasses.fields(target)}
            newer = [k for k in values if k not in known] if is_count(version, FORMAT_VERSION + 1) else []
            for key in newer:
                warnings.warn(f"{where}: ignoring '{key}' of format version {version} > {FORMAT_VERSION}", stacklevel=2)
                values.pop(key)
            if target is not cls:
                return super(PruningConfig, target).from_dict(values, where)
        return super().from_dict(values, where)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `pruning_config.json` into `folder`, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, PRUNING_CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_arguments) -> "PruningConfig":
        """Reads `pruning_config.json` from a folder, or from the Hub (`hub_arguments` go to `hf_hub_download`)."""
        path = Path(name_or_path, PRUNING_CONFIG_NAME)
        if not Path(name_or_path).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(name_or_path), PRUNING_CONFIG_NAME, **hub_arguments))
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; was this model pruned by hf_disparse?")
        try:
            values = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: expected JSON, got a file that does not parse ({error})") from None
        return cls.from_dict(values, where=PRUNING_CONFIG_NAME)


def _check_expression(text: str, key: str) -> None:
    """Refuses what is no regular expression, or one whose compilation alone takes long: configs come from strangers."""
    require(len(text) <= 1000, key, "a regular expression of at most 1,000 characters", text[:100])
    counts = [max(map(int, re.findall(r"\d+", braces)), default=1) for braces in re.findall(r"\{[\d, ]*\}", text)]
    fits = math.prod(max(count, 1) for count in counts) <= 10_000
    require(fits, key, "a regular expression whose counts, such as {2}, multiply to at most 10,000", text)
    try:
        re.compile(text)  # whose syntax it is to be; `regex` knows more, such as recursion
        regex.compile(text)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{key}: not a regular expression: {one_line(error)}") from None


def _method_class(method: str, where: str) -> type[PruningConfig]:
    """PruningConfig or the subclass whose `method` is the one asked for."""
    classes, todo = {}, [PruningConfig]
    while todo:
        one = todo.pop()
        classes[one.method] = one
        todo += one.__subclasses__()
    if method not in list(classes):  # a list, for what JSON gives may not be hashable
        raise UserError(f"{where}.method: unknown value {method!r}{closest(method, classes)}")
    return classes[method]
