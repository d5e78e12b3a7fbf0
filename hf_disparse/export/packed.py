"""Packed checkpoints: a sparse matrix as its non-zeros and one bit per weight.

On disk a packed `x.weight` is a 1-D tensor of its non-zeros, row by row, beside `x.weight_bitmask`, uint8 (rows,
ceil(columns / 8)), most significant bit first. The values keep the weight's name, so that transformers without this
package fails on the shape instead of loading random weights. `hf_disparse.export.loading` reads them back.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_disparse.config import UserError
from hf_disparse.export.folder import copy_companions, describe
from hf_disparse.files import new_folder, open_safetensors
from hf_disparse.model.adapters import without_adapters
from hf_disparse.model.loading import WEIGHTS_NAME, model_folder, weight_files
from hf_disparse.pruning.masks import BITS, packed_bytes

BITMASK = "_bitmask"


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packs a matrix (rows, columns) into its non-zeros (n,) and their bitmask, uint8 (rows, ceil(columns / 8)).

    -0.0 counts as zero: multiplying weights by a mask turns the negative ones into -0.0.
    """
    keep = (weight != 0).numpy()
    bits = weight.reshape(-1).view(BITS[weight.element_size()]).numpy()
    values = torch.from_numpy(bits[np.flatnonzero(keep)]).view(weight.dtype)
    return values, torch.from_numpy(np.packbits(keep, axis=1))


def unpack(values: Tensor, bitmask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns the matrix that `pack` was given, bit for bit except for the sign of its zeros.

    Raises:
        UserError: values, bitmask and shape contradict each other.
    """
    matrix = zeros(values, bitmask, shape)
    fill(matrix, values, bitmask)
    return matrix


def zeros(values: Tensor, bitmask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Checks `bitmask` (rows, ceil(columns / 8)) and returns zeros of `shape` for `fill`, whose memory is not yet touched.

    Raises:
        UserError: the bitmask has another type or shape.
    """
    rows, columns = shape
    expected = (rows, -(-columns // 8))
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != expected:
        raise UserError(f"bitmask: expected uint8 {expected}, got {bitmask.dtype} {tuple(bitmask.shape)}")
    matrix = np.zeros(rows * columns, dtype=f"i{values.element_size()}")  # faster than torch.zeros for large matrices
    return torch.from_numpy(matrix).view(values.dtype).reshape(rows, columns)


def fill(matrix: Tensor, values: Tensor, bitmask: Tensor) -> None:
    """Writes values (n,) where bitmask has its n bits. Bound by memory; lets other threads run.

    Raises:
        UserError: there are more or fewer values than bits.
    """
    keep = np.unpackbits(bitmask.numpy(), axis=1, count=matrix.shape[1]).view(bool)
    places = np.flatnonzero(keep)
    if values.ndim != 1 or len(values) != len(places):
        raise UserError(f"values: expected {len(places)}, one per bit of the bitmask, got {tuple(values.shape)}")
    bits = BITS[values.element_size()]  # numpy has no bfloat16
    matrix.view(-1).view(bits).numpy()[places] = values.view(bits).numpy()


def save_packed(
    model: PreTrainedModel | str | Path, folder: str | Path, dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Writes a packed checkpoint of `model` into the new folder `folder`, whole or not at all.

    Packs every matrix that becomes smaller. After `import hf_disparse`, `from_pretrained` of the model's own class and of
    the Auto classes reads the folder.

    Args:
        model: a transformers model, or the folder or Hub id of one; a folder's tokenizer and configurations are copied,
            too.
        dtype: of the floating point weights; default: unchanged.

    Returns:
        {"bytes": size of the file, "dense_bytes": size of the same weights unpacked, "packed_bytes",
        "packed_dense_bytes": both sizes for the packed matrices alone, "matrices": their number}.

    Raises:
        UserError: the folder is not new, or the model is not a plain safetensors checkpoint.
    """
    sizes = {"bytes": 0, "dense_bytes": 0, "packed_bytes": 0, "packed_dense_bytes": 0, "matrices": 0}
    with new_folder(folder) as target:
        if isinstance(model, PreTrainedModel):
            tensors = _packed(without_adapters(model, model.state_dict()).items(), dtype, sizes)
            # Keeps the model's own names: transformers' conversion to others cannot read packed weights.
            model.save_pretrained(target, state_dict=tensors, save_original_format=False, max_shard_size="1TB")
        else:
            source = model_folder(model)
            tensors = {}
            for file in weight_files(source):
                tensors |= _packed(_read(file), dtype, sizes)
            save_file(tensors, target / WEIGHTS_NAME, metadata={"format": "pt"})
            copy_companions(source, target)
        describe(target, dtype, packed=True)
        sizes["bytes"] = (target / WEIGHTS_NAME).stat().st_size
    return sizes


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor), one tensor in memory at a time."""
    with open_safetensors(file) as stored:
        for name in stored.keys():  # noqa: SIM118, a safe_open has no iterator
            yield name, stored.get_tensor(name)


def _packed(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, sizes: dict[str, int]
) -> dict[str, Tensor]:
    """The tensors as the file will hold them; adds to `sizes`."""
    stored = {}
    for name, tensor in tensors:
        if name.endswith(BITMASK):
            raise UserError(f"{name}: the model is packed already")
        floating = tensor.is_floating_point()
        tensor = tensor.detach().to("cpu", dtype if floating else None)
        sizes["dense_bytes"] += tensor.nbytes
        if name.endswith("weight") and tensor.ndim == 2 and floating and packed_bytes(tensor) < tensor.nbytes:
            values, bitmask = pack(tensor)
            stored |= {name: values, name + BITMASK: bitmask}
            sizes["packed_bytes"] += values.nbytes + bitmask.nbytes
            sizes["packed_dense_bytes"] += tensor.nbytes
            sizes["matrices"] += 1
        else:
            stored[name] = tensor
    return stored
