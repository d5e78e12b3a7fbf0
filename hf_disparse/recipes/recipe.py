"""A recipe: one YAML file that describes one complete run."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_disparse.config import (
    Config,
    DataConfig,
    PruningConfig,
    TaskConfig,
    UserError,
    closest,
    ignored_settings,
    is_count,
    one_line,
    require,
    without_ignored,
)
from hf_disparse.recipes.keys import SECTIONS, check_sections, check_training_keys
from hf_disparse.recipes.yaml_text import KINDS, parse_yaml

if TYPE_CHECKING:
    from hf_disparse.trainer import DisparseTrainingArguments


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
        teachers: task -> the model to distil from, if it is not the run's dense model.
        dense: the training arguments of the dense phase; the trainer of a phase gets a copy with its own `output_dir`.
        sparse: the training arguments of the sparse phase.
        training: the section that `dense` and `sparse` were built from, without bf16 if this CPU is slow at it.
        recovery: the section that replaces some of them in the sparse phase, likewise.
        dense_from: the folder of a run or a comparison whose dense model is used instead of training one.
        values: the recipe as plain data, overrides applied, which a run folder remembers.
    """

    model: ModelConfig
    tasks: dict[str, tuple[TaskConfig, DataConfig]]
    helpers: tuple[str, ...]
    teachers: dict[str, str]
    pruning: PruningConfig
    dense: "DisparseTrainingArguments"
    sparse: "DisparseTrainingArguments"
    training: dict[str, Any]
    recovery: dict[str, Any]
    seed: int
    output_dir: str
    dense_from: str | None
    values: dict[str, Any]

    @property
    def voters(self) -> dict[str, tuple[TaskConfig, DataConfig]]:
        """The tasks that judge weights and are evaluated: all except the helpers."""
        return {name: entry for name, entry in self.tasks.items() if name not in self.helpers}

    @property
    def chooses_best(self) -> bool:
        """Whether half of the validation data chooses the best model, which leaves the other half for metrics."""
        return self.dense.load_best_model_at_end or self.sparse.load_best_model_at_end


def public(recipe: Recipe) -> dict[str, Any]:
    """Returns what is published of a recipe with its model, without the paths of this machine."""

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


def read_recipe(
    path: str | Path, overrides: Sequence[str] = (), output_dir: str | None = None, *, of_run: bool = False
) -> Recipe:
    """Reads and checks a recipe.

    Args:
        overrides: each `section.key=value` with the value in YAML; `tasks.*.key` sets the key of every task.
        output_dir: replaces the recipe's.
        of_run: whether nothing is to be trained: settings of `pruning` that its method ignores, as in the recipe of a run by
            an earlier version, are dropped.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or missing, or a value is refused.
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
    return parse_recipe(values, of_run=of_run)


def parse_recipe(values: dict[str, Any], *, of_run: bool = False) -> Recipe:
    """Checks the values of a recipe and builds both phases' training arguments; raises UserError as `read_recipe`."""
    check_sections(values)
    sections = {key: {} if values.get(key) is None else values[key] for key in ("training", "recovery", "pruning")}
    for key, section in sections.items():
        require(isinstance(section, dict), key, "a mapping of fields to values", section)
    seed, output_dir, dense_from = values.get("seed", 0), values["output_dir"], values.get("dense_from")
    require(is_count(seed, 0) and seed < 2**32, "seed", "a whole number of at least 0 and below 2^32", seed)
    require(isinstance(output_dir, str) and bool(output_dir), "output_dir", "a folder", output_dir)
    if dense_from is not None and not (isinstance(dense_from, str) and dense_from):
        raise UserError(f"dense_from: expected the folder of a run or of a comparison, got {dense_from!r}")
    for section in ("training", "recovery"):
        check_training_keys(sections[section], section)
    model = ModelConfig.from_dict(values["model"], "model")
    asked = without_ignored(sections["pruning"]) if of_run else sections["pruning"]
    default = {} if "seed" in ignored_settings(asked) else {"seed": seed}
    pruning = PruningConfig.from_dict({**default, **asked}, "pruning")
    tasks = _tasks(values["tasks"])
    helpers, teachers = _helpers(values.get("helpers"), tasks), _teachers(values.get("teachers"), tasks)
    votes = len(tasks) - len(helpers)
    if pruning.quorum > votes:
        raise UserError(f"pruning.quorum: expected at most the number of tasks, {votes}, got {pruning.quorum}")
    if not pruning.in_training and "distillation" not in {**sections["training"], **sections["recovery"]}:
        # The dense model teaches what shrinking lost.
        sections["recovery"] = {**sections["recovery"], "distillation": 0.5}
    dense, sparse, training, recovery = _phases(sections["training"], sections["recovery"], output_dir, seed)
    recipe = Recipe(
        model=model,
        tasks=tasks,
        helpers=helpers,
        teachers=teachers,
        pruning=pruning,
        dense=dense,
        sparse=sparse,
        training=training,
        recovery=recovery,
        seed=seed,
        output_dir=str(Path(output_dir).expanduser()),  # as TrainingArguments does
        dense_from=dense_from,
        values=values,
    )
    _check_phases(recipe)
    return recipe


