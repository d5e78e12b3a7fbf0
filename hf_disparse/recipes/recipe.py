"""A recipe: one YAML file that is one complete run. Layer 10."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from hf_disparse.config import (
    Config,
    DataConfig,
    PruningConfig,
    TaskConfig,
    UserError,
    closest,
    is_count,
    one_line,
    require,
)
from hf_disparse.recipes.arguments import KINDS, check_training, in_float32_if_faster, training_arguments
from hf_disparse.recipes.yaml_text import parse_yaml
from hf_disparse.tasks.glue import glue_fields
from hf_disparse.trainer import DisparseTrainingArguments

SECTIONS = (
    "model",
    "tasks",
    "helpers",
    "teachers",
    "pruning",
    "training",
    "recovery",
    "seed",
    "output_dir",
    "dense_from",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Which encoder to start from.

    Args:
        encoder: a Hub id, a folder, or `package:NAME/path`.
        max_length: texts are cut to this many tokens.
    """

    encoder: str
    max_length: int = 128

    def __post_init__(self):
        require(isinstance(self.encoder, str) and bool(self.encoder), "encoder", "a Hub id or a folder", self.encoder)
        require(is_count(self.max_length, 3), "max_length", "a whole number of at least 3", self.max_length)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe.

    Args:
        helpers: tasks that train the dense model only: they are not evaluated, have no vote, and lose their heads.
        teachers: task -> the model to distil from, where it is not the run's dense model.
        training: fields of (Disparse)TrainingArguments for the dense and the sparse phase.
        recovery: what the sparse phase has in place of them. Both are without a bfloat16 that this CPU lacks.
        dense_from: the folder of a run or a comparison whose dense model is taken, rather than trained anew.
        values: the recipe as plain data, overrides applied: what a run folder remembers.
    """

    model: ModelConfig
    tasks: dict[str, tuple[TaskConfig, DataConfig]]
    helpers: tuple[str, ...]
    teachers: dict[str, str]
    pruning: PruningConfig
    training: dict[str, Any]
    recovery: dict[str, Any]
    seed: int
    output_dir: str
    dense_from: str | None
    values: dict[str, Any]

    def arguments(self, phase: str, folder: str | Path) -> DisparseTrainingArguments:
        """The training arguments of the `dense` or the `sparse` phase, with checkpoints in `folder`."""
        values = self.training if phase == "dense" else {**self.training, **self.recovery}
        return training_arguments(values, str(folder), self.seed)

    @property
    def voters(self) -> dict[str, tuple[TaskConfig, DataConfig]]:
        """The tasks that judge weights and are evaluated: all but the helpers."""
        return {name: entry for name, entry in self.tasks.items() if name not in self.helpers}

    @property
    def chooses_best(self) -> bool:
        """Whether half of the validation data chooses the best model, and only the other half is for metrics."""
        return any(self.arguments(phase, self.output_dir).load_best_model_at_end for phase in ("dense", "sparse"))


def public(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe is published with its model: no path of this machine."""

    def name(reference: str) -> str:
        path = Path(reference)
        return path.name if path.is_absolute() or path.exists() or ".." in path.parts else reference

    def split(source: DataConfig) -> str:
        part = source.validation_fraction
        return source.validation_split if part is None else f"{100 * part:g} % of {source.train_split}"

    data = {
        task: {"data": name(source.data), "subset": source.subset, "split": split(source)}
        for task, (_, source) in recipe.voters.items()
    }
    arguments = {
        section: {key: name(value) if isinstance(value, str) else value for key, value in values.items()}
        for section, values in (("training", recipe.training), ("recovery", recipe.recovery))
    }
    return {
        "encoder": name(recipe.model.encoder),
        "data": data,
        "helpers": list(recipe.helpers),
        "arguments": arguments,
    }


