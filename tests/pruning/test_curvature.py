"""What it costs to remove parts and weights, against least squares that numpy solves for the columns that stay."""

import numpy as np
import pytest
import torch

from hf_disparse.pruning.curvature import inverse, remove_parts, row_rise, weight_rise

DAMPING = 0.01


def problem(tasks=2, out=5, parts=4, width=2, seed=0):
    random = np.random.default_rng(seed)
    columns = parts * width
    x = random.normal(size=(60, columns)) @ random.normal(size=(columns, columns))
    gram = x.T @ x / len(x)
    slopes = random.normal(size=(tasks, 40, out))
    return random.normal(size=(out, columns)), gram, np.einsum("tno,tnp->top", slopes, slopes) / 40


def damped(gram):
    return gram + DAMPING * np.mean(np.diag(gram)) * np.eye(len(gram))


def rise(weight, gram, curvature, keep):
    """1/2 tr(G D H D^T) for the best D that is -W on the columns that go."""
    gram = damped(gram)
    fitted = np.zeros_like(weight)
    fitted[:, keep] = np.linalg.solve(gram[np.ix_(keep, keep)], gram[keep] @ weight.T).T
    change = fitted - weight
    return np.einsum("tab,bi,ij,aj->t", curvature, change, gram, change) / 2


@pytest.mark.parametrize(("width", "step"), [(1, 1), (2, 1), (2, 3), (1, 3)])
def test_removing_parts_costs_what_the_refit_leaves(width, step):
    weight, gram, curvature = problem(parts=7, width=width)
    owner = torch.arange(7).repeat_interleave(width)
    tensors = [torch.from_numpy(array) for array in (weight, gram, curvature)]
    removal = remove_parts(tensors[0], inverse(tensors[1]), tensors[2], owner, step)
    assert sorted(removal.order.tolist()) == list(range(7)) and removal.left[0] == 7 and removal.left[-1] == 1
    for left, cost in zip(removal.left.tolist(), removal.rise, strict=True):
        keep = np.isin(owner.numpy(), removal.order[7 - left :].numpy())
        assert np.allclose(cost, rise(weight, gram, curvature, keep), rtol=1e-8, atol=1e-10)


def test_the_part_that_the_worst_off_task_misses_least_goes_first():
    weight, gram, curvature = problem(parts=6, width=2, seed=1)
    owner = np.arange(6).repeat(2)
    tensors = [torch.from_numpy(array) for array in (weight, gram, curvature)]
    removal = remove_parts(tensors[0], inverse(tensors[1]), tensors[2], torch.from_numpy(owner))
    there = set(range(6))
    for gone in removal.order.tolist()[:-1]:
        # What the worst-off task loses beyond what it has lost.
        before = rise(weight, gram, curvature, np.isin(owner, list(there)))
        worst = {p: max(rise(weight, gram, curvature, np.isin(owner, list(there - {p}))) - before) for p in there}
        assert gone == min(worst, key=worst.get)
        there.remove(gone)


def test_a_weight_costs_what_the_refit_of_its_row_leaves():
    weight, gram, curvature = problem()
    found = weight_rise(
        torch.from_numpy(weight),
        inverse(torch.from_numpy(gram)),
        torch.from_numpy(np.diagonal(curvature, axis1=1, axis2=2).copy()),
    )
    for row, column in ((0, 0), (3, 5)):
        keep = np.arange(weight.shape[1]) != column
        alone = rise(weight[row : row + 1], gram, np.ones((1, 1, 1)), keep)[0]
        assert np.allclose(found[:, row, column], curvature[:, row, row] * alone)


def test_several_weights_of_a_row_cost_what_its_refit_leaves():
    weight, gram, _ = problem()
    gone = np.array([True, False, False, True, True, False, False, False])
    found = row_rise(torch.from_numpy(weight[1]), inverse(torch.from_numpy(gram)), torch.from_numpy(gone))
    assert np.isclose(found, rise(weight[1:2], gram, np.ones((1, 1, 1)), ~gone)[0])
