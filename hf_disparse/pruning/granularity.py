"""What is pruned: single weights, N of every M, blocks, or parts. Each class decides, counts and checks in its own unit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.masks import count_pruned
from hf_disparse.pruning.parts import Sites, channels, parameters_saved, sum_by_part
from hf_disparse.pruning.patterns import decide_n_of_m, expand_blocks, misfits, pool_blocks, pruned_in_groups
from hf_disparse.pruning.rules import decide_by, decide_parts


class Weights:
    """Single weights."""

    def describe(self) -> str:
        """Returns what is pruned, in the words of the model card."""
        return "weights"

    def sites(self, parameters: Mapping[str, Tensor], find: Callable[[], Sites]) -> Sites:
        """Returns kind -> name -> site of the parts that are pruned, empty for weights.

        Args:
            parameters: the prunable weights by name.
            find: returns all sites of the encoder; raises UserError if it does not know its architecture.
        """
        return {}

    def check(self, parameters: Mapping[str, Tensor], masks: Masks) -> None:
        """Accepts every model."""

    def decide(self, config: PruningConfig, task_scores, sparsity: float, active: Masks, sites: Sites) -> Masks:
        """Returns the masks that `config.decision` makes of the scores; what `active` prunes stays pruned."""
        return decide_by(config, task_scores, sparsity, active)

    def count(self, masks: Masks, sites: Sites) -> dict[str, tuple[int, int]]:
        """Returns {unit: (pruned, all)}; the sparsity of a schedule is a fraction of this."""
        return {"weight": count_pruned(masks)}


@dataclass(frozen=True)
class NofM(Weights):
    """N weights kept of every M consecutive ones in a row."""

    n: int
    m: int

    def describe(self) -> str:
        """As in `Weights`."""
        return f"weights ({self.m - self.n} of every {self.m} along each row: the pattern {self.n}:{self.m})"

    def check(self, parameters: Mapping[str, Tensor], masks: Masks) -> None:
        """Raises UserError if a matrix does not divide into groups of M, or its mask keeps fewer than N of one."""
        _check_multiple(parameters, 1, self.m, f"{self.n}:{self.m}")
        for name in masks:
            if name in parameters and (masks[name].reshape(-1, self.m).sum(dim=1) < self.n).any():
                raise UserError(
                    f"pruning.granularity: expected {self.n} weights left of every {self.m} for {self.n}:{self.m}, got "
                    f"fewer in '{name}', which is sparse already; start from a dense model"
                )

    def decide(self, config: PruningConfig, task_scores, sparsity: float, active: Masks, sites: Sites) -> Masks:
        """Decides within each group; see `decide_n_of_m`."""
        return decide_n_of_m(task_scores, self.n, self.m, config.decision, config.quorum, active)

    def count(self, masks: Masks, sites: Sites) -> dict[str, tuple[int, int]]:
        """Counts at most M - N pruned weights of each group."""
        return {"weight": pruned_in_groups(masks, self.n, self.m)}


@dataclass(frozen=True)
class Blocks(Weights):
    """Blocks of rows x columns weights; a block's score is the sum of its weights' scores."""

    rows: int
    columns: int

    def describe(self) -> str:
        """As in `Weights`."""
        return f"{self.rows} x {self.columns} blocks"

    def check(self, parameters: Mapping[str, Tensor], masks: Masks) -> None:
        """Raises UserError if a matrix does not divide into blocks."""
        _check_multiple(parameters, self.rows, self.columns, f"block{self.rows}x{self.columns}")

    def decide(self, config: PruningConfig, task_scores, sparsity: float, active: Masks, sites: Sites) -> Masks:
        """Decides over blocks as over weights; what `active` prunes stays pruned."""
        by_block = ((task, pool_blocks(scores, self.rows, self.columns)) for task, scores in task_scores)
        live = {name: kept > 0 for name, kept in pool_blocks(active, self.rows, self.columns).items()}
        keep = expand_blocks(decide_by(config, by_block, sparsity, live), self.rows, self.columns)
        return {name: mask & keep[name] for name, mask in active.items()}

    def count(self, masks: Masks, sites: Sites) -> dict[str, tuple[int, int]]:
        """Counts the blocks of which nothing is kept."""
        kept = torch.cat([blocks.flatten() for blocks in pool_blocks(masks, self.rows, self.columns).values()])
        return {"block": (int((kept == 0).sum()), len(kept))}


@dataclass(frozen=True)
class Parts(Weights):
    """Heads, neurons or layers, or several of these kinds, which are pruned as a whole at their sites."""

    kinds: tuple[str, ...]

    def describe(self) -> str:
        """As in `Weights`."""
        return " and ".join(f"{kind}s" for kind in self.kinds)

    def sites(self, parameters: Mapping[str, Tensor], find: Callable[[], Sites]) -> Sites:
        """Returns the sites of these kinds."""
        found = find()
        return {kind: found.get(kind, {}) for kind in self.kinds}

    def decide(self, config: PruningConfig, task_scores, sparsity: float, active: Masks, sites: Sites) -> Masks:
        """Decides over the parts of each kind; see `decide_parts`."""
        return decide_parts(config, task_scores, sparsity, active, sites)

    def count(self, masks: Masks, sites: Sites) -> dict[str, tuple[int, int]]:
        """Counts the parts of each kind of which nothing is kept."""
        counts = {}
        for kind, places in sites.items():
            gone = torch.cat([sum_by_part(masks, site) == 0 for site in places.values()])
            counts[kind] = (int(gone.sum()), len(gone))
        return counts


class Channels(Parts):
    """Input channels: the columns of every matrix, so that any architecture will do."""

    def describe(self) -> str:
        """As in `Weights`."""
        return "input channels"

    def sites(self, parameters: Mapping[str, Tensor], find: Callable[[], Sites]) -> Sites:
        """Makes every matrix a site."""
        return {"channel": channels(parameters)}


class Ranks(Parts):
    """Ranks of matrices in two factors."""

    def describe(self) -> str:
        """As in `Weights`."""
        return "parameters of the matrices (each the product of two, whose rank is cut)"

    def sites(self, parameters: Mapping[str, Tensor], find: Callable[[], Sites]) -> Sites:
        """Returns the sites of the matrices whose factors are prunable."""
        ranks = find().get("rank", {})
        return {"rank": {name: site for name, site in ranks.items() if f"{name}.up.weight" in parameters}}

    def count(self, masks: Masks, sites: Sites) -> dict[str, tuple[int, int]]:
        """Counts the parameters that the factors save."""
        return {"parameter": parameters_saved(masks, sites["rank"])}


def granularity_of(config: PruningConfig) -> Weights:
    """Returns the granularity that `config` asks for."""
    if config.n_of_m:
        return NofM(*config.n_of_m)
    if config.block:
        return Blocks(*config.block)
    if not config.prunes_parts:
        return Weights()
    return {"channel": Channels, "rank": Ranks}.get(config.granularity[0], Parts)(config.granularity)


def _check_multiple(parameters: Mapping[str, Tensor], rows: int, columns: int, pattern: str) -> None:
    for name in misfits(parameters, rows, columns):
        shape = " x ".join(str(n) for n in parameters[name].shape)
        raise UserError(
            f"pruning.granularity: expected matrices of a multiple of {rows} x {columns} for {pattern}, got {shape} for "
            f"'{name}'; leave it out by exclude_modules"
        )
