"""Group sparsity by proximal AdamW: `method: group_lasso`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_disparse.methods.base import Method, Update
from hf_disparse.methods.group_lasso import penalty_in_time, rms, shrink, shrinkage, sizes
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.parts import Site, masks_of_parts
from hf_disparse.pruning.rules import Sites, keep_parts, parts_to_prune

_NO_LR = 1e-30  # a warm-up begins at 0


class GroupLasso(Method):
    """After every optimizer step the proximal one; at `end_step` the groups with the smallest norms are pruned.

    In between there are no masks: a group at zero comes back if its gradient is stronger than the penalty. All is in the
    weights, so that there is no state to resume.

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
        """As for all that prune parts; remembers the groups, on the device of their weights."""
        super().check(parameters, sites)
        device = next(iter(parameters.values())).device
        self._sites = {
            kind: {name: _on(device, site) for name, site in places.items()} for kind, places in sites.items()
        }
        self._size = {n: sizes(parameters, site) for places in self._sites.values() for n, site in places.items()}

    def before_step(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Which step it is, for the penalty."""
        self._step = step

    @torch.no_grad()
    def after_optimizer(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        """The proximal step."""
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
                shrink(parameters, site, factor)
            self.penalty[kind] = penalty

    def update(self, now: Update) -> Masks:
        """Exactly `round(sparsity * groups)` groups of each kind, those with the smallest rms, and fixed from here on."""
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
    """The matrix whose learning rate is that of the site."""
    return parameters[f"{next(iter(site.members))}.weight"]