def _phases(training: dict[str, Any], recovery: dict[str, Any], output_dir: str, seed: int) -> tuple:
    """Returns the arguments of the dense and of the sparse phase, and the two sections that they were built from."""
    # Late, as it loads torch and transformers: mistakes in all other sections were answered before.
    from hf_disparse.recipes.arguments import check_training, in_float32_if_faster, training_arguments

    check_training(training, "training")
    check_training(recovery, "recovery")
    training, recovery = in_float32_if_faster(training, recovery)
    dense, sparse = (training_arguments(phase, output_dir, seed) for phase in (training, {**training, **recovery}))
    return dense, sparse, training, recovery


def _check_phases(recipe: Recipe) -> None:
    """Refuses training arguments that the tasks and teachers do not fit, or that would be ignored."""
    dense, sparse = recipe.dense, recipe.sparse
    for arguments in (dense, sparse):
        _check_best_metric(recipe, arguments.metric_for_best_model)
    if recipe.teachers and not (dense.distils or sparse.distils):
        raise UserError(
            "teachers: they are set, but recovery.distillation and recovery.distillation_hidden are both 0; set one of them"
        )
    untaught = [task for task in recipe.tasks if task not in recipe.teachers]
    if dense.distils and untaught:
        raise UserError(
            f"training.distillation: task '{untaught[0]}' has no teacher in the section 'teachers', and the dense phase has "
            "no other; put distillation into recovery, where the dense model is the teacher"
        )
    if "temperature" not in (dense.task_sampling, sparse.task_sampling):
        for section, key in product(("training", "recovery"), ("sampling_temperature", "sampling_cap")):
            if getattr(recipe, section).get(key) is not None:
                raise UserError(f"{section}.{key}: must not be set without task_sampling: temperature")


def _check_best_metric(recipe: Recipe, metric: str | None) -> None:
    """Refuses a metric for the best checkpoint that evaluation does not have."""
    known = ["average", "loss"]
    for name, (task, _) in recipe.voters.items():
        known += [f"{name}_{metric}" for metric in (*task.metric, "loss")]
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise UserError(
            f"training.metric_for_best_model: evaluation has no '{metric}'; expected one of: {', '.join(known)}"
        )


def _tasks(values: Any) -> dict[str, tuple[TaskConfig, DataConfig]]:
    """Reads entries with the fields of TaskConfig and DataConfig side by side; `glue: NAME` fills in those of a GLUE task."""
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
            from hf_disparse.tasks.glue import glue_fields  # late, as it may load libraries for data

            own = {key: value for key, value in entry.items() if key != "glue"}
            entry = {**glue_fields(entry["glue"], f"{where}.glue"), **own}
        for key in entry:
            if key not in in_task | in_data:
                raise UserError(f"{where}.{key}: there is no such field{closest(key, sorted(in_task | in_data))}")
        task = TaskConfig.from_dict({"name": name, **{k: v for k, v in entry.items() if k in in_task}}, where)
        tasks[name] = (task, DataConfig.from_dict({k: v for k, v in entry.items() if k in in_data}, where))
    return tasks


def _helpers(names: Any, tasks: dict[str, Any]) -> tuple[str, ...]:
    """Checks the names of helper tasks; at least one task is not a helper."""
    names = [] if names is None else names
    require(isinstance(names, list), "helpers", "a list of tasks", names)
    for name in names:
        if name not in list(tasks):  # a list, as a YAML value may not be hashable
            raise UserError(f"helpers: there is no task {name!r}{closest(name, tasks)}")
    require(len(set(names)) == len(names), "helpers", "names that differ from one another", names)
    require(len(names) < len(tasks), "helpers", "fewer names than there are tasks", names)
    return tuple(names)


def _teachers(names: Any, tasks: dict[str, Any]) -> dict[str, str]:
    """Checks the mapping of tasks to the names or folders of models."""
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
    """Applies one `section.key=value`, on copies of what it changes, as a YAML alias is one mapping in several places."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UserError(f"overrides: expected section.key=value, such as pruning.sparsity=0.9, got {override!r}")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"overrides: expected a value in YAML after '{path}=', got {text!r}") from None
    places = [values]
    for depth, key in enumerate(keys[:-1]):
        where, inner = ".".join(keys[: depth + 1]), []
        for place in places:
            for name in list(place) if key == "*" else [key]:
                section = {} if place.get(name) is None else place[name]  # absent, or a heading without fields
                if not isinstance(section, dict):
                    raise UserError(f"overrides: expected a mapping at '{where}', got {section!r}")
                place[name] = dict(section)
                inner.append(place[name])
        if not inner:
            raise UserError(f"overrides: '*' in '{where}' matches no key")
        places = inner
    for place in places:
        place[keys[-1]] = value
