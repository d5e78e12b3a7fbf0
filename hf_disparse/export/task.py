"""One task of a `MultitaskModel` as a plain transformers model, which needs no hf_disparse."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_disparse.config import UserError
from hf_disparse.export.card import write_task_card
from hf_disparse.export.compact import drop_layers
from hf_disparse.export.folder import copy_companions
from hf_disparse.fast.speed_up import undo_speed_up
from hf_disparse.files import new_folder
from hf_disparse.model.factorise import multiply_out
from hf_disparse.model.loading import open_model
from hf_disparse.model.low_rank import low_rank_modules
from hf_disparse.model.multitask import MultitaskModel, auto_class, head_config
from hf_disparse.model.structure import Cuts, StoredForm


def task_model(model: MultitaskModel, task: str) -> PreTrainedModel:
    """Copies the encoder and the head of `task` into transformers' own classification model of that architecture.

    The logits are the same, and `config.id2label` has the task's labels.

    Raises:
        UserError: the model has no such task, plain transformers cannot represent the encoder's shape, or merging an
            adapter would fill zeros.
    """
    check_task(model, task)
    if model.config.skipped_layers or model.adapters or model.config.unshared or low_rank_modules(model.encoder):
        model = only_task(model, task)
        multiply_out(model)  # larger than the factors, but plain transformers can read it
        drop_layers(model, Cuts(None), {})
    if isinstance(getattr(model.config, "quantization_config", None), StoredForm):
        raise UserError(
            "model: plain transformers cannot read a compact encoder whose layers differ in shape.\n"
            "Export the task from the model as it was before it was compacted."
        )
    config = model.tasks[task]
    full = auto_class(config).from_config(head_config(model.config.encoder_config, config), dtype=torch.float32)
    weights = {f"{full.base_model_prefix}.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    weights |= model.heads[task].state_dict()
    for name, tensor in full.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(weights[name].dtype)  # weights may differ in dtype
    full.load_state_dict(weights)
    return full.train(model.training)


def only_task(model: MultitaskModel, task: str) -> MultitaskModel:
    """Copies the model with this head alone; merges its adapter and its private layers into the encoder."""
    model = undo_speed_up(copy.deepcopy(model))
    for other in [name for name in model.heads if name != task]:
        model.remove_task(other)
    if model.adapters:
        model.merge_adapter()
    return model


def check_task(model: MultitaskModel, task: str) -> None:
    """Raises UserError if the model has no such task."""
    if task not in model.heads:
        raise UserError(f"task: the model has no task '{task}'; it has {', '.join(model.heads)}")


def save_tasks(
    model: MultitaskModel | str | Path,
    folder: str | Path,
    task: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    name: str | None = None,
) -> list[Path]:
    """Writes tasks of `model` into the new folder `folder`, for plain `AutoModelFor...` and `pipeline`.

    Args:
        model: a MultitaskModel, or the folder or Hub id of one; a folder's tokenizer is copied, too.
        task: the task to write into `folder` itself; default: every task, each into its own `folder/tasks/<name>`.
        dtype: of the floating point weights; default: unchanged.
        name: the Hub id that the cards' snippets load; default: the folder's name.

    Returns:
        The folders of the models.

    Raises:
        UserError: as `task_model`; also if `folder` is not new or the model has one task already.
    """
    model, source = open_model(model)
    if not isinstance(model, MultitaskModel):
        raise UserError(f"model: expected a MultitaskModel, got a {type(model).__name__}, which is one task already")
    names = list(model.heads) if task is None else [task]
    with new_folder(folder) as target:
        for each in names:
            subfolder = None if task else f"tasks/{each}"
            inner = target / (subfolder or "")
            inner.mkdir(parents=True, exist_ok=True)
            if source:
                copy_companions(source, inner, tokenizer_only=True)
            plain = task_model(model, each)
            if dtype:
                plain.to(dtype)
            plain.save_pretrained(inner)
            write_task_card(inner, model.tasks[each], plain, name or Path(folder).resolve().name, subfolder, source)
    return [Path(folder) if task else Path(folder, "tasks", each) for each in names]
