"""A matrix in the layout of the C files: its non-zeros by blocks of columns, or all of it, whichever multiplies faster."""

import ctypes
import time

import numpy as np
import torch
from torch import Tensor

from hf_disparse.config import UserError
from hf_disparse.fast import structs
from hf_disparse.fast.compiler import library

BLOCK = 256  # columns, as in fast.h: the number of one within its block fits a byte
_STEP = 4  # non-zeros that one step of the product takes; every row of a block is filled up with zeros to a multiple
_TOKENS, _ROUNDS = 64, 5  # of the measurement that decides between sparse and dense


class StoredMatrix:
    """A float32 matrix (rows, columns), read-only.

    Args:
        shape: (rows, columns).
        values: the non-zeros in the order of fast.h, each row of a block filled up with zeros to a multiple of four; of a dense
            matrix all values.
        places: uint8, each non-zero's column within its block, or None for a dense matrix.
        starts: int64, where the non-zeros of each block and row begin, with their number at the end, or None.
    """

    def __init__(
        self, shape: tuple[int, int], values: Tensor, places: Tensor | None = None, starts: Tensor | None = None
    ):
        self.rows, self.columns = shape
        self.values, self.places, self.starts = values, places, starts

    @classmethod
    def sparse(cls, weight: Tensor) -> "StoredMatrix":
        """Stores the non-zeros of `weight`, (rows, columns)."""
        weight = weight.detach().float()
        keep = (weight != 0).numpy()
        return cls._by_block(weight.numpy()[keep], keep)

    @classmethod
    def packed(cls, values: Tensor, bitmask: Tensor, columns: int) -> "StoredMatrix":
        """Stores what a packed checkpoint holds: the non-zeros row by row, and uint8 (rows, ceil(columns / 8))."""
        if bitmask.dtype != torch.uint8 or bitmask.ndim != 2 or bitmask.shape[1] != -(-columns // 8):
            raise UserError(
                f"bitmask: expected uint8 (rows, {-(-columns // 8)}), got {bitmask.dtype} {tuple(bitmask.shape)}"
            )
        keep = np.unpackbits(bitmask.numpy(), axis=1).view(bool)
        if keep[:, columns:].any():
            raise UserError(f"bitmask: a bit is set beyond the {columns} columns")
        keep = keep[:, :columns]
        if values.shape != (np.count_nonzero(keep),):
            raise UserError(f"values: expected {np.count_nonzero(keep)}, one per bit, got {tuple(values.shape)}")
        return cls._by_block(values.detach().float().numpy(), keep)

    @classmethod
    def _by_block(cls, values: np.ndarray, keep: np.ndarray) -> "StoredMatrix":
        """From the non-zeros row by row and where they are, bool (rows, columns)."""
        rows, columns = keep.shape
        begin = np.concatenate([[0], np.cumsum(keep.sum(1))])  # of each row in `values`
        parts, places, counts = [], [], []
        for first in range(0, max(columns, 1), BLOCK):
            block = keep[:, first : first + BLOCK]
            row, place = np.nonzero(block)
            count = block.sum(1)
            padded = -(-count // _STEP) * _STEP
            within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
            target = np.repeat(np.cumsum(padded) - padded, count) + within
            part = np.zeros(padded.sum(), np.float32)
            # A zero of the row, if it has one, because 0 times infinity is NaN there, too.
            gap = np.argmin(block, axis=1) if block.size else count
            where = np.repeat(gap, padded).astype(np.uint8)
            part[target] = values[begin[row] + within]
            where[target] = place
            begin[:-1] += count
            parts.append(part)
            places.append(where)
            counts.append(padded)
        starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        tensors = (np.concatenate(parts), np.concatenate(places), starts.astype(np.int64))
        return cls((rows, columns), *(torch.from_numpy(array) for array in tensors))

    @classmethod
    def whole(cls, weight: Tensor) -> "StoredMatrix":
        """Stores all of `weight`, (rows, columns), in groups of rows that one step of a dense product makes."""
        rows, columns = weight.shape
        group = _group()
        padded = torch.zeros(-(-rows // group) * group, columns, dtype=torch.float32, device="cpu")
        padded[:rows] = weight.detach()
        blocks = padded.split(BLOCK, dim=1)
        values = [b.reshape(len(b) // group, group, b.shape[1]).transpose(1, 2).reshape(-1) for b in blocks]
        return cls((rows, columns), torch.cat(values))

    @classmethod
    def fastest(cls, weight: Tensor) -> "StoredMatrix":
        """Stores `weight`, (rows, columns), in whichever form multiplies 64 tokens faster, as measured now."""
        kept = torch.count_nonzero(weight).item() / max(weight.numel(), 1)
        if kept < 0.25:  # sparse is faster by far, from 60 % zeros on
            return cls.sparse(weight)
        forms = [cls.whole(weight)] + ([cls.sparse(weight)] if kept < 0.9 else [])
        return min(forms, key=lambda form: form.seconds())

    def __reduce__(self) -> tuple:
        """What a copy or pickle is made from: of a dense matrix, all in order, because its groups of rows are this CPU's."""
        if self.is_sparse:
            return StoredMatrix, ((self.rows, self.columns), self.values, self.places, self.starts)
        return StoredMatrix.whole, (self.dense(),)

    @property
    def is_sparse(self) -> bool:
        """Whether only the non-zeros are stored."""
        return self.starts is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(t.nbytes for t in (self.values, self.places, self.starts) if t is not None)

    def dense(self) -> Tensor:
        """The matrix, float32 (rows, columns)."""
        if not self.is_sparse:
            group, rows = _group(), self.values.numel() // max(self.columns, 1)
            sizes = [min(BLOCK, self.columns - first) for first in range(0, self.columns, BLOCK)]
            parts = self.values.split([rows * size for size in sizes]) if sizes else []
            blocks = [p.view(-1, s, group).transpose(1, 2).reshape(rows, s) for p, s in zip(parts, sizes, strict=True)]
            return torch.cat(blocks, 1)[: self.rows].clone() if blocks else self.values.new_empty(self.rows, 0)
        matrix = np.zeros((self.rows, self.columns), np.float32)
        count = np.diff(self.starts.numpy())
        row = np.repeat(np.arange(len(count)) % self.rows, count)
        block = np.repeat(np.arange(len(count)) // max(self.rows, 1), count)
        values = self.values.numpy()
        real = values != 0
        matrix[row[real], block[real] * BLOCK + self.places.numpy()[real]] = values[real]
        return torch.from_numpy(matrix)

    def struct(self, bias: Tensor | None = None) -> structs.Matrix:
        """What C reads; this object and the bias, float32 (rows,), have to outlive it."""
        pointers = [structs.address(t) for t in (self.values, self.places, self.starts, bias)]
        return structs.Matrix(self.rows, self.columns, *pointers)

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns inputs @ matrix.T + bias for float32 (..., columns): (..., rows)."""
        if not inputs.ndim or inputs.shape[-1] != self.columns or inputs.dtype != torch.float32:
            raise UserError(
                f"a product: expected float32 (..., {self.columns}), got {inputs.dtype} {tuple(inputs.shape)}"
            )
        if bias is not None and (bias.shape != (self.rows,) or bias.dtype != torch.float32):
            raise UserError(f"bias: expected float32 ({self.rows},), got {bias.dtype} {tuple(bias.shape)}")
        inputs = inputs.detach().contiguous()
        output = inputs.new_empty(*inputs.shape[:-1], self.rows)
        tokens = inputs.numel() // self.columns if self.columns else output.numel() // max(self.rows, 1)
        bias = bias if bias is None else bias.detach().contiguous()
        matrix = self.struct(bias)
        where = [ctypes.c_void_p(structs.address(t)) for t in (inputs, output)]
        if library().linear(structs.reference(matrix), *where, ctypes.c_int64(tokens), torch.get_num_threads()):
            raise MemoryError("a sparse product: out of memory")
        return output

    def seconds(self) -> float:
        """The least time of a product with 64 tokens."""
        inputs, times = torch.zeros(_TOKENS, self.columns, dtype=torch.float32, device="cpu"), []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            self.multiply(inputs)
            times.append(time.perf_counter() - start)
        return min(times)


def _group() -> int:
    return ctypes.c_int.in_dll(library(), "row_group").value
