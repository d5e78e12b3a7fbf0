"""Where the parameters, bytes and multiplications of a model are, dense and without its zeros."""

from typing import Any

import torch
from torch import nn

from hf_disparse.pruning.masks import packed_bytes


@torch.no_grad()
def footprint(model: nn.Module) -> list[dict[str, Any]]:
    """One row per module that has parameters of its own; a parameter that several modules share goes with the first.

    "parameters" and "nonzeros" count numbers; "bytes_dense" is their size as they are, "bytes_packed" with every matrix as its non-zeros
    and one bit a weight where that is smaller, as `save_packed` writes it. "multiplications" are those of the weights of Linear
    modules per token, "multiplications_left" those by non-zeros: what is left to do for a runtime that skips zeros, which stock
    PyTorch is not. Attention's products of tokens with tokens grow with the text and are not in it.
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
