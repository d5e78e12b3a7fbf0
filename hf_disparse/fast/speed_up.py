"""`speed_up`: a pruned model that runs several times as fast in plain PyTorch, exactly."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from hf_disparse.config import UserError, one_line
from hf_disparse.fast.compiler import library
from hf_disparse.fast.encoder import FastForward
from hf_disparse.fast.families import family_of, token_limit
from hf_disparse.fast.linear import FastLinear
from hf_disparse.fast.matrix import StoredMatrix
from hf_disparse.fast.packed import keeping_packed
from hf_disparse.fast.plan import Unfit
from hf_disparse.fast.semi_structured import SemiStructuredLinear, semi_structured
from hf_disparse.pruning.sped_up import is_sped_up

_SHAPES, _ROUNDS = ((1, 32), (2, 128)), 3  # texts and tokens, and passes of each, that decide whether a model gains
_TOLERANCE = 1e-4  # of the largest hidden state


def speed_up(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a model with zeros among its weights several times as fast, for inference, in place.

    On a CPU the encoder's matrices are stored without their zeros and the dense ones are dropped; known architectures run as one call
    of C, others multiply by sparse matrices. Logits stay the same up to rounding (1e-4 of the largest); only the hidden states of
    padding become 0. On CUDA, matrices with two zeros in every four weights in half precision become torch's semi-structured ones.
    A model that is not faster stays as it is, with a warning.

    `state_dict`, `save_pretrained` and the exports write the same weights as before. To train or compact the model, call
    `undo_speed_up` first. Heads, biases, norms and embeddings stay ordinary parameters.

    Args:
        model: a transformers model or `MultitaskModel`, pruned by any tool, on a CPU in float32 or on CUDA in float16 or bfloat16.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: the model is in another precision, on another device, has adapters, or does not run on token ids alone.
    """
    encoder = _checked(model)
    model.eval()
    if next(encoder.parameters()).device.type == "cuda":
        return semi_structured(model)
    loaded = is_sped_up(model)  # from a packed checkpoint, or by an earlier call
    try:
        library()
    except UserError as error:
        warnings.warn(f"speed_up: the model stays as it is: {error}", stacklevel=2)
        return undo_speed_up(model)
    before = None if loaded else _seconds(model)
    fuse(encoder)
    if before and (gain := min(b / a for b, a in zip(before, _seconds(model), strict=True))) < 1:
        warnings.warn(f"speed_up: the model stays as it is: it would be {gain:.2f} times as fast", stacklevel=2)
        return undo_speed_up(model)
    return model


def fuse(encoder: nn.Module) -> None:
    """Stores an encoder's matrices and gives it the fast forward, in place, whether or not it gains by that."""
    _store(encoder)
    _fuse(encoder)


def undo_speed_up(model: PreTrainedModel) -> PreTrainedModel:
    """Makes an ordinary model of a sped-up one again, in place: the same weights bit for bit, except for the sign of zeros.

    The matrices are new parameters, so create optimizers and `MaskHooks` afterwards. A model that is not sped up stays as it is.

    Returns:
        The model, which can be trained.
    """
    encoder = _encoder_of(model, "undo_speed_up")
    if isinstance(encoder.__dict__.get("forward"), FastForward):
        del encoder.forward
    _replace(encoder, FastLinear, FastLinear.undone)
    _replace(encoder, SemiStructuredLinear, SemiStructuredLinear.undone)
    return model


def load_fast(name_or_path: str, kind: type = AutoModel, **kwargs: Any) -> PreTrainedModel:
    """Loads a model and speeds it up; the sparse matrices of a packed checkpoint never exist with their zeros.

    Args:
        name_or_path: a folder or an id on the Hub.
        kind: the class to load, such as `MultitaskModel` or `AutoModelForSequenceClassification`.
        kwargs: passed to `kind.from_pretrained`; the weights are loaded in float32 on the CPU.

    Raises:
        UserError: as `speed_up`.
    """
    if kwargs.pop("dtype", torch.float32) not in (torch.float32, "float32", "auto"):
        raise UserError("load_fast: `dtype` must be float32, because the fast encoder computes in it")
    with keeping_packed():
        model = kind.from_pretrained(name_or_path, dtype=torch.float32, **kwargs)
    return speed_up(model)


def _encoder_of(model: PreTrainedModel, where: str) -> nn.Module:
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{where}: expected a transformers model or a MultitaskModel, got a {type(model).__name__}")
    return model.base_model


def _checked(model: PreTrainedModel) -> nn.Module:
    """The model's encoder, if it can be sped up."""
    encoder = _encoder_of(model, "speed_up")
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
    poolers = {id(m) for name, m in encoder.named_modules() if "pooler" in name.split(".")}  # see one token per text

    def stored(linear: nn.Linear) -> nn.Module:
        if id(linear) in poolers or not _is_plain(linear):
            return linear
        matrix = StoredMatrix.fastest(linear.weight)
        if not known and not matrix.is_sparse:
            return linear
        return FastLinear(matrix, linear.bias, linear.weight.requires_grad).eval()

    _replace(encoder, nn.Linear, stored)


def _is_plain(linear: nn.Linear) -> bool:
    """Whether a Linear module does nothing but multiply: it has no hooks, which would be lost."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return not any(hooks) and "forward" not in linear.__dict__ and set(linear._parameters) == {"weight", "bias"}


def _replace(encoder: nn.Module, kind: type, make: Callable[[nn.Module], nn.Module]) -> None:
    """Puts `make(module)` in the place, or the places, of every module of exactly this type."""
    made: dict[int, nn.Module] = {}
    for name, module in list(encoder.named_modules(remove_duplicate=False)):
        if type(module) is kind and name:
            if id(module) not in made:
                made[id(module)] = make(module)
            encoder.set_submodule(name, made[id(module)])


def _fuse(encoder: nn.Module) -> None:
    """Gives the encoder its fast forward, unless that differs from transformers' own on a small batch."""
    if family_of(encoder) is None or "forward" in encoder.__dict__:  # another library's forward is left alone
        return
    length, words = _length(encoder, 10), encoder.config.vocab_size
    ids = (torch.arange(3 * length).reshape(3, length) % max(words - 3, 1) + 2) % words
    mask = torch.tensor([[1] * 10, [1] * 4 + [0] * 6, [1] + [0] * 9])[:, :length]
    with torch.inference_mode():
        output = type(encoder).forward(encoder, input_ids=ids, attention_mask=mask)
        expected, fast = output[0] * mask.unsqueeze(-1), FastForward(encoder, type(output))
        try:
            got = fast.hidden(input_ids=ids, attention_mask=mask)
        except Unfit:
            return
    if (got - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        encoder.forward = fast


def _length(encoder: nn.Module, most: int) -> int:
    """`most` tokens, or as many as the encoder's positions allow."""
    return min(most, token_limit(encoder.config) or most)


def _seconds(model: PreTrainedModel) -> list[float]:
    """The least time of the encoder for each of a few shapes."""
    encoder, least = model.base_model, []
    with torch.inference_mode():
        for texts, tokens in _SHAPES:
            ids = torch.full((texts, _length(encoder, tokens)), 5 % getattr(encoder.config, "vocab_size", 64))
            times = []
            for _ in range(_ROUNDS):
                start = time.perf_counter()
                try:
                    encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
                except Exception as error:  # one of images, or a decoder with inputs of its own, may raise anything
                    raise UserError(
                        f"speed_up: {type(encoder).__name__} does not run on token ids alone: {one_line(error)}"
                    ) from error
                times.append(time.perf_counter() - start)
            least.append(min(times))
    return least
