"""The training arguments of a recipe: YAML values checked before transformers sees them."""

import types
import warnings
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from hf_disparse.config import UserError, closest, is_number, one_line, require
from hf_disparse.recipes.yaml_text import KINDS
from hf_disparse.trainer import DisparseTrainingArguments
from hf_disparse.trainer.arguments import cpu_has_bfloat16

# TrainingArguments checks few types and bounds; what it accepts wrongly fails deep inside torch.
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


def check_training(values: dict[str, Any], where: str) -> None:
    """Refuses values of the wrong type or out of bounds; their keys were checked before."""
    hints = get_type_hints(DisparseTrainingArguments)
    for key, value in values.items():
        choices = _choices(hints[key])
        if choices and value not in choices:
            remedy = "; put 'no' in quotes, as YAML reads it as false" if value is False and "no" in choices else ""
            raise UserError(f"{where}.{key}: unknown value {value!r}{remedy or closest(value, choices)}")
        kinds = _kinds(hints[key])
        expected = " or ".join(KINDS[kind] for kind in kinds)
        require(any(_is_a(value, kind) for kind in kinds), f"{where}.{key}", expected, value)
        least = _LEAST.get(key)
        require(least is None or value is None or value >= least, f"{where}.{key}", f"at least {least}", value)


def in_float32_if_faster(training: dict[str, Any], recovery: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns both sections, without bf16 if this CPU is slow at it, and warns.

    Recipes travel: one that takes minutes on the CPU it was written for would take hours here.
    """
    on_cpu = {**training, **recovery}.get("use_cpu")
    asked = training.get("bf16") or recovery.get("bf16")
    if not on_cpu or not asked or cpu_has_bfloat16():
        return training, recovery
    warnings.warn(
        "training.bf16: this CPU has no instructions for bfloat16, so float32 is ten times as fast: computing in float32",
        stacklevel=1,  # at this line, so that it is shown once, however many recipes are parsed
    )
    return tuple({key: value for key, value in section.items() if key != "bf16"} for section in (training, recovery))


def _choices(hint: Any) -> list[str]:
    """Returns the values of the enum in a field's annotation, as for `lr_scheduler_type`."""
    enums = [part for part in get_args(hint) if isinstance(part, type) and issubclass(part, Enum)]
    return [member.value for enum in enums for member in enum]


def _kinds(hint: Any) -> list[type]:
    """Returns the types of `KINDS` in a field's annotation; types that YAML cannot write (enums, classes) are left out."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    kind = get_origin(hint) or hint
    return [kind] if kind in KINDS else []


def _is_a(value: Any, kind: type) -> bool:
    """Whether a YAML value has that type: a whole number is also a number, true and false are not."""
    if kind is float:
        return is_number(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def training_arguments(values: dict[str, Any], output_dir: str, seed: int) -> DisparseTrainingArguments:
    """Builds the arguments of one phase; raises UserError for what only transformers or this machine can judge."""
    try:
        # disable_tqdm: its default depends on transformers' log level, which we lower.
        return DisparseTrainingArguments(output_dir=output_dir, seed=seed, **{"disable_tqdm": False, **values})
    except Exception as error:  # its checks raise errors of many types, all about the user's values
        if values.get("bf16") and "bf16" in str(error) and not values.get("use_cpu"):
            remedy = "set training.use_cpu: true to compute on the CPU, or training.bf16: false"
            raise UserError(f"training.bf16: this machine has no GPU with bfloat16; {remedy}") from error
        raise UserError(f"training: TrainingArguments refuses these values: {one_line(error)}") from error
