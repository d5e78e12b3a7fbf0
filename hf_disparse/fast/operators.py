"""The C calls as operators of torch, through which `torch.compile` and `torch.export` see a sped-up model.

An operator takes tensors and numbers, so modules are named by a number that holds in this process alone: a program that
`torch.export` has saved runs where the model is, not in another process.
"""

import secrets
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hf_disparse.config import UserError
from hf_disparse.pruning.sped_up import WAY_BACK

NO_GRADIENTS = f"a sped-up model has no gradients; {WAY_BACK}"
_modules = WeakValueDictionary()
_modes = getattr(torch._C, "_len_torch_dispatch_stack", int)  # private: no public name says how many modes are active


def enter(module: Any) -> int:
    """Returns a number by which the operators find `module` as long as it lives."""
    number = secrets.randbits(62)  # unlike a count, no other process has it for another module
    _modules[number] = module
    return number


def _module(number: int) -> Any:
    if number not in _modules:
        raise UserError(
            "this compiled or exported program needs the sped-up model it was made from, in the same process"
        )
    return _modules[number]


def are_recorded() -> bool:
    """Whether torch records or simulates what happens, and so has to see an operator rather than a call of C."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or _modes() > 0


@torch.library.custom_op("hf_disparse::refuse", mutates_args=())
def refuse(tensor: Tensor, shape: Sequence[int], message: str) -> Tensor:
    """Raises UserError when the program runs; an error while torch compiles it would be buried in torch's own."""
    raise UserError(message)


@refuse.register_fake
def _(tensor: Tensor, shape: Sequence[int], message: str) -> Tensor:
    return tensor.new_empty(shape)


@torch.library.custom_op("hf_disparse::encode", mutates_args=())
def encode(ids: Tensor, mask: Tensor | None, types: Tensor | None, source: Tensor | None, number: int) -> Tensor:
    """The last hidden state of a `FastForward`: ids (batch, tokens) -> (batch, tokens, features).

    A gradient with respect to `source`, any parameter of the encoder, is an error.
    """
    with torch.no_grad():
        return _module(number).hidden_or_slow(ids, mask, types)


@encode.register_fake
def _(ids: Tensor, mask: Tensor | None, types: Tensor | None, source: Tensor | None, number: int) -> Tensor:
    return ids.new_empty(*ids.shape, _module(number).encoder.config.hidden_size, dtype=torch.float32)


@torch.library.custom_op("hf_disparse::multiply", mutates_args=())
def multiply(inputs: Tensor, source: Tensor | None, number: int) -> Tensor:
    """The output of a `FastLinear`: (..., in) -> (..., out). A gradient with respect to `inputs` or `source` is an error."""
    return _module(number).product(inputs)


@multiply.register_fake
def _(inputs: Tensor, source: Tensor | None, number: int) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], _module(number).out_features)


def _keep_shapes(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.shapes = [value.shape if isinstance(value, Tensor) else None for value in inputs]


def _refuse_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    wanted = zip(ctx.needs_input_grad, ctx.shapes, strict=True)
    return tuple(refuse(gradient, shape, NO_GRADIENTS) if needed else None for needed, shape in wanted)


for _operator in (encode, multiply):
    _operator.register_autograd(_refuse_gradients, setup_context=_keep_shapes)
