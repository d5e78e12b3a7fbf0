"""Masks on a model: exact zeros, whole files."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hf_disparse import MaskHooks, UserError, apply_masks, find_masks, load_masks, save_masks, sparsity_report
from hf_disparse.pruning.masks import zero_pruned


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pruned_weights_become_positive_zero_and_kept_ones_keep_their_bits(dtype):
    weight = torch.tensor([[-1.5, 2.0], [float("nan"), float("inf")]], dtype=dtype)
    kept = weight.clone()
    zero_pruned(weight, torch.tensor([[False, True], [False, False]]))
    assert weight[0, 1] == kept[0, 1]
    assert (weight == 0).sum() == 3
    assert not torch.signbit(weight).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    ],
)
def test_zeros_survive_momentum_and_decay_in_a_bare_loop(make):
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    optimizer = make(layer.parameters())
    masks = {"weight": torch.rand(4, 8) > 0.5}
    x, y = torch.randn(16, 8), torch.randn(16, 4)
    hooks = None
    for step in range(12):
        if step == 6:  # by now the momentum of what is pruned is large
            apply_masks(layer, masks)
            hooks = MaskHooks(layer, masks)
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        if hooks:
            assert (layer.weight.grad[~masks["weight"]] == 0).all()
        optimizer.step()
        if hooks:
            apply_masks(layer, masks)
            assert torch.equal(layer.weight != 0, masks["weight"])
    hooks.remove()
    (layer(x) - y).square().mean().backward()
    assert (layer.weight.grad[~masks["weight"]] != 0).any(), "removed hooks still act"


def test_gradients_accumulate_as_without_masks():
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    x = torch.randn(8, 8)
    layer(x).square().sum().backward()
    whole = layer.weight.grad.clone()
    layer.zero_grad()
    keep = torch.rand(4, 8) > 0.5
    hooks = MaskHooks(layer, {"weight": keep})
    for row in x:
        layer(row).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, whole * keep)
    hooks.remove()


def test_masks_of_another_model_are_refused():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="no parameter 'other'"):
        apply_masks(layer, {"other": torch.ones(2, 3).bool()})
    with pytest.raises(ValueError, match=r"shape \(2, 3\) for 'weight', got \(3, 2\)"):
        apply_masks(layer, {"weight": torch.ones(3, 2).bool()})


def test_masks_of_numbers_are_refused():
    """255 as a mask would multiply the bits of kept weights."""
    with pytest.raises(ValueError, match=r"expected bools for 'weight', got torch.uint8"):
        apply_masks(nn.Linear(3, 2), {"weight": torch.full((2, 3), 255, dtype=torch.uint8)})


def test_report_counts_zeros_by_denominator():
    encoder = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(2, 4, bias=False)})
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        encoder[0].weight[:2] = 0
    report = sparsity_report(model, encoder, {"w": encoder[0].weight})
    assert report == {"prunable": 8 / 16, "encoder": 8 / 24, "model": 8 / 32}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), st.integers(0, 2**31))
def test_saved_masks_come_back(tmp_path_factory, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = {f"layer.{i}.weight": torch.rand(s, generator=generator) > 0.5 for i, s in enumerate(shapes)}
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    save_masks(masks, path)
    loaded = load_masks(path)
    assert set(loaded) == set(masks)
    assert all(torch.equal(loaded[name], keep) for name, keep in masks.items())


def test_a_saved_mask_takes_a_bit_a_weight(tmp_path):
    save_masks({"w": torch.ones(1000, 800).bool()}, tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < 1000 * 800 / 8 + 300


def test_found_masks_are_the_non_zeros():
    assert find_masks({"w": torch.tensor([0.0, -0.0, 1e-30, -2.0])})["w"].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("shapes", "tensors"),
    [
        ({"w": [4, 4]}, {"w": torch.zeros(3, dtype=torch.uint8)}),  # 16 bits are 2 bytes
        ({"w": [10**9, 10**9]}, {"w": torch.zeros(2, dtype=torch.uint8)}),  # no memory is taken for these
        ({"w": [-4, -4]}, {"w": torch.zeros(2, dtype=torch.uint8)}),
        ({"w": [0, 10**30]}, {"w": torch.zeros(0, dtype=torch.uint8)}),
        ({"w": [10**4000] * 50}, {"w": torch.zeros(2, dtype=torch.uint8)}),
        ({"w": [True, 8]}, {"w": torch.zeros(1, dtype=torch.uint8)}),
        ({"w": [1] * 10_000}, {"w": torch.zeros(1, dtype=torch.uint8)}),
        ({"w": "4x4"}, {"w": torch.zeros(2, dtype=torch.uint8)}),
        ({"w": [4, 4]}, {"w": torch.zeros(2, dtype=torch.int8)}),
        ({"w": [4, 4]}, {"v": torch.zeros(2, dtype=torch.uint8)}),
        (None, {"w": torch.zeros(2, dtype=torch.uint8)}),
        ([], {"w": torch.zeros(2, dtype=torch.uint8)}),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, shapes, tensors):
    path = tmp_path / "masks.safetensors"
    save_file(tensors, path, metadata={"shapes": json.dumps(shapes)})
    with pytest.raises(UserError, match="expected"):
        load_masks(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "masks.safetensors"
    save_masks({"w": torch.ones(64, 64).bool()}, path)
    whole = path.read_bytes()
    for size in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="does not parse"):
            load_masks(path)
    with safe_open(_restored(path, whole), framework="pt") as file:
        assert list(file.keys()) == ["w"]


def _restored(path, whole: bytes):
    path.write_bytes(whole)
    return path
