"""Group lasso: the penalty lambda sum_g sqrt(|g|) ||w_g|| drives whole groups of weights to zero: `method: group_lasso`.

Sources: the penalty on the shared layers of a multitask network is from Upadhyay et al. 2023 (arXiv 2308.12114), its proximal
step after AdamW's from Deleu and Bengio 2021 (arXiv 2102.03869), here unweighted, so that it has a closed form:

    w_g <- w_g max(0, 1 - lr lambda sqrt(|g|) / ||w_g||)

With the root mean square of a group, rms_g = ||w_g|| / sqrt(|g|), the factor is max(0, 1 - lr lambda / rms_g): every group
loses lr lambda of its rms, and a group with no more than that becomes zero. A group is a part of a `Site`; no two groups share
a weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_disparse.methods.base import Method, Update
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.parts import Site, Sites, masks_of_parts
from hf_disparse.pruning.rules import keep_parts, parts_to_prune


def group_sizes(tensors: Mapping[str, Tensor], site: Site) -> Tensor:
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
        squares.index_add_(0, owner, lines.double().square_())  # float64 hides the order of the sum
    return (squares / size).sqrt()


def shrinkage(rms_: Tensor, lr: Tensor, penalty: Tensor) -> Tensor:
    """max(0, 1 - lr lambda / rms_g), the factor of the proximal step; 0 for a group that is zero.

    Shapes: rms_ and lr (groups,), penalty () -> (groups,) float64 in [0, 1].
    """
    reach = rms_ / lr  # the penalty at which the group is gone, in the same bits as in `penalty_in_time`
    return torch.where(reach > penalty, 1 - penalty / reach, 0.0)


def penalty_in_time(rms_: Tensor, lr: Tensor, count: int, steps: int) -> Tensor:
    """Returns the lambda of this step that makes `count` groups zero within `steps` steps, this one included.

    The count-th smallest group should lose the same amount at each step, so lambda = rms_(count) / (lr steps), with groups
    sorted by rms / lr. Computed anew at each step, it follows what the loss does to the groups, and the last step zeroes
    exactly the groups that are left.

    Shapes: rms_ and lr (groups,) -> () float64.
    """
    if count == 0:
        return torch.zeros((), dtype=torch.float64, device=rms_.device)
    return torch.kthvalue(rms_ / lr, count).values / steps


def scale_groups(tensors: Mapping[str, Tensor], site: Site, factor: Tensor) -> None:
    """Multiplies the weights of every group by its factor, in place.

    Shapes: {parameter name: (rows, columns)}, factor (parts,).
    """
    for module, (dim, owner) in site.members.items():
        weight = tensors[f"{module}.weight"]
        weight.mul_(factor[owner].to(weight.dtype).unsqueeze(1 - dim))


_NO_LR = 1e-30  # stands for 0, where a warm-up begins


class GroupLasso(Method):
    """Takes a proximal step after every optimizer step; at `end_step` it prunes the groups with the smallest norms.

    There are no masks in between: a group at zero comes back if its gradient is stronger than the penalty. The weights are
    the whole state, so a checkpoint needs nothing else.

    Attributes:
        penalty: kind of group -> the lambda of the last step, (); empty before the first.
    """

    def __init__(self, config):
        super().__init__(config)
        self.penalty: dict[str, Tensor] = {}
        self._sites: Sites = {}
        self._size: dict[str, Tensor] = {}
        self._step = 0

    def check(self, parameters: Mapping[str, Tensor], sites: Sites) -> None:
        """Checks as every method that prunes parts; remembers the groups, on the device of their weights."""
        super().check(parameters, sites)
        device = next(iter(parameters.values())).device
        self._sites = {
            kind: {name: _on(device, site) for name, site in places.items()} for kind, places in sites.items()
        }
        self._size = {n: group_sizes(parameters, site) for places in self._sites.values() for n, site in places.items()}

    def before_step(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Remembers the step, which the penalty depends on."""
        self._step = step

    @torch.no_grad()
    def after_optimizer(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        """Takes the proximal step."""
        if not self.config.start_step <= self._step < self.last:
            return
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for kind, places in self._sites.items():
            norms = {name: rms(parameters, site, self._size[name]) for name, site in places.items()}
            lr = {
                name: torch.full_like(norms[name], max(float(rates.get(id(_first(parameters, site)), 0.0)), _NO_LR))
                for name, site in places.items()
            }
            flat, rate = torch.cat(list(norms.values())), torch.cat(list(lr.values()))
            if self.config.penalty is None:
                count = parts_to_prune(kind, [site.parts for site in places.values()], self.config.sparsity)
                penalty = penalty_in_time(flat, rate, count, self.last - self._step)
            else:
                penalty = torch.tensor(self.config.penalty, dtype=flat.dtype, device=flat.device)
            factors = shrinkage(flat, rate, penalty).split([site.parts for site in places.values()])
            for site, factor in zip(places.values(), factors, strict=True):
                scale_groups(parameters, site, factor)
            self.penalty[kind] = penalty

    def update(self, now: Update) -> Masks:
        """Prunes exactly `round(sparsity * groups)` groups of each kind, those with the smallest rms, for good."""
        masks = dict(now.masks)
        for kind, places in self._sites.items():
            norms = {name: rms(now.parameters, site, self._size[name]).detach() for name, site in places.items()}
            live = {name: torch.ones_like(norm, dtype=torch.bool) for name, norm in norms.items()}
            keep = keep_parts(self.config, kind, [("norms", norms)], self.config.sparsity, live)
            masks |= masks_of_parts(masks, places, keep)
        return masks


def _on(device: torch.device, site: Site) -> Site:
    return Site(site.parts, {module: (dim, owner.to(device)) for module, (dim, owner) in site.members.items()})


def _first(parameters: Mapping[str, nn.Parameter], site: Site) -> nn.Parameter:
    """Returns the matrix whose learning rate counts as that of the site."""
    return parameters[f"{next(iter(site.members))}.weight"]


METHOD = GroupLasso
