"""One task as ONNX, by torch's own exporter, checked in onnxruntime; needs the extra `onnx`."""

import contextlib
import copy
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_disparse.config import UserError, one_line
from hf_disparse.export.compact import drop_layers, remaining_heads
from hf_disparse.export.folder import copy_companions
from hf_disparse.export.measurements import tokens_to_time
from hf_disparse.export.task import check_task, only_task
from hf_disparse.fast.speed_up import undo_speed_up
from hf_disparse.files import new_folder
from hf_disparse.model.loading import open_model
from hf_disparse.model.multitask import MultitaskModel, head_config
from hf_disparse.model.structure import Cuts

ONNX_NAME = "model.onnx"
_ROUNDS, _TOLERANCE = 15, 1e-3


def save_onnx(model: PreTrainedModel | str | Path, folder: str | Path, task: str | None = None) -> dict[str, float]:
    """Writes `model.onnx` into the new folder `folder`: input_ids and attention_mask, (batch, tokens) int64, to logits.

    Both axes are dynamic. Skipped layers are left out, and compact models are exported as they are. The folder only
    appears once onnxruntime has run the file and returned torch's logits.

    Args:
        model: a MultitaskModel, a transformers classification model, or the folder or Hub id of either; a folder's
            tokenizer is copied, too.
        task: the head of a MultitaskModel to export; optional if it has only one.

    Returns:
        {"difference": largest difference of the logits, relative where they exceed 1, "speed": torch's time over
        onnxruntime's, batch of 1, 64 tokens or as many as the encoder takes}.

    Raises:
        UserError: the model has no such task, the extra is not installed, or onnxruntime's logits differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, torch's exporter needs it
    except ImportError as error:
        raise UserError(f"onnx: {error}; try: pip install 'hf_disparse[onnx]'") from None
    model, source = open_model(model)
    if isinstance(model, MultitaskModel):
        plain, config = _of_multitask(model, task)
    elif task is not None:
        raise UserError(f"task: must not be set for a model that has one task, got '{task}'")
    else:
        plain, config = (
            _Logits(model if source else undo_speed_up(copy.deepcopy(model)), None),
            copy.deepcopy(model.config),
        )
        config.__dict__.pop("quantization_config", None)  # describes safetensors files; there is none here
    plain = plain.float().cpu().eval()
    with new_folder(folder) as target:
        if source:
            copy_companions(source, target, tokenizer_only=True)
        config.save_pretrained(target)
        _export(plain, target / ONNX_NAME)
        session = onnxruntime.InferenceSession(target / ONNX_NAME, providers=["CPUExecutionProvider"])

        def run(inputs: dict[str, Tensor]) -> Tensor:
            return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

        return _check(plain, tokens_to_time(config), run)


class _Logits(nn.Module):
    """A model as a function of two tensors that returns one."""

    def __init__(self, model: PreTrainedModel, task: str | None):
        super().__init__()
        # Unwraps the autocast that mixed-precision training puts around a model's forward.
        self.model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
        self.task = {} if task is None else {"task": task}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.task).logits


def _of_multitask(model: MultitaskModel, task: str | None) -> tuple[_Logits, PreTrainedConfig]:
    """A copy of the encoder and one head without skipped layers, and the configuration of that task as a plain model."""
    if task is None and len(model.heads) > 1:
        raise UserError(f"task: must be set, because the model has several: {', '.join(model.heads)}")
    task = task or next(iter(model.heads))
    check_task(model, task)
    model = only_task(model, task)
    drop_layers(model, Cuts(None), remaining_heads(model))
    return _Logits(model, task), head_config(model.config.encoder_config, model.tasks[task])


def _batch(size: int, tokens: int) -> dict[str, Tensor]:
    """Token ids (size, tokens) that every vocabulary has; the last of several rows is half padding."""
    ids = torch.arange(size * tokens).reshape(size, tokens) % 37 + 5
    mask = torch.ones_like(ids)
    mask[-1, -(-tokens // 2) :] = 0 if size > 1 else 1
    return {"input_ids": ids, "attention_mask": mask}


def _export(model: nn.Module, path: Path) -> None:
    """Writes the ONNX file, without the exporter's output."""
    axes = {0: "batch", 1: "tokens"}
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of operators of libraries that are not installed
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                tuple(_batch(2, 8).values()),
                path,
                dynamo=True,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": axes, "attention_mask": axes},
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises types of its own
        raise UserError(f"onnx: torch cannot export this model: {one_line(error)}") from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _check(model: nn.Module, tokens: int, run: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, float]:
    """Compares `run`, the exported model, with `model`: logits at three shapes, then time in turns."""
    difference = 0.0
    with torch.inference_mode():
        for size, length in ((2, 8), (3, 13), (1, 4)):
            inputs = _batch(size, length)
            expected = model(**inputs)
            difference = max(
                difference, (run(inputs) - expected).abs().max().item() / max(1.0, expected.abs().max().item())
            )
        inputs, ratios = _batch(1, tokens), []
        for turn in range(_ROUNDS + 1):
            seconds = {}
            for name in ("torch", "onnxruntime")[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                model(**inputs) if name == "torch" else run(inputs)
                seconds[name] = time.perf_counter() - start
            ratios.append(seconds["torch"] / seconds["onnxruntime"])
    if not difference < _TOLERANCE:
        raise UserError(f"onnx: the logits of onnxruntime and torch differ by {difference:.2g}; nothing was written")
    return {"difference": difference, "speed": statistics.median(ratios[1:])}
