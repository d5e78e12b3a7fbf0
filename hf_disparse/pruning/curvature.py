"""What it costs each task to remove parts or weights of a matrix, once the rest is refitted: pure functions.

Take one matrix W, (out, in), with inputs x and outputs y = W x. H is the mean of x x^T over the tokens of all tasks, and
G_t the mean of g g^T over the tokens of task t, where g is the gradient of one example's loss with respect to y. With the
Kronecker-factored curvature of Martens and Grosse 2015 (arXiv 1503.05671), a change D of W adds to the loss of task t

    r_t(D) = 1/2 tr(G_t D H D^T)

up to a factor, the tokens of a text. If the columns S go and the others are refitted to the outputs by least squares
(Hassibi and Stork 1993; Kurtic et al. 2023, arXiv 2302.04089, eq. 3 and 4), that is

    D = - W_S (H^-1_SS)^-1 H^-1_S:        r_t = 1/2 tr(G_t W_S (H^-1_SS)^-1 W_S^T)

The refit is the same for every G_t, so all tasks can judge the same removal. Rises of columns that go one after another add
up exactly to the rise of removing them together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_disparse.pruning.reconstruction import DAMPING, damped


@dataclass(frozen=True)
class Removal:
    """The parts of one site in the order in which they go, and what that costs.

    Args:
        order: (parts,) int64, the first to go first; the last one never goes.
        left: (steps + 1,) int64, the number of parts left, from all to one.
        rise: (steps + 1, tasks) float64, the rise of each task's loss, in its own unit.
    """

    order: Tensor
    left: Tensor
    rise: Tensor


def inverse(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """(H + d)^-1 with the d of the refit, see `reconstruction.damped`. Shapes: (in, in) -> (in, in) float64."""
    return torch.linalg.inv(damped(gram.double(), damping)[0])


def remove_parts(weight: Tensor, inverse: Tensor, curvature: Tensor, owner: Tensor, step: int = 1) -> Removal:
    """Removes the parts of a matrix that reads them, always those whose removal costs the worst-off task least.

    Args:
        weight: (out, in).
        inverse: H^-1, (in, in).
        curvature: G_t of each task, in a unit in which tasks are comparable, (tasks, out, out).
        owner: the part of each column, (in,) int64 in 0..parts-1.
        step: parts that go at once. Each is judged as if it went alone; what they cost is what they cost together.
    """
    parts = int(owner.max()) + 1
    columns = [(owner == part).nonzero().squeeze(1) for part in range(parts)]
    inverse = inverse.double().clone()
    seen = torch.stack([_root(g.double()) for g in curvature]) @ weight.double()  # (tasks, out, in)
    alive, order, left, rises = list(range(parts)), [], [parts], [seen.new_zeros(len(seen))]
    while len(alive) > 1:
        worst = _rise_alone(seen, inverse, [columns[part] for part in alive]).amax(0)
        gone = [alive[i] for i in worst.argsort()[: min(step, len(alive) - 1)].tolist()]
        these = torch.cat([columns[part] for part in gone])
        moved = torch.linalg.solve(inverse[these][:, these], inverse[these])  # (H^-1_SS)^-1 H^-1_S:
        rises.append(rises[-1] + _rise(seen, inverse, these))
        seen = seen - seen[:, :, these] @ moved
        inverse = inverse - inverse[:, these] @ moved
        alive = [part for part in alive if part not in set(gone)]
        order += gone
        left.append(len(alive))
    return Removal(torch.tensor(order + alive), torch.tensor(left), torch.stack(rises))


def weight_rise(weight: Tensor, inverse: Tensor) -> Tensor:
    """1/2 w_ij^2 / H^-1_jj: what removing one weight alone costs where G_ii = 1, once its row is refitted; task t pays G_t,ii times that.

    Source: Frantar and Alistarh 2023 (arXiv 2301.00774), eq. 3.
    Shapes: weight (out, in), inverse H^-1 (in, in) -> (out, in) float64.
    """
    return weight.double().square() / inverse.diagonal() / 2


def row_rise(row: Tensor, inverse: Tensor, gone: Tensor) -> float:
    """1/2 w_S (H^-1_SS)^-1 w_S^T: what removing the columns S of one row costs, where G_ii = 1. Shapes: (in,), (in, in), (in,) bool."""
    own = row.double()[gone]
    return float(own @ torch.linalg.solve(inverse[gone][:, gone], own)) / 2


def _rise(seen: Tensor, inverse: Tensor, these: Tensor) -> Tensor:
    """r_t of removing these columns. Shapes: seen = G_t^1/2 W (tasks, out, in) -> (tasks,)."""
    own = seen[:, :, these]
    return (own @ torch.linalg.inv(inverse[these][:, these]) * own).sum((1, 2)) / 2


def _rise_alone(seen: Tensor, inverse: Tensor, columns: list[Tensor]) -> Tensor:
    """r_t of removing each part alone. Shapes: seen (tasks, out, in), columns: parts x (columns,) -> (tasks, parts)."""
    if all(len(own) == 1 for own in columns):
        these = torch.cat(columns)
        return seen[:, :, these].square().sum(1) / inverse.diagonal()[these] / 2
    return torch.stack([_rise(seen, inverse, own) for own in columns], 1)


def _root(matrix: Tensor) -> Tensor:
    """R with R^T R = `matrix`, which is symmetric and positive semi-definite."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()).T
