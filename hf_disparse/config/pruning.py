"""How an encoder is made sparse: pruning by scores, and what all methods have in common."""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import regex

from hf_disparse.config.base import Config, UserError, closest, is_count, is_number, one_line, require, strings

PRUNING_CONFIG_NAME = "pruning_config.json"
FORMAT_VERSION = 1

TASK_CRITERIA = ("snip", "disparse", "fisher")  # by gradients of a loss, so they differ between tasks
WEIGHT_CRITERIA = ("magnitude", *TASK_CRITERIA, "random")
PART_CRITERIA = ("taylor", "agreement")  # score parts as a whole, not weights
CRITERIA = (*WEIGHT_CRITERIA, *PART_CRITERIA)
DECISIONS = ("unanimous", "quorum", "joint", "sum", "max", "mean_rank")
SCHEDULES = ("one_shot", "cubic")  # sparsity grows from 0 in steps, so a step can be undone
_PARTS = ("head", "neuron", "layer")
GRANULARITIES = ("weight", "head", "neuron", "layer", "channel", "rank")
_PATTERN = re.compile(r"(?P<n>[1-9]\d{0,4}):(?P<m>[1-9]\d{0,4})|block(?P<rows>[1-9]\d{0,4})x(?P<columns>[1-9]\d{0,4})")


