"""A Linear module whose matrix is stored for speed."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_disparse.config import UserError
from hf_disparse.fast import operators
from hf_disparse.fast.matrix import StoredMatrix
from hf_disparse.fast.operators import NO_GRADIENTS
from hf_disparse.pruning.sped_up import WAY_BACK, SpedUp

# Names of functions that change their first argument: `add_`, `__iadd__`, `__setitem__`, and `__set__` of `tensor.data = ...`.
_CHANGES = re.compile(
    r"(?!__)\w+(?<!_)_|__i(?:add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__|__set(?:item)?__"
)


class SpedUpLinear(SpedUp):
    """What the Linear modules that `speed_up` makes have in common."""

    def refuse_training(self, inputs: Tensor) -> Tensor:
        """Returns the inputs. Raises UserError in a step of training."""
        message = f"a sped-up model cannot be trained; {WAY_BACK}"
        if not (self.training and torch.is_grad_enabled()):
            return inputs
        if operators.are_recorded():
            return operators.refuse(inputs.detach(), inputs.shape, message)
        raise UserError(message)

    def ordinary(self, weight: nn.Parameter) -> nn.Linear:
        """A Linear module with this weight and the module's bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = weight, self.bias
        return linear.train(self.training)


class ReadOnly(Tensor):
    """A copy of a sped-up matrix. Changes of it would be lost, so they are refused; its `clone()` is an ordinary tensor."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if (_CHANGES.fullmatch(name) and isinstance(args[0], cls)) or isinstance(kwargs.get("out"), cls):
            raise UserError(f"weight: a sped-up matrix cannot be changed; {WAY_BACK}")
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            own = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, cls)}
            is_view = isinstance(result, Tensor) and result.untyped_storage().data_ptr() in own
            return result.as_subclass(cls) if is_view else result


class FastLinear(nn.Module, SpedUpLinear):
    """Takes the place of an `nn.Linear`, for inference on a CPU in float32; elsewhere it multiplies as a dense matrix.

    `weight`, `state_dict` and `load_state_dict` show and take the dense matrix, but only its stored form is held.
    """

    def __init__(self, matrix: StoredMatrix, bias: nn.Parameter | None, trainable: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.matrix = matrix.columns, matrix.rows, matrix
        self.register_parameter("bias", bias)
        self.trainable = trainable  # once it is undone
        self._number = operators.enter(self)  # for the operators
        self.register_buffer("where", torch.empty(0), persistent=False)  # has the dtype and device of the module

    @property
    def weight(self) -> Tensor:
        """A read-only copy of the matrix, (out, in)."""
        return self.dense().as_subclass(ReadOnly)

    def dense(self) -> Tensor:
        """The matrix, (out, in), in the dtype and on the device of the module."""
        return self.matrix.dense().to(self.where)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise UserError(f"weight: a sped-up matrix cannot be replaced; {WAY_BACK}")
        super().__setattr__(name, value)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""
        inputs = self.refuse_training(inputs)
        if inputs.device.type != "cpu" or inputs.dtype != torch.float32 or self.where.dtype != torch.float32:
            return functional.linear(inputs, self.dense(), self.bias)
        if operators.are_recorded() or type(inputs) is not Tensor:
            return operators.multiply(inputs, self.bias, self._number)
        return refuse_gradients(self.product(inputs), inputs if inputs.requires_grad else self.bias)

    def product(self, inputs: Tensor) -> Tensor:
        """The product by the C library, without gradients."""
        return self.matrix.multiply(inputs, self.bias)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._number = operators.enter(self)  # a copy has another one

    def undone(self) -> nn.Linear:
        """The Linear module that this one replaced."""
        return self.ordinary(nn.Parameter(self.dense(), requires_grad=self.trainable))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        form = f"{self.matrix.values.numel():,} non-zeros" if self.matrix.is_sparse else "dense"
        return f"in_features={self.in_features}, out_features={self.out_features}, {form}"

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, metadata, strict, missing, unexpected, errors
    ) -> None:
        given = state_dict.get(prefix + "weight")
        if given is None:
            missing.append(prefix + "weight")
        elif given.shape != (self.out_features, self.in_features):
            errors.append(f"{prefix}weight: expected {(self.out_features, self.in_features)}, got {tuple(given.shape)}")
        else:
            self.matrix = StoredMatrix.fastest(given.cpu().float())
        rest = {name: tensor for name, tensor in state_dict.items() if name != prefix + "weight"}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)


class _Frozen(torch.autograd.Function):
    """Lets numbers pass; a gradient that comes back is refused rather than lost."""

    @staticmethod
    def forward(ctx, output: tuple[Tensor], _: Tensor) -> Tensor:
        return output[0]  # were it an argument itself, torch would take it for a view, not to be changed in place

    @staticmethod
    def backward(ctx, *_):
        raise UserError(NO_GRADIENTS)


def refuse_gradients(output: Tensor, source: Tensor | None) -> Tensor:
    """`output`, whose gradient with respect to `source` is an error rather than missing."""
    follow = torch.is_grad_enabled() and source is not None and source.requires_grad
    return _Frozen.apply((output.detach(),), source) if follow else output
