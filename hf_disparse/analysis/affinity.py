"""Which tasks want the same weights, and which pull them the same way. Pure functions."""

from collections.abc import Mapping

import torch
from torch import Tensor

TaskTensors = Mapping[str, Mapping[str, Tensor]]  # task -> parameter name -> tensor
WIDTH = 262_139  # a prime, so that the columns of a matrix do not all fall on the same few places


def shared_importance(scores: TaskTensors) -> list[list[float]]:
    """sum over w of min(p_s(w), p_t(w)), p_t being task t's scores divided by their sum; 1 = the same, 0 = nothing in common.

    The share of its importance that one task puts where the other puts it too: the intersection of two histograms, Swain and
    Ballard 1991. No budget is in it. Tasks in the order of `scores`; a task whose scores are all zero shares nothing.
    """
    parts = []
    for of_task in scores.values():
        flat = _flat(of_task)
        parts.append(flat / flat.sum() if flat.sum() > 0 else flat)
    return [[float(torch.minimum(one, other).sum()) for other in parts] for one in parts]


def gradient_cosine(gradients: TaskTensors) -> list[list[float]]:
    """<g_s, g_t> / (||g_s|| ||g_t||), tasks in the order of `gradients`; 0 where a gradient is zero.

    Below 0 a step that helps one task hurts the other. Of whole gradients, or of what `sketch` makes of them.
    """
    flat = [_flat(of_task) for of_task in gradients.values()]
    norms = [float(g.norm()) for g in flat]
    return [
        [float(g @ h) / (m * n) if m and n else 0.0 for h, n in zip(flat, norms, strict=True)]
        for g, m in zip(flat, norms, strict=True)
    ]


def sketch(tensors: Mapping[str, Tensor], width: int = WIDTH, seed: int = 0) -> dict[str, Tensor]:
    """About `width` numbers whose inner products are those of the whole tensors, within ||a|| ||b|| / sqrt(width) (one sigma).

    Every number gets a random sign, and those whose places are the same modulo `width` are added up. Whatever fits stays as it
    is. Source: the count sketch, Charikar, Chen and Farach-Colton 2002. The same names, shapes and seed give sketches that
    may be compared.
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
