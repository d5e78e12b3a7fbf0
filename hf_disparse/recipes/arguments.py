"""The training arguments of a recipe: what YAML may say of them, checked before transformers sees it. Layer 10."""

import types
import warnings
from dataclasses import fields
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from hf_disparse.config import UserError, closest, is_number, one_line, require
from hf_disparse.trainer import DisparseTrainingArguments
from hf_disparse.trainer.arguments import cpu_has_bfloat16

# TrainingArguments checks few types and bounds; what it lets pass ends deep inside torch.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "dataloader_num_workers": 0,
    "save_total_limit": 1,
    "eval_accumulation_steps": 1,
    "sampling_temperature": 1,
    "sampling_cap": 1,
}
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    types.NoneType: "nothing",
}


def check_training(values: dict[str, Any], where: str) -> None:
    """Refuses fields that are not there, that a recipe has no use for, and values of another kind."""
    hints = get_type_hints(DisparseTrainingArguments)
    known = {f.name for f in fields(DisparseTrainingArguments) if f.init} - {"output_dir", "seed"}
    for key, value in values.items():
        if key in ("output_dir", "seed"):
            raise UserError(f"{where}.{key}: set '{key}' at the top of the recipe")
        if key.startswith("hub_") or key == "push_to_hub":  # `hub_token` would be published with the recipe
            raise UserError(f"{where}.{key}: a recipe does not push; `hf-disparse push` uploads the finished run")
        if key.endswith("_full_eval"):  # Trainer leaves the model in that precision, to be saved and trained on
            raise UserError(f"{where}.{key}: a recipe evaluates in the precision of training; set bf16: true for both")
        if key in ("prediction_loss_only", "label_names"):
            raise UserError(f"{where}.{key}: a recipe measures every task by its labels; leave it out")
        if key not in known:
            raise UserError(f"{where}.{key}: TrainingArguments has no such field{closest(key, sorted(known))}")
        choices = _choices(hints[key])
        if choices and value not in choices:
            remedy = "; put 'no' in quotes, for YAML reads it as false" if value is False and "no" in choices else ""
            raise UserError(f"{where}.{key}: unknown value {value!r}{remedy or closest(value, choices)}")
        kinds = _kinds(hints[key])
        expected = " or ".join(KINDS[kind] for kind in kinds)
        require(any(_is_a(value, kind) for kind in kinds), f"{where}.{key}", expected, value)
        least = _LEAST.get(key)
        require(least is None or value is None or value >= least, f"{where}.{key}", f"at least {least}", value)


def in_float32_if_faster(training: dict[str, Any], recovery: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sections without a bfloat16 that this CPU lacks, with a warning: recipes travel, and one that takes minutes elsewhere
    would take hours here."""
    on_cpu = {**training, **recovery}.get("use_cpu")
    asked = training.get("bf16") or recovery.get("bf16")
    if not on_cpu or not asked or cpu_has_bfloat16():
        return training, recovery
    warnings.warn(
        "training.bf16: this CPU has no instructions for bfloat16, without which float32 is ten times as fast: "
        "computing in float32",
        stacklevel=1,  # of this line, so that it is said once whoever parses how many recipes
    )
    return tuple({key: value for key, value in section.items() if key != "bf16"} for section in (training, recovery))


def _choices(hint: Any) -> list[str]:
    """The values of the enum that a field's annotation names, such as those of `lr_scheduler_type`."""
    enums = [part for part in get_args(hint) if isinstance(part, type) and issubclass(part, Enum)]
    return [member.value for enum in enums for member in enum]


def _kinds(hint: Any) -> list[type]:
    """The types of `KINDS` that a field's annotation admits; what YAML cannot write (enums, classes) is left out."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    kind = get_origin(hint) or hint
    return [kind] if kind in KINDS else []


def _is_a(value: Any, kind: type) -> bool:
    """Whether a YAML value is of that type: a whole number is a number too, true and false are not."""
    if kind is float:
        return is_number(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def training_arguments(values: dict[str, Any], output_dir: str, seed: int) -> DisparseTrainingArguments:
    """The arguments of one phase, whose values are checked; refuses what only transformers or this machine can judge."""
    try:
        # disable_tqdm: its default goes by transformers' log level, which we lower.
        return DisparseTrainingArguments(output_dir=output_dir, seed=seed, **{"disable_tqdm": False, **values})
    except Exception as error:  # its checks raise whatever they meet; all of it is about the user's values
        if values.get("bf16") and "bf16" in str(error) and not values.get("use_cpu"):
            remedy = "set training.use_cpu: true to compute on the CPU, or training.bf16: false"
            raise UserError(f"training.bf16: expected a GPU that knows bfloat16, got none; {remedy}") from error
        raise UserError(f"training: TrainingArguments refuses these values: {one_line(error)}") from error
