"""Packed checkpoints loaded for speed: their matrices are stored anew without ever existing with their zeros.

The reader of checkpoints imports this module while transformers is still being imported, so it needs nothing from there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from hf_disparse.config import UserError
from hf_disparse.fast.linear import FastLinear
from hf_disparse.fast.matrix import StoredMatrix

# While a packed checkpoint is loaded for speed: name of a weight -> its non-zeros and bitmask, as the file has them.
packed_weights: ContextVar[dict[str, tuple[Tensor, Tensor]] | None] = ContextVar("packed_weights", default=None)


@contextmanager
def keeping_packed() -> Iterator[None]:
    """Within this context, packed checkpoints are loaded without unpacking what `speed_up` stores without zeros."""
    token = packed_weights.set({})
    try:
        yield
    finally:
        packed_weights.reset(token)


def take_packed(encoder: nn.Module, weights: dict[str, tuple[Tensor, Tensor]], prefix: str) -> None:
    """Stores the packed matrices of an encoder, whose dense ones have no memory; names in `weights` begin with `prefix`."""
    for name, (values, bitmask) in weights.items():
        module = name.removeprefix(prefix).removesuffix(".weight")
        linear = encoder.get_submodule(module)
        try:
            matrix = StoredMatrix.packed(values, bitmask, linear.in_features)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if matrix.rows != linear.out_features:
            raise UserError(f"{name}: expected a bitmask of {linear.out_features} rows, got {matrix.rows}")
        encoder.set_submodule(module, FastLinear(matrix, linear.bias, linear.weight.requires_grad))
