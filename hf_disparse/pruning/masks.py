"""Masks on a model: apply, hold, count, pack, save, load.

A mask is {parameter name: bool tensor of the weight's shape}, True = keep.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_disparse.config import FORMAT_VERSION, UserError
from hf_disparse.distributed.fsdp import is_sharded, local
from hf_disparse.distributed.processes import add_up
from hf_disparse.files import open_safetensors
from hf_disparse.pruning.sped_up import refuse_sped_up

MASKS_NAME = "pruning_masks.safetensors"
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Sets every pruned weight to exactly +0.0 in place.

    Raises:
        UserError: the model is sped up.
        ValueError: a mask whose parameter is missing or has another shape, or that is not bool.
    """
    parameters = _parameters_of(model, masks, "apply_masks")
    for name, keep in masks.items():
        if parameters[name].shape != keep.shape:
            want, got = tuple(parameters[name].shape), tuple(keep.shape)
            raise ValueError(f"masks: expected shape {want} for '{name}', got {got}")
        if keep.dtype != torch.bool:
            raise ValueError(f"masks: expected bools for '{name}', got {keep.dtype}")
        zero_pruned(parameters[name], keep)


def _parameters_of(model: nn.Module, masks: Mapping[str, Tensor], where: str) -> dict[str, nn.Parameter]:
    """The model's parameters; raises an error if the masks name others."""
    parameters = dict(model.named_parameters())
    for name in masks:
        if name not in parameters:
            refuse_sped_up(model, where)
            raise ValueError(f"masks: the model has no parameter '{name}'; are these the masks of another model?")
    return parameters


def zero_pruned(tensor: Tensor, keep: Tensor) -> None:
    """Sets `tensor` to +0.0 in place where `keep` is False. Shapes alike.

    It multiplies the bits by 0 or 1; multiplying floats would leave -0.0, keep NaN and take 1.5 times as long.
    """
    tensor = local(tensor)
    tensor.view(BITS[tensor.element_size()]).mul_(local(keep).to(tensor.device))


class MaskHooks:
    """Zeroes the gradients of pruned weights as they arrive, so before clipping, until `remove()`.

    The optimizer still moves pruned weights by momentum: call `apply_masks` after each of its steps.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        parameters = _parameters_of(model, masks, "MaskHooks")
        self._handles = [
            parameters[name].register_post_accumulate_grad_hook(lambda p, keep=keep: zero_pruned(p.grad, keep))
            for name, keep in masks.items()
            if parameters[name].requires_grad
        ]

    def remove(self) -> None:
        """Stops zeroing gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def find_masks(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reconstructs the masks of a sparse model from its zeros: keeps every weight that is not exactly zero."""
    return {name: tensor.detach() != 0 for name, tensor in parameters.items()}


def count_pruned(masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Returns (pruned weights, all weights); every process must call it if the masks are sharded."""
    size = sum(keep.numel() for keep in masks.values())
    return size - count_nonzeros(masks), size


def count_nonzeros(tensors: Mapping[str, Tensor]) -> int:
    """Returns the number of nonzeros; every process must call it if the tensors are sharded."""
    mine = sum(int(torch.count_nonzero(local(tensor.detach()))) for tensor in tensors.values())
    return add_up(mine) if is_sharded(tensors) else mine


def packed_bytes(weight: Tensor) -> int:
    """Size of a matrix stored as its nonzeros and one bit a weight, rows padded to whole bytes. Shape (rows, columns)."""
    return int(torch.count_nonzero(weight)) * weight.element_size() + weight.shape[0] * -(-weight.shape[1] // 8)


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes the masks at one bit a weight: safetensors of uint8, with the shapes in the file's metadata."""
    packed = {name: torch.from_numpy(np.packbits(keep.cpu().numpy().reshape(-1))) for name, keep in masks.items()}
    shapes = {name: list(keep.shape) for name, keep in masks.items()}
    save_file(packed, str(path), metadata={"version": str(FORMAT_VERSION), "shapes": json.dumps(shapes)})


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Reads what `save_masks` wrote; checks every size before allocating memory.

    Raises:
        UserError: the file is missing, truncated or contradicts itself.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; was this checkpoint written by hf_disparse?")
    with open_safetensors(path) as file:
        names = set(file.keys())
        try:
            shapes = json.loads((file.metadata() or {}).get("shapes", "null"))
        except (ValueError, RecursionError):
            shapes = None
        if not isinstance(shapes, dict) or set(shapes) != names:
            raise UserError(
                f"{path}: expected the shapes of its {len(names)} masks in the metadata, got others or none"
            )
        return {name: _unpack(file, name, shape, path) for name, shape in shapes.items()}


def _unpack(file, name: str, shape: list[int], path: str | Path) -> Tensor:
    is_shape = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    stored = file.get_slice(name)
    size = math.prod(shape) if is_shape else -1
    if not is_shape or stored.get_dtype() != "U8" or list(stored.get_shape()) != [(size + 7) // 8]:
        raise UserError(
            f"{path}: expected the packed bits of mask '{name}', got {stored.get_dtype()} {stored.get_shape()}"
        )
    bits = np.unpackbits(file.get_tensor(name).numpy(), count=size)
    return torch.from_numpy(bits).bool().reshape(shape)