def read_recipe(path: str | Path, overrides: Sequence[str] = (), output_dir: str | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        overrides: `section.key=value` each, the value in YAML; `tasks.*.key` sets the key of every task.
        output_dir: instead of the recipe's.

    Raises:
        UserError: no such file, no YAML, an unknown or missing key, a value that is refused.
    """
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected a recipe, but reading it fails: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, too
        raise UserError(f"{path}: expected YAML, got a file that does not parse: {one_line(error)}") from None
    if not isinstance(values, dict):
        got = "an empty file" if values is None else KINDS.get(type(values), type(values).__name__)
        raise UserError(f"{path}: expected a mapping with the sections {', '.join(SECTIONS)}, got {got}")
    for override in overrides:
        _override(values, override)
    if output_dir is not None:
        values["output_dir"] = output_dir
    return parse_recipe(values)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Checks a recipe that was read; see `read_recipe`."""
    _check_keys(values, "recipe", depth=3)
    for key in values:
        if key not in SECTIONS:
            raise UserError(f"recipe: there is no section '{key}'{closest(key, SECTIONS)}")
    for key in ("model", "tasks", "output_dir"):
        if values.get(key) is None:
            raise UserError(f"recipe: the section '{key}' is required and was not given")
    sections = {key: {} if values.get(key) is None else values[key] for key in ("training", "recovery", "pruning")}
    for key, section in sections.items():
        require(isinstance(section, dict), key, "a mapping of fields to values", section)
    seed, output_dir = values.get("seed", 0), values["output_dir"]
    require(is_count(seed, 0) and seed < 2**32, "seed", "a whole number of at least 0 and below 2^32", seed)
    require(isinstance(output_dir, str) and bool(output_dir), "output_dir", "a folder", output_dir)
    dense_from = values.get("dense_from")
    good = dense_from is None or (isinstance(dense_from, str) and bool(dense_from))
    require(good, "dense_from", "the folder of a run or of a comparison", dense_from)
    training, recovery = sections["training"], sections["recovery"]
    check_training(training, "training")
    check_training(recovery, "recovery")
    training, recovery = in_float32_if_faster(training, recovery)
    tasks = _tasks(values["tasks"])
    recipe = Recipe(
        model=ModelConfig.from_dict(values["model"], "model"),
        tasks=tasks,
        helpers=_helpers(values.get("helpers"), tasks),
        teachers=_teachers(values.get("teachers"), tasks),
        pruning=PruningConfig.from_dict({"seed": seed, **sections["pruning"]}, "pruning"),
        training=training,
        recovery=recovery,
        seed=seed,
        output_dir=str(Path(output_dir).expanduser()),  # as TrainingArguments does it with the phases' folders
        dense_from=dense_from,
        values=values,
    )
    votes = len(recipe.voters)
    if recipe.pruning.quorum > votes:
        raise UserError(f"pruning.quorum: expected at most the number of tasks, {votes}, got {recipe.pruning.quorum}")
    dense, sparse = (recipe.arguments(phase, output_dir) for phase in ("dense", "sparse"))
    for arguments in (dense, sparse):
        _check_best_metric(recipe, arguments.metric_for_best_model)
    _check_teachers(recipe, dense.distils, sparse.distils)
    if "temperature" not in (dense.task_sampling, sparse.task_sampling):
        for section, key in product(("training", "recovery"), ("sampling_temperature", "sampling_cap")):
            value = sections[section].get(key)
            require(value is None, f"{section}.{key}", "nothing without task_sampling: temperature", value)
    return recipe


def _check_keys(values: dict, where: str, depth: int) -> None:
    """Every key is one line of text, down to the fields of a task."""
    for key, inner in values.items():
        require(isinstance(key, str) and key.isprintable(), where, "plain text as every key", key)
        if depth > 1 and isinstance(inner, dict):
            _check_keys(inner, key if where == "recipe" else f"{where}.{key}", depth - 1)


def _check_teachers(recipe: Recipe, dense: bool, sparse: bool) -> None:
    """Refuses teachers that teach nothing, and a dense phase that would learn from nobody; each flag is whether a phase distils."""
    if recipe.teachers and not (dense or sparse):
        raise UserError(
            "teachers: expected recovery.distillation or recovery.distillation_hidden above 0, got none that asks them"
        )
    untaught = [task for task in recipe.tasks if task not in recipe.teachers]
    if dense and untaught:
        raise UserError(
            f"training.distillation: expected a teacher of '{untaught[0]}' in the section 'teachers', for the dense phase has no "
            "other, got none; put distillation into recovery, where the dense model is the teacher"
        )


def _check_best_metric(recipe: Recipe, metric: str | None) -> None:
    """Refuses to choose the best checkpoint by a metric that evaluation will not have."""
    known = ["average", "loss"]
    for name, (task, _) in recipe.voters.items():
        known += [f"{name}_{metric}" for metric in (*task.metric, "loss")]
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise UserError(
            f"training.metric_for_best_model: evaluation has no '{metric}'; expected one of: {', '.join(known)}"
        )


def _tasks(values: Any) -> dict[str, tuple[TaskConfig, DataConfig]]:
    """Each entry holds fields of TaskConfig and of DataConfig side by side; `glue: NAME` fills in those of a GLUE task."""
    require(isinstance(values, dict) and len(values) > 0, "tasks", "a mapping of task names to fields", values)
    in_task = {f.name for f in fields(TaskConfig)} - {"name"}
    in_data = {f.name for f in fields(DataConfig)}
    tasks = {}
    for name, entry in values.items():
        where = f"tasks.{name}"
        require(isinstance(entry, dict), where, "a mapping of fields to values", entry)
        if None not in (entry.get("validation_split"), entry.get("validation_fraction")):
            raise UserError(
                f"{where}: expected validation_split or validation_fraction, got both; set one of them to null"
            )
        if "glue" in entry:
            own = {key: value for key, value in entry.items() if key != "glue"}
            entry = {**glue_fields(entry["glue"], f"{where}.glue"), **own}
        for key in entry:
            if key not in in_task | in_data:
                raise UserError(f"{where}.{key}: there is no such field{closest(key, sorted(in_task | in_data))}")
        task = TaskConfig.from_dict({"name": name, **{k: v for k, v in entry.items() if k in in_task}}, where)
        tasks[name] = (task, DataConfig.from_dict({k: v for k, v in entry.items() if k in in_data}, where))
    return tasks


def _helpers(names: Any, tasks: dict[str, Any]) -> tuple[str, ...]:
    """Those of the tasks that `helpers` names; at least one task is none."""
    names = [] if names is None else names
    require(isinstance(names, list), "helpers", "a list of tasks", names)
    for name in names:
        if name not in list(tasks):  # a list, for what YAML gives may not be hashable
            raise UserError(f"helpers: there is no task {name!r}{closest(name, tasks)}")
    require(len(set(names)) == len(names), "helpers", "names that differ from one another", names)
    require(len(names) < len(tasks), "helpers", "fewer names than there are tasks", names)
    return tuple(names)


def _teachers(names: Any, tasks: dict[str, Any]) -> dict[str, str]:
    """Task -> a model's name or folder."""
    names = {} if names is None else names
    require(isinstance(names, dict), "teachers", "a mapping of tasks to models", names)
    for task, name in names.items():
        if task not in tasks:
            raise UserError(f"teachers: there is no task '{task}'{closest(task, tasks)}")
        require(
            isinstance(name, str) and bool(name), f"teachers.{task}", "a folder that `train` wrote, or a Hub id", name
        )
    return names


def _override(values: dict[str, Any], override: str) -> None:
    """Applies one `section.key=value`, on copies of what it changes: a YAML alias is one mapping in several places."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override}: expected section.key=value, such as pruning.sparsity=0.9")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set {override}: expected a value in YAML, got {text!r}") from None
    places = [values]
    for depth, key in enumerate(keys[:-1]):
        where, inner = f"--set {'.'.join(keys[: depth + 1])}", []
        for place in places:
            for name in list(place) if key == "*" else [key]:
                section = {} if place.get(name) is None else place[name]  # absent, or a heading with nothing below it
                require(isinstance(section, dict), where, "a mapping", section)
                place[name] = dict(section)
                inner.append(place[name])
        require(len(inner) > 0, where, "something that '*' stands for", {})
        places = inner
    for place in places:
        place[keys[-1]] = value
