"""A Linear module whose matrix is stored for speed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_disparse.config import UserError
from hf_disparse.fast import operators
from hf_disparse.fast.matrix import StoredMatrix

WAY_BACK = "call hf_disparse.undo_speed_up(model) first"


class SpedUp:
    """Marks the modules that `speed_up` makes."""


def is_sped_up(model: nn.Module) -> bool:
    """Whether `speed_up` has changed this model."""
    return any(isinstance(module, SpedUp) for module in model.modules())


def refuse_sped_up(model: nn.Module, where: str) -> None:
    """Raises UserError if the model is sped up: what `where` names works on dense matrices."""
    if is_sped_up(model):
        raise UserError(f"{where}: the model is sped up; {WAY_BACK}")


class FastLinear(nn.Module, SpedUp):
    """Takes the place of an `nn.Linear`, for inference on a CPU in float32; elsewhere it multiplies as a dense matrix.

    `weight`, `state_dict` and `load_state_dict` show and take the dense matrix, but only its stored form is held.
    """

    def __init__(self, matrix: StoredMatrix, bias: nn.Parameter | None, trainable: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.matrix = matrix.columns, matrix.rows, matrix
        self.register_parameter("bias", bias)
        self.trainable = trainable  # once it is undone
        self.register_buffer("where", torch.empty(0), persistent=False)  # has the dtype and device of the module

    @property
    def weight(self) -> Tensor:
        """A copy of the matrix, (out, in), whose changes would have no effect: torch refuses them."""
        with torch.inference_mode():
            return self.matrix.dense().to(self.where)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise UserError(f"weight: a sped-up matrix cannot be replaced; {WAY_BACK}")
        super().__setattr__(name, value)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes: (..., in) -> (..., out)."""
        if self.training and torch.is_grad_enabled():
            raise UserError(f"a sped-up model cannot be trained; {WAY_BACK}")
        if inputs.device.type != "cpu" or inputs.dtype != torch.float32 or self.where.dtype != torch.float32:
            return functional.linear(inputs, self.weight.clone(), self.bias)
        if torch.compiler.is_compiling():
            return operators.multiply(inputs, self.number)
        return refuse_gradients(self.product(inputs), inputs if inputs.requires_grad else self.bias)

    def product(self, inputs: Tensor) -> Tensor:
        """The product by the C library, without gradients."""
        return self.matrix.multiply(inputs, self.bias)

    @property
    def number(self) -> int:
        """The module's number for the operators; a copy has another one."""
        if "_number" not in self.__dict__:
            self._number = operators.enter(self)
        return self._number

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_number"}

    def undone(self) -> nn.Linear:
        """The Linear module that this one replaced."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.matrix.dense().to(self.where), requires_grad=self.trainable)
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        form = f"{self.matrix.values.numel():,} non-zeros" if self.matrix.is_sparse else "dense"
        return f"in_features={self.in_features}, out_features={self.out_features}, {form}"

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.matrix.dense().to(self.where)
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
    def forward(ctx, output: Tensor, _: Tensor) -> Tensor:
        return output

    @staticmethod
    def backward(ctx, *_):
        raise UserError(f"a sped-up model has no gradients; {WAY_BACK}")


def refuse_gradients(output: Tensor, source: Tensor | None) -> Tensor:
    """`output`, whose gradient with respect to `source` is an error rather than missing."""
    follow = torch.is_grad_enabled() and source is not None and source.requires_grad
    return _Frozen.apply(output, source) if follow else output
