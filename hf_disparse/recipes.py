"""A recipe: one YAML file that is one complete run. Layer 10."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from hf_disparse.config import DataConfig, PruningConfig, TaskConfig, UserError, _Config, closest, is_count, require
from hf_disparse.trainer import DisparseTrainingArguments

SECTIONS = ("model", "tasks", "pruning", "training", "recovery", "seed", "output_dir")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Config):
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
        training: fields of (Disparse)TrainingArguments for the dense and the sparse phase.
        recovery: those that differ in the sparse phase.
        values: the recipe as plain data, overrides applied: what a run folder remembers.
    """

    model: ModelConfig
    tasks: dict[str, tuple[TaskConfig, DataConfig]]
    pruning: PruningConfig
    training: dict[str, Any]
    recovery: dict[str, Any]
    seed: int
    output_dir: str
    values: dict[str, Any]

    def arguments(self, phase: str, folder: str | Path) -> DisparseTrainingArguments:
        """The training arguments of the `dense` or the `sparse` phase, with checkpoints in `folder`."""
        values = self.training if phase == "dense" else {**self.training, **self.recovery}
        return _arguments(values, str(folder), self.seed)


def read_recipe(path: str | Path, overrides: Sequence[str] = (), output_dir: str | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        overrides: `section.key=value` each, the value in YAML; `tasks.*.key` sets the key of every task.
        output_dir: instead of the recipe's.

    Raises:
        UserError: no such file, no YAML, an unknown or missing key, a value that is refused.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: expected a recipe, got {type(error).__name__}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: expected YAML, got a file that does not parse: {_one_line(error)}") from None
    require(isinstance(values, dict), str(path), f"a mapping with the sections {', '.join(SECTIONS)}", values)
    for override in overrides:
        _override(values, override)
    if output_dir is not None:
        values["output_dir"] = output_dir
    return parse_recipe(values)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Checks a recipe that was read; see `read_recipe`."""
    for key in values:
        if key not in SECTIONS:
            raise UserError(f"recipe: there is no section '{key}'{closest(key, SECTIONS)}")
    for key in ("model", "tasks", "output_dir"):
        if values.get(key) is None:
            raise UserError(f"recipe: the section '{key}' is required and was not given")
    for key in ("training", "recovery", "pruning"):
        require(isinstance(values.get(key) or {}, dict), key, "a mapping of fields to values", values.get(key))
    seed, output_dir = values.get("seed", 0), values["output_dir"]
    require(is_count(seed, 0) and seed < 2**32, "seed", "a whole number of at least 0 and below 2^32", seed)
    require(isinstance(output_dir, str) and bool(output_dir), "output_dir", "a folder", output_dir)
    training, recovery = values.get("training") or {}, values.get("recovery") or {}
    _check_training(training, "training")
    _check_training(recovery, "recovery")
    _arguments({**training, **recovery}, output_dir, seed)
    recipe = Recipe(
        model=ModelConfig.from_dict(values["model"], "model"),
        tasks=_tasks(values["tasks"]),
        pruning=PruningConfig.from_dict({"seed": seed, **(values.get("pruning") or {})}, "pruning"),
        training=training,
        recovery=recovery,
        seed=seed,
        output_dir=output_dir,
        values=values,
    )
    if recipe.pruning.quorum > len(recipe.tasks):
        raise UserError(f"pruning.quorum: expected at most {len(recipe.tasks)} tasks, got {recipe.pruning.quorum}")
    return recipe


def _tasks(values: Any) -> dict[str, tuple[TaskConfig, DataConfig]]:
    """Each entry holds fields of TaskConfig and of DataConfig side by side."""
    require(isinstance(values, dict) and len(values) > 0, "tasks", "a mapping of task names to fields", values)
    in_task = {f.name for f in fields(TaskConfig)} - {"name"}
    in_data = {f.name for f in fields(DataConfig)}
    tasks = {}
    for name, entry in values.items():
        where = f"tasks.{name}"
        require(isinstance(entry, dict), where, "a mapping of fields to values", entry)
        for key in entry:
            if key not in in_task | in_data:
                raise UserError(f"{where}.{key}: there is no such field{closest(key, sorted(in_task | in_data))}")
        task = TaskConfig.from_dict({"name": name, **{k: v for k, v in entry.items() if k in in_task}}, where)
        tasks[name] = (task, DataConfig.from_dict({k: v for k, v in entry.items() if k in in_data}, where))
    return tasks


def _check_training(values: dict[str, Any], where: str) -> None:
    known = {f.name for f in fields(DisparseTrainingArguments) if f.init}
    for key in values:
        if key in ("output_dir", "seed"):
            raise UserError(f"{where}.{key}: set '{key}' at the top of the recipe")
        if key not in known:
            raise UserError(f"{where}.{key}: TrainingArguments has no such field{closest(key, sorted(known))}")


def _arguments(values: dict[str, Any], output_dir: str, seed: int) -> DisparseTrainingArguments:
    logging.set_verbosity_error()
    try:
        return DisparseTrainingArguments(output_dir=output_dir, seed=seed, **values)
    except (
        Exception
    ) as error:  # TrainingArguments raises whatever its checks meet; all of it is about the user's values
        raise UserError(f"training: TrainingArguments refuses these values: {_one_line(error)}") from None


def _override(values: dict[str, Any], override: str) -> None:
    """Applies one `section.key=value`."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override}: expected section.key=value, such as pruning.sparsity=0.9")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--set {override}: expected a value in YAML, got {text!r}") from None
    places = [values]
    for depth, key in enumerate(keys[:-1]):
        if key == "*":
            places = [inner for place in places for inner in place.values()]
        else:
            places = [place.setdefault(key, {}) for place in places]
            places = [place if place is not None else {} for place in places]
        for place in places:
            require(isinstance(place, dict), f"--set {'.'.join(keys[: depth + 1])}", "a mapping", place)
    for place in places:
        place[keys[-1]] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-5 is a number (in YAML 1.1, which PyYAML reads, it is a string); a key stands once."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' stands twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