@dataclass(frozen=True, kw_only=True)
class PruningConfig(Config):
    """How a shared encoder is made sparse by scores: criterion, decision, schedule. Other methods have subclasses.

    A setting that would be ignored must stay at its default; a file that an earlier version wrote loads without it.

    Args:
        sparsity: fraction of the prunable weights that ends up zero, in [0, 1); with another granularity, of its parts.
        granularity: what is pruned: `weight`, or one or several of `head` (of attention), `neuron` (of the FFN) and `layer`.
            `sparsity` then applies to each of these kinds, and the best part of each layer always stays. Or a pattern of
            weights: `"2:4"` keeps 2 of every 4 consecutive weights of a row (any N:M with sparsity 1 - N/M), `block16x16`
            prunes whole blocks.
        criterion: how a task scores a weight: `magnitude`, `snip` |w g|, `disparse` |g| w^2, `fisher` g^2 w^2 / 2, or
            `random`. For parts also `taylor`, (sum of w g over the part)^2, and `agreement` of the tasks' gradients.
        decision: how the tasks' scores become one mask: `unanimous` (a weight is pruned only if all tasks can spare it),
            `quorum` (it stays if at least `quorum` tasks want it), `sum` and `max` of the normalised scores,
            `mean_rank`, or `joint` (scores of the summed losses: the control without disentangling).
        quorum: how many tasks must want a weight; only with `decision="quorum"`.
        schedule: `one_shot` at `start_step`, or `cubic` from `start_step` to `end_step` with new scores at each update.
        start_step, end_step: first and last update, in optimizer steps; `end_step` only with `schedule="cubic"`.
        update_every: optimizer steps between updates; only with `schedule="cubic"`.
        score_batches: batches per task for each scoring. `magnitude` and `random` need none, but `hf-disparse compare` gives
            every method as many backward passes as the recipe's scoring would take.
        target_modules, exclude_modules: which Linear modules of the encoder to prune, with PEFT's meaning: a string is a
            regular expression for the whole name, a list holds names or their endings. Default: all in its layers. Not with
            heads, neurons and layers, which are pruned as a whole.
        seed: seed of the random criterion, of the order of the scoring batches and of `reinitialise`.
        max_drop: how many points (0 to 100, the mean of its metrics) pruning may cost a task: one number for all, or a mapping
            of tasks to numbers. A step that costs more is undone and ends pruning. Needs a `DisparseTrainer` with evaluation
            data.
        reconstruct: after each change of the masks, fit the remaining weights of every matrix, and its bias, by least squares
            to the outputs before it, on up to 8 scoring batches per task.
        reinitialise: draw the encoder's weights anew after the last update and train them within its masks: a control.
        keep_scores: store every task's scores of the last update in `scores/` of the Trainer's folder, 4 bytes per prunable
            weight and task, for `decide_again`.
    """

    method: ClassVar[str] = "saliency"
    # The values that a method accepts; subclasses narrow them.
    criteria: ClassVar[tuple[str, ...]] = CRITERIA
    decisions: ClassVar[tuple[str, ...]] = DECISIONS
    schedules: ClassVar[tuple[str, ...]] = SCHEDULES
    granularities: ClassVar[tuple[str, ...]] = ("weight", *_PARTS)
    end_share: ClassVar[float | None] = None  # fraction of training after which pruning ends if `end_step` is None
    unused: ClassVar[tuple[str, ...]] = ()  # settings that the method ignores
    # Rows of `hf-disparse compare`: name -> settings beside the recipe's.
    rows: ClassVar[dict[str, dict[str, Any]]] = {
        "random": {"criterion": "random"},
        "magnitude": {"criterion": "magnitude"},
        "joint": {"decision": "joint"},
        "sum": {"decision": "sum"},
        "max": {"decision": "max"},
        "mean": {"decision": "mean_rank"},
        "quorum2": {"decision": "quorum", "quorum": 2},
        "unanimous": {"decision": "unanimous"},
        "reinitialise": {"decision": "unanimous", "reinitialise": True, "reconstruct": False},
        "parts": {"decision": "unanimous", "granularity": ["head", "neuron"]},
        "agreement": {"criterion": "agreement", "decision": "joint", "granularity": ["head", "neuron"]},
    }
    in_training: ClassVar[bool] = True  # whether it prunes during training, not before
    open_criterion: ClassVar[bool] = True  # whether a row that names no criterion has one for each of `--criteria`
    row_defaults: ClassVar[tuple[str, ...]] = ()  # settings that a row does not take from a recipe of another method

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
            if not (is_count(value, least) and value < 2**32):
                raise UserError(f"{key}: expected a whole number of at least {least} and below 2^32, got {value!r}")
        if self.quorum != 1 and self.decision != "quorum":
            raise UserError(
                f"quorum: must be 1 with decision '{self.decision}', got {self.quorum}; set decision: quorum"
            )
        self._check_granularity()
        self._check_unused()
        self._check_end_step()
        require(is_number(self.sparsity) and 0 <= self.sparsity < 1, "sparsity", "a number in [0, 1)", self.sparsity)
        self._check_pattern()
        self._check_modules()
        self._check_max_drop()
        self._check_flags()

    def _check_unused(self) -> None:
        """Refuses settings that would be ignored."""
        why = self.ignored(vars(self))
        for field in dataclasses.fields(self):
            if field.name in why and getattr(self, field.name) != field.default:
                raise UserError(f"{field.name}: not used {why[field.name]}; remove it")

    @classmethod
    def ignored(cls, settings: Mapping[str, Any]) -> dict[str, str]:
        """Returns the settings that a config with all these `settings` would ignore -> why, as in "by method l0"."""
        why = {}
        kinds = settings["granularity"]
        for kind in kinds if isinstance(kinds, (list, tuple)) else (kinds,):
            if kind in _PARTS:
                why |= dict.fromkeys(("target_modules", "exclude_modules"), f"where a {kind} is pruned as a whole")
        if settings["schedule"] in ("one_shot", "linear"):
            why["update_every"] = f"with schedule {settings['schedule']}"
        if settings["schedule"] == "one_shot":
            why["end_step"] = "with schedule one_shot"
        return why | dict.fromkeys(cls.unused, f"by method {cls.method}")

    def _check_end_step(self) -> None:
        if self.schedule == "one_shot" or (self.end_step is None and self.end_share):
            return
        if not is_count(self.end_step, self.start_step + 1):
            raise UserError(
                f"end_step: expected a step after start_step {self.start_step} for schedule {self.schedule}, got "
                f"{self.end_step!r}"
            )

    def _check_granularity(self) -> None:
        strings(self, "granularity", allow_empty=False)
        for kind in self.granularity:
            if kind not in self.granularities and not _PATTERN.fullmatch(kind):
                with_method = f" with method {self.method}" if kind in GRANULARITIES else ""
                known = (*self.granularities, *(("2:4", "block16x16") if self.method == PruningConfig.method else ()))
                raise UserError(f"granularity: unknown value {kind!r}{with_method}{closest(kind, known)}")
        if len(self.granularity) > 1 and not set(self.granularity) <= set(_PARTS):
            got = list(self.granularity)
            raise UserError(f"granularity: expected a single one, or several of head, neuron and layer, got {got}")
        n, m = self.n_of_m or (0, 1)
        require(n < m, "granularity", "N below M in a pattern N:M", self.granularity[0])
        if self.criterion in PART_CRITERIA and not self.prunes_parts:
            raise UserError(
                f"granularity: criterion {self.criterion} scores parts such as head or neuron, got '{self.granularity[0]}'"
            )
        if self.criterion == "agreement" and self.decision != "joint":
            raise UserError(
                f"decision: expected joint with criterion agreement, which is one score of all tasks, got '{self.decision}'"
            )

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
            if abs(self.sparsity - share) >= 1e-9:
                raise UserError(f"sparsity: expected {share:.10g} with granularity {kind}, got {self.sparsity}")
            if self.schedule != "one_shot":
                raise UserError(
                    f"schedule: expected one_shot with granularity {kind}, which has no steps, got '{self.schedule}'"
                )

    def _check_modules(self) -> None:
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key)
            if isinstance(value, str):
                _check_expression(value, key)
            elif value is not None:
                strings(self, key, allow_empty=False)

    def _check_max_drop(self) -> None:
        drops = self.max_drop
        if drops is None:
            return
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"max_drop: must not be set with schedule {self.schedule}, whose sparsity does not grow in steps"
            )
        points = list(drops.values()) if isinstance(drops, dict) else [drops]
        if not points or not all(is_number(value) and 0 <= value <= 100 for value in points):
            raise UserError(
                f"max_drop: expected points in 0 to 100, one number or a mapping of tasks to numbers, got {drops!r}"
            )
        if isinstance(drops, dict):
            object.__setattr__(self, "max_drop", dict(drops))

    def _check_flags(self) -> None:
        """Refuses `reconstruct`, `reinitialise` and `keep_scores` where they cannot work."""
        by_scores = self.method == PruningConfig.method
        refused = {
            "reconstruct": {
                f"method {self.method}": not by_scores,
                "granularity layer, which leaves no weights to fit": "layer" in self.granularity,
                "reinitialise, which draws the weights anew": self.reinitialise is True,
            },
            "reinitialise": {
                f"method {self.method}": not by_scores,
                "max_drop, which measures trained weights": self.max_drop is not None,
            },
            "keep_scores": {
                f"method {self.method}, which does not score weights": not by_scores,
                f"criterion {self.criterion}, which does not score weights": self.criterion in PART_CRITERIA,
                "decision joint, whose scores belong to no single task": self.decision == "joint",
                "max_drop, which may undo the update that is scored": self.max_drop is not None,
            },
        }
        for key, reasons in refused.items():
            value = getattr(self, key)
            require(isinstance(value, bool), key, "true or false", value)
            for reason, holds in reasons.items():
                if value and holds:
                    raise UserError(f"{key}: must be false with {reason}")

    def chosen_by(self) -> str:
        """Returns how the pruned weights or parts were chosen, as the end of a sentence of the model card."""
        if self.criterion == "agreement":
            return "by the agreement of the tasks' gradients on them"
        if self.criterion in ("magnitude", "random"):
            return f"by the criterion `{self.criterion}`, which is the same for all tasks"
        if self.decision == "joint":
            return f"by the criterion `{self.criterion}` of {self._decided_by()}"
        return f"by {self._decided_by()}, each task judging by the criterion `{self.criterion}`"

    def _decided_by(self) -> str:
        """Returns the decision in words, as in "by ..."."""
        return {
            "unanimous": "what all tasks can spare",
            "quorum": f"what fewer than {self.quorum} tasks want",
            "joint": "the summed loss of all tasks",
            "mean_rank": "the mean rank over the tasks",
        }.get(self.decision, f"the {self.decision} of the tasks' scores")

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """Returns (N, M) if the granularity is a pattern N:M."""
        match = _PATTERN.fullmatch(self.granularity[0])
        return (int(match["n"]), int(match["m"])) if match and match["n"] else None

    @property
    def block(self) -> tuple[int, int] | None:
        """Returns (rows, columns) if the granularity is a block."""
        match = _PATTERN.fullmatch(self.granularity[0])
        return (int(match["rows"]), int(match["columns"])) if match and match["rows"] else None

    @property
    def prunes_parts(self) -> bool:
        """Whether parts are pruned as a whole: heads, neurons, layers, channels or ranks."""
        return self.granularity != ("weight",) and self.n_of_m is None and self.block is None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, the method's name and the version of the format."""
        return {"method": self.method, "version": FORMAT_VERSION, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "") -> "PruningConfig":
        """Returns the config of the method that `values` names; fields of a newer version are ignored with a warning."""
        values = dict(values) if isinstance(values, dict) else values
        if isinstance(values, dict):
            method, version = values.pop("method", _implied_method(values, cls)), values.pop("version", FORMAT_VERSION)
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
        """Writes `pruning_config.json` into `folder`, creating it if needed."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, PRUNING_CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_arguments) -> "PruningConfig":
        """Reads `pruning_config.json` from a folder or the Hub (`hub_arguments` go to `hf_hub_download`).

        Settings that an earlier version accepted and ignored are dropped.
        """
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
        return cls.from_dict(without_ignored(values), where=PRUNING_CONFIG_NAME)


def ignored_settings(values: Any) -> dict[str, str]:
    """Returns the settings that the config of a section `pruning` would ignore -> why; none if its method is unknown."""
    if not isinstance(values, Mapping):
        return {}
    method = values.get("method", _implied_method(values, PruningConfig))
    if method not in list(_methods()):
        return {}
    cls = _methods()[method]
    return cls.ignored({field.name: field.default for field in dataclasses.fields(cls)} | dict(values))


def without_ignored(values: Any) -> Any:
    """Returns the section without the settings that its config would ignore; what is no section comes back as it is."""
    why = ignored_settings(values)
    return {key: value for key, value in values.items() if key not in why} if why else values


def _check_expression(text: str, key: str) -> None:
    """Refuses an invalid regular expression, or one that takes long to compile: configs come from strangers."""
    require(len(text) <= 1000, key, "a regular expression of at most 1,000 characters", text[:100])
    counts = [max(map(int, re.findall(r"\d+", braces)), default=1) for braces in re.findall(r"\{[\d, ]*\}", text)]
    if math.prod(max(count, 1) for count in counts) > 10_000:
        raise UserError(
            f"{key}: expected a regular expression whose counts, such as {{2}}, multiply to at most 10,000, got {text!r}"
        )
    try:
        re.compile(text)  # defines the syntax; `regex` accepts more, such as recursion
        regex.compile(text)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{key}: not a regular expression: {one_line(error)}") from None


def _implied_method(values: Mapping[str, Any], cls: type[PruningConfig]) -> str:
    """Returns the method of a section that names none: who asks for a speed prunes to a speed."""
    return "speed" if {"speedup", "latency_ms"} & set(values) else cls.method


def _methods() -> dict[str, type[PruningConfig]]:
    """Returns the method's name -> its config class, for PruningConfig and all its subclasses."""
    classes, todo = {}, [PruningConfig]
    while todo:
        one = todo.pop()
        classes[one.method] = one
        todo += one.__subclasses__()
    return classes


def _method_class(method: str, where: str) -> type[PruningConfig]:
    """Returns the config class of a method; raises UserError if there is none."""
    classes = _methods()
    if method not in list(classes):  # a list, as a value from JSON may not be hashable
        raise UserError(f"{where}.method: unknown value {method!r}{closest(method, classes)}")
    return classes[method]
