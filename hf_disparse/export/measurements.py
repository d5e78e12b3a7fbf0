"""What a model costs: parameters, zeros, bytes and milliseconds, measured."""

import statistics
import time
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from hf_disparse.config import PruningConfig
from hf_disparse.files import read_json
from hf_disparse.model.architectures import token_limit
from hf_disparse.model.loading import CONFIG_NAME, weight_files
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.sparsity import sparsity_report

_TOKENS, _ROUNDS = 64, 7
_FORMS = {
    "packed": "packed: non-zeros and one bit per weight",
    "ranks": "factorised: some matrices are products of two",
    "heads": "compact: pruned parts are removed",
    "neurons": "compact: pruned parts are removed",
}


def tokens_to_time(config: PreTrainedConfig) -> int:
    """Sequence length used for the latency measurement: 64, or fewer if the encoder has fewer positions."""
    return min(_TOKENS, token_limit(config) or _TOKENS)


def latency(model: MultitaskModel, tokens: int) -> dict[int, float]:
    """Times one pass of the encoder and the first head.

    Returns:
        batch size -> median milliseconds.
    """
    task, milliseconds = next(iter(model.tasks)), {}
    for size in (1, 32):
        ids = torch.full((size, tokens), 5, device=model.device)
        seconds = []
        for _ in range(_ROUNDS + 1):
            start = time.perf_counter()
            with torch.inference_mode():
                model(input_ids=ids, attention_mask=torch.ones_like(ids), task=task).logits.cpu()
            seconds.append(time.perf_counter() - start)
        milliseconds[size] = 1000 * statistics.median(seconds[1:])  # the first pass warms up
    return milliseconds


def size_and_speed(folder: Path, model: MultitaskModel, pruning: PruningConfig | None) -> list[tuple[str, str]]:
    """(what, value) for each measurement of the model in `folder`; removes the model's adapters."""
    parameters, tokens = sum(p.numel() for p in model.parameters()), tokens_to_time(model.encoder.config)
    times = latency(model, tokens)
    for task in list(model.adapters):  # sparsity is a property of the shared encoder
        model.delete_adapter(task)
    zeros = sparsity_report(model, model.encoder, prunable_parameters(model, pruning))
    form = read_json(folder / CONFIG_NAME).get("quantization_config") or {}
    held = {"packed"} & {key for key in form if form[key]} | set(form.get("structure") or {})
    forms = list(dict.fromkeys(text for key, text in _FORMS.items() if key in held))
    what = "zeros, or saved by low rank," if "ranks" in held else "zeros"
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return [
        ("parameters", f"{parameters:,}"),
        (f"{what} among the prunable weights", f"{100 * zeros['prunable']:.1f} %"),
        (f"{what} in the encoder", f"{100 * zeros['encoder']:.1f} %"),
        (f"{what} in the model", f"{100 * zeros['model']:.1f} %"),
        ("bytes of the weights' file", f"{sum(file.stat().st_size for file in weight_files(folder)):,}"),
        ("form of the file", ", ".join(forms) or "plain: zeros are stored in full"),
        *(
            (f"milliseconds, batch of {size}, {tokens} tokens, {device}", f"{milliseconds:.1f}")
            for size, milliseconds in times.items()
        ),
    ]
