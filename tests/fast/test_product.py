"""Products of stored matrices, sparse and dense, against float64; matrices come back as they were."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from hf_disparse import UserError
from hf_disparse.fast.linear import FastLinear
from hf_disparse.fast.matrix import StoredMatrix

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")

FORMS = {"sparse": StoredMatrix.sparse, "whole": StoredMatrix.whole, "fastest": StoredMatrix.fastest}
SIZES = [0, 1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 63, 64, 65, 255, 256, 257, 511, 512, 513, 700]
TOKENS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200]
DENSITIES = [0, 0.002, 0.05, 0.1, 0.3, 0.5, 0.8, 1]


def some(rng: np.random.Generator, sizes: list[int], largest: int) -> int:
    """One of `sizes`, or any other up to the largest."""
    return int(rng.choice(sizes)) if rng.random() < 0.5 else int(rng.integers(largest + 1))


def random_matrix(rng: np.random.Generator, rows: int, columns: int) -> torch.Tensor:
    """A matrix with zeros, with empty rows and columns now and then, and sometimes with a few NaN and infinite weights."""
    keep = rng.random((rows, columns)) < rng.choice(DENSITIES)
    if rng.random() < 0.3:
        keep &= rng.random((rows, 1)) < 0.5
    if rng.random() < 0.2:
        keep &= rng.random(columns) < 0.5
    weight = np.where(keep, rng.standard_normal((rows, columns)), 0).astype(np.float32)
    if weight.size and rng.random() < 0.2:
        where = rng.integers(rows, size=3), rng.integers(columns, size=3)
        weight[where] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), 3)
    return torch.from_numpy(weight)


def assert_product(got: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor | None) -> None:
    """`got` is inputs W^T + bias: each sum is off by at most as many rounding errors as it has terms."""
    w, x = weight.double().numpy(), inputs.double().numpy()
    b = np.zeros(len(w)) if bias is None else bias.detach().double().numpy()
    with np.errstate(invalid="ignore"):
        expected = x @ w.T + b
        size = np.abs(x) @ np.abs(w).T + np.abs(b)
    got = got.numpy()
    assert got.dtype == np.float32 and got.shape == expected.shape
    finite = np.isfinite(expected)
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    assert np.array_equal(got[np.isinf(expected)], expected[np.isinf(expected)])
    error = np.abs(got[finite] - expected[finite])
    assert np.all(error <= (w.shape[1] + 2) * 2.0**-24 * size[finite] + 1e-37)


def check_shape(seed: int) -> None:
    """A matrix, inputs and a bias of random shapes: both forms multiply rightly and are bit for bit what was stored."""
    rng = np.random.default_rng(seed)
    rows, columns, tokens = some(rng, SIZES, 700), some(rng, SIZES, 700), some(rng, TOKENS, 200)
    weight = random_matrix(rng, rows, columns)
    inputs = torch.from_numpy(rng.standard_normal((tokens, columns)).astype(np.float32))
    bias = torch.from_numpy(rng.standard_normal(rows).astype(np.float32)) if rng.random() < 0.5 else None
    torch.set_num_threads(int(rng.integers(1, 4)))
    for name in ("sparse", "whole"):
        matrix = FORMS[name](weight)
        assert same_bits(matrix.dense(), weight), (seed, name)
        assert_product(matrix.multiply(inputs, bias), weight, inputs, bias)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("start", range(0, 150, 50))
def test_products(start):
    for seed in range(start, start + 50):
        check_shape(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(150, 2000, 50))
def test_products_of_many_shapes(start):
    for seed in range(start, start + 50):
        check_shape(seed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (300, 1), (1, 300), (40, 520)])
def test_the_form_that_is_chosen_and_empty_matrices(form, shape):
    weight = torch.randn(shape) * (torch.rand(shape) < 0.5)
    weight = torch.where(weight == 0, 0.0, weight)  # no -0.0
    matrix = FORMS[form](weight)
    inputs, bias = torch.randn(3, shape[1]), torch.randn(shape[0])
    assert same_bits(matrix.dense(), weight)
    assert_product(matrix.multiply(inputs, bias), weight, inputs, bias)


def test_what_bits_a_matrix_keeps():
    weight = torch.tensor([[1e-45, -1e-45, 3e38, -0.0], [float("nan"), float("inf"), 0.0, -float("inf")]])
    weight.view(torch.int32)[1, 0] = -1  # a NaN with another sign and all its bits
    assert same_bits(StoredMatrix.whole(weight).dense(), weight)
    assert same_bits(StoredMatrix.sparse(weight).dense(), torch.where(weight == 0, 0.0, weight))


@pytest.mark.parametrize("shape", [(7, 300), (1, 1), (3, 0), (0, 9), (20, 257), (5, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed(shape, dtype):
    weight = (torch.randn(shape) * (torch.rand(shape) < 0.3)).to(dtype)
    keep = weight != 0
    bitmask = torch.from_numpy(np.packbits(keep.numpy(), axis=1))
    matrix = StoredMatrix.packed(weight[keep], bitmask, shape[1])
    assert torch.equal(matrix.dense(), weight.float())
    assert all(torch.equal(a, b) for a, b in zip(_tensors(matrix), _tensors(StoredMatrix.sparse(weight)), strict=True))


def _tensors(matrix: StoredMatrix) -> list[torch.Tensor]:
    return [matrix.values, matrix.places, matrix.starts]


def _lies() -> dict:
    bitmask = torch.tensor([[0b10100000, 0b01000000], [0b00000001, 0]], dtype=torch.uint8)
    values = torch.ones(4)
    return {
        "too few bits": (values, bitmask & 0b11011111, 10),
        "too many bits": (values, bitmask | 0b00000010, 10),
        "too few values": (values[:3], bitmask, 10),
        "bits beyond the columns": (values, bitmask | torch.tensor([0, 1], dtype=torch.uint8), 10),
        "values in a matrix": (values.view(2, 2), bitmask, 10),
        "another width": (values, bitmask, 17),
        "a narrow bitmask": (values, bitmask[:, :1], 10),
        "another dtype": (values, bitmask.int(), 10),
        "one dimension": (values, bitmask.view(-1), 10),
    }


@pytest.mark.parametrize("lie", _lies())
def test_a_bitmask_that_lies(lie):
    with pytest.raises(UserError) as error:
        StoredMatrix.packed(*_lies()[lie])
    assert "\n" not in str(error.value)


def _linear(columns: int, rows: int, form: str = "sparse", bias: bool = True) -> tuple[FastLinear, nn.Linear]:
    linear = nn.Linear(columns, rows, bias).eval()
    with torch.no_grad():
        linear.weight *= torch.rand_like(linear.weight) < 0.3
    return FastLinear(FORMS[form](linear.weight), linear.bias).eval(), linear


@pytest.mark.parametrize("form", ["sparse", "whole"])
@pytest.mark.parametrize("shape", [(270,), (0, 270), (3, 0, 270), (2, 3, 270), (2, 1, 3, 270), (1, 1, 1, 1, 270)])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_of_any_number_of_dimensions(form, shape, bias):
    fast, linear = _linear(270, 31, form, bias)
    inputs = torch.randn(shape)
    with torch.no_grad():
        got = fast(inputs)
        assert got.shape == linear(inputs).shape
    assert_product(got, linear.weight.detach(), inputs, linear.bias)


def test_inputs_that_are_not_contiguous():
    fast, linear = _linear(40, 24)
    inputs = [
        torch.randn(40, 9).T,
        torch.randn(9, 80)[:, ::2],
        torch.randn(1, 40).expand(9, 40),
        torch.randn(12, 40)[3:],
    ]
    inputs += [torch.randn(4, 40, 5).transpose(1, 2), torch.randn(9 * 40 + 1)[1:].view(9, 40)]
    with torch.no_grad():
        for x in inputs:
            assert_product(fast(x), linear.weight.detach(), x, linear.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_as_in_torch(dtype):
    fast, linear = _linear(40, 24)
    inputs = torch.randn(5, 40, dtype=dtype)
    with torch.no_grad():
        for module in (fast, linear):
            with pytest.raises(RuntimeError):  # as torch does: the module is in float32
                module(inputs)
        fast.to(dtype), linear.to(dtype)
        got, expected = fast(inputs), linear(inputs)
        assert got.dtype == expected.dtype == dtype and torch.allclose(got, expected)
        fast.float()
        assert_product(fast(inputs.float()), fast.weight.clone(), inputs.float(), fast.bias)


def test_another_device():
    fast, linear = _linear(40, 24)
    fast.to("meta"), linear.to("meta")
    with torch.no_grad():
        assert fast(torch.zeros(5, 40, device="meta")).shape == (5, 24)
        fast, _ = _linear(40, 24)
        with pytest.raises(RuntimeError) as error:
            fast(torch.zeros(5, 40, device="meta"))
    assert len(str(error.value).splitlines()) < 4


@pytest.mark.parametrize("shape", [(), (39,), (41,), (2, 20), (1, 80), (40, 1), (2, 0)])
@pytest.mark.parametrize("form", ["sparse", "whole"])
def test_inputs_of_another_size(shape, form):
    """They would be read, or the outputs written, beyond their ends."""
    fast, _ = _linear(40, 24, form)
    with torch.no_grad(), pytest.raises(UserError) as error:
        fast(torch.zeros(shape))
    assert "\n" not in str(error.value)


def test_a_bias_that_was_exchanged():
    fast, linear = _linear(40, 24)
    inputs = torch.randn(5, 40)
    with torch.no_grad():
        fast.bias = nn.Parameter(torch.randn(48)[::2])
        assert_product(fast(inputs), linear.weight.detach(), inputs, fast.bias)
        for wrong in (torch.randn(23), torch.randn(24, 1), torch.randn(24, dtype=torch.float64)):
            fast.bias = nn.Parameter(wrong)
            with pytest.raises(UserError) as error:
                fast(inputs)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_other_defaults_of_torch(form):
    """Someone who works in another precision or on another device still gets float32 on the CPU."""
    weight = torch.randn(30, 40) * (torch.rand(30, 40) < 0.5)
    inputs = torch.randn(5, 40)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got, back = FORMS[form](weight).multiply(inputs), FORMS[form](weight).dense()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(back, weight)
    assert_product(got, weight, inputs, None)
