"""Masks and gradients of made-up matrices, whose agreement is known."""

import numpy as np
import torch

from hf_disparse.analysis.names import layer_and_kind


def names(layers: int) -> list[str]:
    return [f"encoder.layer.{i}.{kind}.weight" for i in range(layers) for kind in ("attention.query", "output.dense")]


def random_masks(tasks: int, layers: int, seed: int = 0, shape=(24, 40), density=0.3) -> dict[str, dict]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{t}": {name: torch.rand(shape, generator=generator) < density for name in names(layers)}
        for t in range(tasks)
    }


def planted_gradients(tasks: int, layers: int, same: int, batches: int = 8, n: int = 4000, seed: int = 0):
    """(task, its gradients batch by batch): tasks share importance below layer `same` and have their own from there on."""
    draw = np.random.default_rng(seed)
    shared = {name: draw.exponential(size=n) ** 2 for name in names(layers)}
    for t in range(tasks):
        own = {name: draw.exponential(size=n) ** 2 for name in names(layers)}
        mean = {name: shared[name] if layer_and_kind([name])[name][0] < same else own[name] for name in shared}
        noisy = [{k: torch.tensor(m * draw.normal(1, 0.1, n)).float() for k, m in mean.items()} for _ in range(batches)]
        yield f"t{t}", noisy
