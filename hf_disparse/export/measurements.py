"""What a model costs: parameters, zeros, bytes and milliseconds, measured."""

import copy
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_disparse.config import PruningConfig, UserError, one_line
from hf_disparse.fast.families import token_limit
from hf_disparse.fast.linear import FastLinear
from hf_disparse.fast.speed_up import speed_up
from hf_disparse.files import read_json
from hf_disparse.model.loading import CONFIG_NAME, weight_files
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.sparsity import sparsity_report
from hf_disparse.pruning.sped_up import is_sped_up

TOKENS = 64
_TEXTS, _ROUNDS, _SECONDS = (1, 32), 15, 0.75  # batch sizes, and the most passes and seconds for each
_TOO_LONG = 20.0  # seconds: a batch that takes longer is left out
_FORMS = {
    "packed": "packed: non-zeros and one bit per weight",
    "ranks": "factorised: some matrices are products of two",
    "heads": "compact: pruned parts are removed",
    "neurons": "compact: pruned parts are removed",
}


def tokens_to_time(config: PreTrainedConfig, tokens: int = TOKENS) -> int:
    """Returns `tokens`, or fewer if the encoder has fewer positions."""
    return min(tokens, token_limit(config) or tokens)


def measure_speed(model: MultitaskModel, tokens: int, dense: MultitaskModel | None = None) -> dict[str, Any]:
    """Times one pass of the encoder on one core, in plain torch and sped up by `speed_up`, in turns; takes about two seconds.

    Args:
        model: on a CPU; it stays as it is, because a copy of its encoder is sped up. Other precisions are timed as float32.
        tokens: length of the texts; at most as many as the encoder has positions.
        dense: what a compact model was before; else the model itself, whose zeros plain torch multiplies like any number.

    Returns:
        `tokens`, `threads`, `milliseconds` (number of texts -> {"dense": x, "fast": y}, the least of a few passes) and
        `megabytes` ({"dense": x, "fast": y}, the encoder's weights in memory, embeddings included). With `dense`, "compact" is
        the model in plain torch. Where `speed_up` leaves the model as it is, "fast" is missing and `reason` says why.
    """
    threads, training, encoder = torch.get_num_threads(), model.encoder.training, model.encoder.eval()
    if encoder.dtype != torch.float32:
        encoder = copy.deepcopy(encoder).float()
    encoders = {"dense": encoder} if dense is None else {"dense": dense.encoder.float().eval(), "compact": encoder}
    tokens = tokens_to_time(encoder.config, tokens)
    torch.set_num_threads(1)
    try:
        fast, reason = _sped_up(copy.deepcopy(encoder))
        if not reason:
            encoders["fast"] = fast
        milliseconds: dict[str, dict[str, float]] = {}
        for texts in _TEXTS:
            if texts == 1 or texts * milliseconds["1"]["dense"] < 1000 * _TOO_LONG:
                milliseconds[str(texts)] = _milliseconds(encoders, texts, tokens)
    finally:
        torch.set_num_threads(threads)
        model.encoder.train(training)
    found = {
        "tokens": tokens,
        "threads": 1,
        "milliseconds": milliseconds,
        "megabytes": {name: _bytes(encoder) / 1e6 for name, encoder in encoders.items()},
    }
    return {**found, "reason": reason} if reason else found


def _sped_up(encoder: nn.Module) -> tuple[nn.Module, str]:
    """Speeds an encoder up in place; returns it, and why it stays as it is, or ""."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            speed_up(encoder)
        except (UserError, MemoryError, RuntimeError) as error:  # torch raises RuntimeError where memory is short
            return encoder, one_line(error).removeprefix("speed_up: ")
    if is_sped_up(encoder):
        return encoder, ""
    said = (one_line(warning.message).removeprefix("speed_up: the model stays as it is: ") for warning in caught)
    return encoder, next(said, "none of its matrices has enough zeros")


def _milliseconds(encoders: Mapping[str, nn.Module], texts: int, tokens: int) -> dict[str, float]:
    """Returns the least milliseconds that each encoder takes for a batch without padding."""
    ids = torch.full((texts, tokens), 5 % encoders["dense"].config.vocab_size)
    mask, least, begin = torch.ones_like(ids), dict.fromkeys(encoders, float("inf")), time.perf_counter()
    for _ in range(_ROUNDS):
        for name, encoder in encoders.items():
            start = time.perf_counter()
            with torch.inference_mode():
                encoder(input_ids=ids, attention_mask=mask)
            least[name] = min(least[name], 1000 * (time.perf_counter() - start))
        if time.perf_counter() - begin > _SECONDS:
            break
    return least


def _bytes(encoder: nn.Module) -> int:
    """Returns the bytes of an encoder's weights in memory."""
    stored = sum(module.matrix.nbytes for module in encoder.modules() if isinstance(module, FastLinear))
    return stored + sum(tensor.nbytes for tensor in (*encoder.parameters(), *encoder.buffers()))


def size(folder: Path, model: MultitaskModel, pruning: PruningConfig | None) -> list[tuple[str, str]]:
    """Returns (what, value) for each measurement of the size of the model in `folder`; removes the model's adapters."""
    parameters = sum(p.numel() for p in model.parameters())
    for task in list(model.adapters):  # sparsity is a property of the shared encoder
        model.delete_adapter(task)
    zeros = sparsity_report(model, model.encoder, prunable_parameters(model, pruning))
    form = read_json(folder / CONFIG_NAME).get("quantization_config") or {}
    held = {"packed"} & {key for key in form if form[key]} | set(form.get("structure") or {})
    forms = list(dict.fromkeys(text for key, text in _FORMS.items() if key in held))
    what = "zeros, or saved by low rank," if "ranks" in held else "zeros"
    return [
        ("parameters", f"{parameters:,}"),
        (f"{what} among the prunable weights", f"{100 * zeros['prunable']:.1f} %"),
        (f"{what} in the encoder", f"{100 * zeros['encoder']:.1f} %"),
        (f"{what} in the model", f"{100 * zeros['model']:.1f} %"),
        ("bytes of the weights' file", f"{sum(file.stat().st_size for file in weight_files(folder)):,}"),
        ("form of the file", ", ".join(forms) or "plain: zeros are stored in full"),
    ]
