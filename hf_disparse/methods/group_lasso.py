"""Group sparsity by proximal descent: the penalty lambda sum_g sqrt(|g|) ||w_g|| drives whole groups of weights to zero.

Sources: the penalty on the shared layers of a multitask network, Upadhyay et al. 2023 (arXiv 2308.12114); its proximal step
after AdamW's, Deleu and Bengio 2021 (arXiv 2102.03869), here the unweighted one, which has a closed form:

    w_g <- w_g max(0, 1 - lr lambda sqrt(|g|) / ||w_g||)

With the root mean square of a group, rms_g = ||w_g|| / sqrt(|g|), that is max(0, 1 - lr lambda / rms_g): every group loses
lr lambda of its rms, and those that have no more are zero. A group is a part of a `Site`, parts share no weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_disparse.pruning.parts import Site


def sizes(tensors: Mapping[str, Tensor], site: Site) -> Tensor:
    """|g|, the number of weights of each group. Shapes: {parameter name: (rows, columns)} -> (parts,) float64."""
    total = 0
    for module, (dim, owner) in site.members.items():
        lines = torch.bincount(owner, minlength=site.parts)
        total = total + lines.double() * tensors[f"{module}.weight"].shape[1 - dim]
    return total


def rms(tensors: Mapping[str, Tensor], site: Site, size: Tensor) -> Tensor:
    """rms_g = ||w_g|| / sqrt(|g|). Shapes: {parameter name: (rows, columns)}, size (parts,) -> (parts,) float64."""
    squares = torch.zeros_like(size)
    for module, (dim, owner) in site.members.items():
        weight = tensors[f"{module}.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        lines = torch.linalg.vector_norm(weight, dim=1 - dim, dtype=wide)
        squares.index_add_(0, owner, lines.double().square_())  # in float64: the order of the sum does not show
    return (squares / size).sqrt()


def shrinkage(rms_: Tensor, lr: Tensor, penalty: Tensor) -> Tensor:
    """max(0, 1 - lr lambda / rms_g), the factor of the proximal step, 0 of a group that is zero.

    Shapes: rms_ and lr (groups,), penalty () -> (groups,) float64 in [0, 1].
    """
    reach = rms_ / lr  # the penalty at which the group is gone, as in `penalty_in_time` to the last bit
    return torch.where(reach > penalty, 1 - penalty / reach, 0.0)


def penalty_in_time(rms_: Tensor, lr: Tensor, count: int, steps: int) -> Tensor:
    """The lambda of this step for `count` groups to be zero in `steps` steps, this one included.

    The count-th smallest group is to lose the same each time, so lambda = rms_(count) / (lr steps), where rms / lr is what is
    sorted. Taken anew at each step, it answers to what the loss does to the groups meanwhile, and at the last step zeroes
    exactly those that are left over.

    Shapes: rms_ and lr (groups,) -> () float64.
    """
    if count == 0:
        return torch.zeros((), dtype=torch.float64, device=rms_.device)
    return torch.kthvalue(rms_ / lr, count).values / steps


def shrink(tensors: Mapping[str, Tensor], site: Site, factor: Tensor) -> None:
    """Multiplies the weights of every group by its factor, in place.

    Shapes: {parameter name: (rows, columns)}, factor (parts,).
    """
    for module, (dim, owner) in site.members.items():
        weight = tensors[f"{module}.weight"]
        weight.mul_(factor[owner].to(weight.dtype).unsqueeze(1 - dim))
