"""Which tasks need the same weights, and whose gradients point the same way. Pure functions."""

from collections.abc import Mapping

import torch
from torch import Tensor

TaskTensors = Mapping[str, Mapping[str, Tensor]]  # task -> parameter name -> tensor
WIDTH = 262_139  # a prime, so that the columns of a matrix spread over all places


def shared_importance(scores: TaskTensors) -> list[list[float]]:
    """sum over w of min(p_s(w), p_t(w)), where p_t is task t's scores divided by their sum; 1 = identical, 0 = disjoint.

    The share of importance that two tasks place on the same weights, whatever the budget. Source: histogram intersection,
    Swain and Ballard 1991. Tasks in the order of `scores`; a task whose scores are all zero shares 0.
    """
    parts = []
    for of_task in scores.values():
        flat = _flat(of_task)
        parts.append(flat / flat.sum() if flat.sum() > 0 else flat)
    return [[float(torch.minimum(one, other).sum()) for other in parts] for one in parts]


def gradient_cosine(gradients: TaskTensors) -> list[list[float]]:
    """<g_s, g_t> / (||g_s|| ||g_t||), tasks in the order of `gradients`; 0 where a gradient is zero.

    Below 0, a step that helps one task hurts the other. Takes whole gradients or their sketches (`sketch`).
    """
    flat = [_flat(of_task) for of_task in gradients.values()]
    norms = [float(g.norm()) for g in flat]
    return [
        [float(g @ h) / (m * n) if m and n else 0.0 for h, n in zip(flat, norms, strict=True)]
        for g, m in zip(flat, norms, strict=True)
    ]


def sketch(tensors: Mapping[str, Tensor], width: int = WIDTH, seed: int = 0) -> dict[str, Tensor]:
    """Reduces tensors to `width` numbers that keep inner products within ||a|| ||b|| / sqrt(width) (one sigma).

    Every entry gets a random sign, and entries whose positions are equal modulo `width` are summed. Tensors that fit already are
    left alone. Sketches are comparable if names, shapes and seed are the same. Source: the count sketch, Charikar, Chen and
    Farach-Colton 2002.
    """
    if sum(tensor.numel() for tensor in tensors.values()) <= width:
        return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(width, dtype=torch.float64)
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1).float().cpu()
        for part in flat.split(width):
            signs = torch.randint(0, 2, part.shape, generator=generator, dtype=torch.int8)
            total[: len(part)] += part * (2 * signs - 1)
    return {"sketch": total.float()}


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in tensors.values()])
