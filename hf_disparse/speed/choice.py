"""What could go at every site, what that costs each task, and the choice that a budget of time leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_disparse.pruning.budget import Options, choose
from hf_disparse.pruning.curvature import inverse, remove_parts, row_rise, weight_rise
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.parts import Site, mask_of_parts
from hf_disparse.speed.latency import LatencyTable
from hf_disparse.speed.statistics import Statistics

_STEPS = 128  # removals per site, about
_SHARES = (
    1 / 128,
    1 / 64,
    1 / 32,
    1 / 16,
    1 / 12,
    1 / 8,
    1 / 6,
    *(i / 20 for i in range(4, 21)),
)  # of parts, to choose from
_ROWS, _SAMPLE = 8, 100_000  # rows of a matrix, and weights of a site, from which costs are estimated


@dataclass(frozen=True)
class Choice:
    """What stays of one site: so many parts, and this fraction of their weights is zero."""

    parts: int
    zeros: float


SiteOptions = tuple[list[Choice], Options]  # what can stay of a site, and what each of these choices costs and takes


class JudgedSite:
    """The heads or neurons of one layer, judged by all tasks.

    Args:
        kind: `head` or `neuron`.
        site: with exactly one matrix that reads the parts.
        weights: parameter name -> (out, in).
        found: in units in which tasks are comparable, see `Statistics.in_units`.
        zeros: the fractions of zeros to choose from, 0 included.

    Attributes:
        removal: in which order parts go, and what that costs.
        score: parameter name -> (out, in), what a weight costs the worst-off task.
    """

    def __init__(self, kind: str, site: Site, weights: Mapping[str, Tensor], found: Statistics, zeros: Sequence[float]):
        self.kind, self.site, self.zeros = kind, site, [z for z in zeros if z]
        [(reader, owner)] = [(module, owner) for module, (dim, owner) in site.members.items() if dim == 1]
        inverses = {module: inverse(found.gram[module]) for module in site.members}
        self.removal = remove_parts(
            weights[f"{reader}.weight"],
            inverses[reader],
            found.curvature[reader],
            owner,
            step=max(1, site.parts // _STEPS),
        )
        alone = {module: weight_rise(weights[f"{module}.weight"], inverses[module]).float() for module in site.members}
        self.score = {
            f"{module}.weight": alone[module] * found.diagonal[module].amax(0)[:, None] for module in site.members
        }
        self._draw_sample(alone, found)
        self._growth = {z: self._growth_at(z, weights, inverses, found) for z in self.zeros}

    def options(self, table: LatencyTable) -> SiteOptions:
        """Returns what can stay of the site, and what each of these choices costs and takes."""
        left, rise = self.removal.left.numpy(), self.removal.rise.numpy()
        places = sorted({int(np.abs(left - share * self.site.parts).argmin()) for share in _SHARES})
        choices, costs = [], []
        for place in places:
            of_zeros = self._cost_of_zeros(int(left[place]))
            for zeros in (0.0, *self.zeros):
                choices.append(Choice(int(left[place]), zeros))
                costs.append(rise[place] + of_zeros.get(zeros, 0.0))
        seconds = [table.at(self.kind, choice.parts, choice.zeros) for choice in choices]
        return choices, Options(np.array(costs), np.array(seconds))

    def keep(self, parts: int) -> Tensor:
        """(parts,) bool: the parts that stay if so many do."""
        keep = torch.zeros(self.site.parts, dtype=torch.bool)
        keep[self.removal.order[self.site.parts - parts :]] = True
        return keep

    def masks(self, choice: Choice, active: Masks) -> Masks:
        """Returns the masks of the site's weights; what `active` prunes stays pruned."""
        masks = mask_of_parts(active, self.site, self.keep(choice.parts))
        scores = torch.cat([self.score[name][mask] for name, mask in masks.items()])
        count = round(choice.zeros * len(scores))
        if not count:
            return masks
        gone = torch.zeros(len(scores), dtype=torch.bool)
        gone[scores.argsort(stable=True)[:count]] = True
        sizes = [int(mask.sum()) for mask in masks.values()]
        return {
            name: mask.masked_scatter(mask, ~own)
            for (name, mask), own in zip(masks.items(), gone.split(sizes), strict=True)
        }

    def _draw_sample(self, alone: Mapping[str, Tensor], found: Statistics) -> None:
        """Draws weights: their parts (n,), scores (n,), what each costs each task (tasks, n), and how many each stands for."""
        generator, parts, scores, rises = torch.Generator().manual_seed(0), [], [], []
        size = sum(matrix.numel() for matrix in alone.values())
        for module, (dim, owner) in self.site.members.items():
            rows, columns = alone[module].shape
            count = max(1, round(min(1.0, _SAMPLE / size) * rows * columns))
            place = torch.randint(rows * columns, (count,), generator=generator)
            row, column = place // columns, place % columns
            parts.append(owner[row if dim == 0 else column])
            rises.append(found.diagonal[module][:, row] * alone[module][row, column])
            scores.append(self.score[f"{module}.weight"][row, column])
        self._parts, self._scores, self._rises = torch.cat(parts), torch.cat(scores), torch.cat(rises, 1).double()
        self._stands_for = size / len(self._parts)

    def _cost_of_zeros(self, parts: int) -> dict[float, np.ndarray]:
        """fraction of zeros -> what it costs each task if so many parts stay, (tasks,)."""
        there = self.keep(parts)[self._parts]
        order = self._scores[there].argsort()
        total = self._stands_for * self._rises[:, there][:, order].cumsum(1)
        if not total.shape[1]:
            return {}
        at = {zeros: max(0, int(zeros * total.shape[1]) - 1) for zeros in self.zeros}
        return {zeros: (self._growth[zeros] * total[:, place]).numpy() for zeros, place in at.items()}

    def _growth_at(
        self, zeros: float, weights: Mapping[str, Tensor], inverses: Mapping[str, Tensor], found: Statistics
    ) -> float:
        """How many times as much weights cost together as the sum of what each costs alone, estimated on a few rows."""
        threshold = self._scores.quantile(zeros)
        together = alone = 0.0
        for module in self.site.members:
            weight, score = weights[f"{module}.weight"], self.score[f"{module}.weight"]
            rows = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long().tolist()
            for row in rows:
                gone = score[row] <= threshold
                if gone.any():
                    factor = float(found.diagonal[module][:, row].amax()) * len(weight) / len(rows)
                    together += factor * row_rise(weight[row], inverses[module], gone)
                    alone += float(score[row][gone].sum()) * len(weight) / len(rows)
        return together / alone if alone else 1.0


def best_choices(sites: Mapping[str, SiteOptions], seconds: float, by_worst: bool) -> dict[str, Choice]:
    """Returns what stays of each site, such that all sites together take at most `seconds` and the tasks lose least."""
    chosen = choose([costs for _, costs in sites.values()], seconds, by_worst)
    return {name: choices[place] for (name, (choices, _)), place in zip(sites.items(), chosen, strict=True)}
