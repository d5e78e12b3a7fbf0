"""One task of a `MultitaskModel` as a plain model, for people who do not have this package. Layer 7."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_disparse.config import UserError
from hf_disparse.export.card import write_task_card
from hf_disparse.export.compact import drop_layers
from hf_disparse.export.folder import copy_companions
from hf_disparse.files import new_folder
from hf_disparse.model.factorise import multiply_out
from hf_disparse.model.loading import open_model
from hf_disparse.model.low_rank import low_rank_modules
from hf_disparse.model.multitask import MultitaskModel, auto_class, head_config
from hf_disparse.model.structure import Cuts, StoredForm


def task_model(model: MultitaskModel, task: str) -> PreTrainedModel:
    """The encoder and the head of `task` as transformers' own classification model of that architecture.

    Its logits are the model's, its `config.id2label` the task's labels; weights are copied.

    Raises:
        UserError: no such task, an encoder of a shape that plain transformers has not, or an adapter whose merge fills
            zeros.
    """
    check_task(model, task)
    if model.config.skipped_layers or model.adapters or model.config.unshared or low_rank_modules(model.encoder):
        model = only_task(model, task)
        multiply_out(model)  # no smaller than it was, but what plain transformers reads
        drop_layers(model, Cuts(None), {})
    if isinstance(getattr(model.config, "quantization_config", None), StoredForm):
        raise UserError(
            f"--format task: expected an encoder with the same shape in each layer, got a compact one of {task}, which plain "
            "transformers cannot read; export the model as it was before it was compact"
        )
    config = model.tasks[task]
    full = auto_class(config).from_config(head_config(model.config.encoder_config, config), dtype=torch.float32)
    weights = {f"{full.base_model_prefix}.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    weights |= model.heads[task].state_dict()
    for name, tensor in full.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(weights[name].dtype)  # which may differ from one to the next
    full.load_state_dict(weights)
    return full.train(model.training)


def only_task(model: MultitaskModel, task: str) -> MultitaskModel:
    """A copy with that head alone, its adapter merged into the encoder, which has its own layers if it has some."""
    model = copy.deepcopy(model)
    for other in [name for name in model.heads if name != task]:
        model.remove_task(other)
    if model.adapters:
        model.merge_adapter()
    return model


def check_task(model: MultitaskModel, task: str) -> None:
    """Refuses a task that the model has not."""
    if task not in model.heads:
        raise UserError(f"--task: the model has no task '{task}'; it has {', '.join(model.heads)}")


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
        model: a MultitaskModel, or the folder or Hub id of one; from a folder, its tokenizer comes along.
        task: the one to write into `folder` itself; by default every task, each into `tasks/<name>` of it.
        dtype: of the floating point weights; default: as they are.
        name: the Hub id that the cards' snippets load; default: the folder's name.

    Returns:
        The folders of the models.
    """
    model, source = open_model(model)
    if not isinstance(model, MultitaskModel):
        raise UserError(
            f"--format task: expected a MultitaskModel, got a {type(model).__name__}, which is one task already"
        )
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
