"""`speed_up`: a pruned model that runs several times as fast in plain PyTorch, exactly."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from hf_disparse.config import UserError
from hf_disparse.fast.compiler import library
from hf_disparse.fast.encoder import FastForward
from hf_disparse.fast.families import family_of
from hf_disparse.fast.linear import FastLinear
from hf_disparse.fast.matrix import StoredMatrix
from hf_disparse.fast.packed import keeping_packed
from hf_disparse.fast.plan import Unfit

_SHAPES, _ROUNDS = ((1, 32), (2, 128)), 3  # texts and tokens, and passes of each, that decide whether a model gains
_TOLERANCE = 1e-4  # of the largest hidden state


def speed_up(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a model with zeros among its weights several times as fast, for inference, in place.

    On a CPU the encoder's matrices are stored without their zeros and the dense ones are dropped; known architectures run as one call
    of C, others multiply by sparse matrices. Logits stay the same up to rounding (1e-4 of the largest). On CUDA, matrices with two
    zeros in every four weights in half precision become torch's semi-structured ones. A model that is not faster stays as it is, with a
    warning. `undo_speed_up` makes an ordinary model of it again.

    Args:
        model: a transformers model or `MultitaskModel`, pruned by any tool, on a CPU in float32 or on CUDA in float16 or bfloat16.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: the model is in another precision, on another device, or has adapters.
    """
    encoder = _checked(model)
    model.eval()
    if next(encoder.parameters()).device.type == "cuda":
        return _semi_structured(model)
    try:
        library()
    except UserError as error:
        warnings.warn(f"speed_up: the model stays as it is: {error}", stacklevel=2)
        return model
    loaded = any(isinstance(module, FastLinear) for module in encoder.modules())  # from a packed checkpoint
    before = None if loaded else _seconds(model)
    _store(encoder)
    if family_of(encoder) is not None and not isinstance(encoder.forward, FastForward):
        _fuse(encoder)
    if before and (gain := min(b / a for b, a in zip(before, _seconds(model), strict=True))) < 1:
        undo_speed_up(model)
        warnings.warn(f"speed_up: the model stays as it is: it would be {gain:.2f} times as fast", stacklevel=2)
    return model


def undo_speed_up(model: PreTrainedModel) -> PreTrainedModel:
    """Makes an ordinary model of a sped-up one again, in place, which can be trained; returns it."""
    encoder = model.base_model
    if isinstance(encoder.forward, FastForward):
        del encoder.forward
    _replace(encoder, FastLinear, FastLinear.undone)
    return model


def is_sped_up(model: PreTrainedModel) -> bool:
    """Whether `speed_up` has changed this model."""
    return any(isinstance(module, FastLinear) for module in model.modules())


def load_fast(name_or_path: str, kind: type = AutoModel, **kwargs: Any) -> PreTrainedModel:
    """Loads a model and speeds it up; the matrices of a packed checkpoint never exist with their zeros.

    Args:
        name_or_path: a folder or an id on the Hub.
        kind: the class to load, such as `MultitaskModel` or `AutoModelForSequenceClassification`.
        kwargs: passed to `from_pretrained`; the weights are loaded in float32.

    Raises:
        UserError: as `speed_up`.
    """
    with keeping_packed():
        model = kind.from_pretrained(name_or_path, dtype=torch.float32, **kwargs)
    return speed_up(model)


def _checked(model: PreTrainedModel) -> nn.Module:
    """The model's encoder, if it can be sped up."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"speed_up: expected a transformers model, got a {type(model).__name__}")
    encoder = model.base_model
    adapter = next((name for name, module in encoder.named_modules() if hasattr(module, "base_layer")), None)
    if adapter is not None:
        raise UserError(
            f"speed_up: {adapter} has an adapter; merge adapters first, for instance by `export --format task`"
        )
    for name, parameter in encoder.named_parameters():
        device, dtype = parameter.device.type, parameter.dtype
        if (device, dtype) not in (("cpu", torch.float32), ("cuda", torch.float16), ("cuda", torch.bfloat16)):
            raise UserError(
                f"speed_up: expected float32 on a CPU, or float16 or bfloat16 on CUDA, got {dtype} on {device} ({name}); "
                "try model.float() first"
            )
    return encoder


def _store(encoder: nn.Module) -> None:
    """Replaces the encoder's Linear modules; in an unknown architecture only those that gain."""
    known = family_of(encoder) is not None
    poolers = {
        id(m) for name, m in encoder.named_modules() if "pooler" in name.split(".")
    }  # it sees one token per text

    def stored(linear: nn.Linear) -> nn.Module:
        if id(linear) in poolers:
            return linear
        matrix = StoredMatrix.fastest(linear.weight)
        if not known and not matrix.is_sparse:
            return linear
        return FastLinear(matrix, linear.bias).eval()

    _replace(encoder, nn.Linear, stored)


def _replace(encoder: nn.Module, kind: type, make: Callable[[nn.Module], nn.Module]) -> None:
    """Puts `make(module)` in the place, or the places, of every module of exactly this type."""
    made: dict[int, nn.Module] = {}
    for name, module in list(encoder.named_modules(remove_duplicate=False)):
        if type(module) is kind:
            made.setdefault(id(module), None)
            made[id(module)] = made[id(module)] or make(module)
            encoder.set_submodule(name, made[id(module)])


def _fuse(encoder: nn.Module) -> None:
    """Gives the encoder its fast forward, unless that differs from transformers' own on a small batch."""
    ids = torch.arange(40).reshape(4, 10) % (encoder.config.vocab_size - 3) + 2
    mask = torch.tensor([[1] * 10, [1] * 4 + [0] * 6, [0] * 3 + [1] * 7, [1] + [0] * 9])
    fast = FastForward(encoder)
    with torch.inference_mode():
        expected = encoder(input_ids=ids, attention_mask=mask)[0] * mask.unsqueeze(-1)
        try:
            got = fast.hidden(input_ids=ids, attention_mask=mask)
        except Unfit:
            return
    if (got - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        encoder.forward = fast


def _seconds(model: PreTrainedModel) -> list[float]:
    """The least time of the encoder for each of a few shapes."""
    encoder, least = model.base_model, []
    limit = getattr(encoder.config, "max_position_embeddings", None) or 512
    with torch.inference_mode():
        for texts, tokens in _SHAPES:
            ids = torch.full((texts, min(tokens, limit - 2)), 5 % encoder.config.vocab_size)
            times = []
            for _ in range(_ROUNDS):
                start = time.perf_counter()
                encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
                times.append(time.perf_counter() - start)
            least.append(min(times))
    return least


def _semi_structured(model: PreTrainedModel) -> PreTrainedModel:
    """Stores the encoder's matrices with two zeros in every four weights as torch's semi-structured tensors."""
    for module in model.base_model.modules():
        if type(module) is nn.Linear and module.in_features % 4 == 0:
            kept = torch.count_nonzero(module.weight.view(-1, 4), dim=1)
            if kept.max() <= 2:
                sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
                module.weight = nn.Parameter(sparse, requires_grad=False)
    return model
