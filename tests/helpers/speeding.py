"""Sparse tiny models that `speed_up` keeps sped up: at their size its measurement would decide by noise."""

import importlib

import torch

from hf_disparse import apply_masks, prunable_parameters, speed_up
from hf_disparse.fast.encoder import FastForward
from hf_disparse.fast.linear import FastLinear
from tests.helpers.compacting import BATCH, model_of

MODULE = importlib.import_module("hf_disparse.fast.speed_up")  # `hf_disparse.fast.speed_up` may also be the function


def sparse(model, sparsity: float = 0.8, seed: int = 0):
    """The model with that fraction of its prunable weights zero, by a seeded draw."""
    generator = torch.Generator().manual_seed(seed)
    weights = prunable_parameters(model)
    apply_masks(model, {n: torch.rand(p.shape, generator=generator) >= sparsity for n, p in weights.items()})
    return model.eval()


def sparse_model(model_type: str = "bert", **kwargs):
    return sparse(model_of(model_type, **kwargs))


def outputs(model, batch=BATCH, **kwargs) -> torch.Tensor:
    """The logits of all tasks, of real tokens only where there are several per text."""
    with torch.no_grad():
        if not hasattr(model, "run_heads"):
            return model(**batch, **kwargs).logits.flatten()
        return torch.cat([model(**batch, task=task, **kwargs).logits.flatten() for task in model.tasks])


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4 of the largest, as `speed_up` promises."""
    assert got.shape == expected.shape and expected.isfinite().all()
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def is_fused(encoder) -> bool:
    """Whether the next call of the encoder is one call of C."""
    if not isinstance(encoder.forward, FastForward):
        return False
    try:
        encoder.forward.hidden(**BATCH)
    except MODULE.Unfit:
        return False
    return True


def fast_linears(model) -> int:
    return sum(isinstance(module, FastLinear) for module in model.modules())


def bits(model) -> dict[str, torch.Tensor]:
    return {name: (tensor + 0.0).clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def fast_and_slow(model):
    """Speeds a model up; returns it and what it answered before."""
    before = outputs(model)
    return speed_up(model), before
