"""The structs of `fast.h` and `encoder.h`, for ctypes; the C files say what each field means."""

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p

from hf_disparse.config import UserError
from hf_disparse.pruning.sped_up import WAY_BACK

NO_DATA = f"a sped-up model cannot be transformed by torch.func or run on tensors without numbers; {WAY_BACK}"


class Matrix(Structure):
    """`Matrix` of fast.h."""

    _fields_ = [("rows", c_int64), ("columns", c_int64)] + [
        (name, c_void_p) for name in ("values", "places", "starts", "bias")
    ]


class Norm(Structure):
    """`Norm` of encoder.h."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("epsilon", c_double)]


class Layer(Structure):
    """`Layer` of encoder.h."""

    _fields_ = [
        ("heads", c_int64),
        ("projections", c_int64),
        ("project", Matrix * 3),
        ("merge", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("before", Norm),
        ("after", Norm),
        ("window", c_int64),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("distance_bias", c_void_p),
    ]


class Encoder(Structure):
    """`Encoder` of encoder.h."""

    _fields_ = [
        *((name, c_int64) for name in ("features", "head_size", "embedding_size", "activation", "norm_first", "gated")),
        ("tables", c_int64),
        ("table", c_void_p * 3),
        ("embedding_norm", Norm),
        ("last_norm", Norm),
        ("projection", POINTER(Matrix)),
        ("scale", c_double),
        ("reach", c_int64),
        ("layers", c_int64),
        ("layer", POINTER(POINTER(Layer))),
    ]


class Batch(Structure):
    """`Batch` of encoder.h."""

    _fields_ = [
        ("texts", c_int64),
        ("tokens", c_int64),
        ("start", c_void_p),
        ("place", c_void_p),
        ("row", c_void_p * 3),
        ("target", c_void_p),
        ("out", c_void_p),
    ]


def address(tensor) -> int | None:
    """Where a tensor's or an array's numbers begin; None for None.

    Raises:
        UserError: it is a tensor that stands for others, such as within `torch.func.grad` and `vmap`.
    """
    if tensor is None:
        return None
    try:
        return tensor.data_ptr() if hasattr(tensor, "data_ptr") else tensor.ctypes.data
    except RuntimeError as error:
        raise UserError(NO_DATA) from error


def reference(struct: Structure) -> ctypes.c_void_p:
    """A pointer to a struct."""
    return ctypes.byref(struct)
