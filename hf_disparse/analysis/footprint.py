"""Parameters, bytes and multiplications of each module, dense and without zeros."""

from typing import Any

import torch
from torch import nn

from hf_disparse.pruning.masks import packed_bytes


@torch.no_grad()
def footprint(model: nn.Module) -> list[dict[str, Any]]:
    """One row per module with parameters of its own; a parameter that modules share counts for the first of them.

    "parameters" and "nonzeros" are counts; "bytes_dense" is the size as it is, "bytes_packed" with every matrix stored as its
    nonzeros and one bit a weight where that is smaller, as `save_packed` writes it. "multiplications" counts those by Linear
    weights per token, "multiplications_left" those by nonzeros: the work of a runtime that skips zeros, which stock PyTorch does
    not. Attention's products between tokens grow with the text and are not included.
    """
    rows, seen = [], set()
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) not in seen}
        if not own:
            continue
        seen |= {id(p) for p in own.values()}
        multiplies = isinstance(module, nn.Linear)
        rows.append(
            {
                "module": name,
                "parameters": sum(p.numel() for p in own.values()),
                "nonzeros": sum(int(torch.count_nonzero(p)) for p in own.values()),
                "bytes_dense": sum(p.nbytes for p in own.values()),
                "bytes_packed": sum(_packed(key, p) for key, p in own.items()),
                "multiplications": module.weight.numel() if multiplies else 0,
                "multiplications_left": int(torch.count_nonzero(module.weight)) if multiplies else 0,
            }
        )
    return rows


def _packed(key: str, parameter: nn.Parameter) -> int:
    is_matrix = key.endswith("weight") and parameter.ndim == 2
    return min(parameter.nbytes, packed_bytes(parameter)) if is_matrix else parameter.nbytes
