"""What it costs to remove parts and weights, against least squares that numpy solves for the columns that stay."""

import numpy as np
import pytest
import torch

from hf_disparse.pruning.curvature import inverse, remove_parts, row_rise, weight_rise

DAMPING = 0.01
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def problem(tasks=2, out=5, parts=4, width=2, seed=0):
    random = np.random.default_rng(seed)
    columns = parts * width
    x = random.normal(size=(60, columns)) @ random.normal(size=(columns, columns))
    gram = x.T @ x / len(x)
    slopes = random.normal(size=(tasks, 40, out)) * np.arange(1, tasks + 1)[:, None, None]
    return random.normal(size=(out, columns)), gram, np.einsum("tno,tnp->top", slopes, slopes) / 40


def damped(gram, damping=DAMPING):
    return gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))


def rise(weight, gram, curvature, keep):
    """1/2 tr(G D H D^T) for the best D that is -W on the columns that go: (tasks,)."""
    gram = damped(gram)
    fitted = np.zeros_like(weight)
    fitted[:, keep] = np.linalg.solve(gram[np.ix_(keep, keep)], gram[keep] @ weight.T).T
    change = fitted - weight
    return np.einsum("tab,bi,ij,aj->t", curvature, change, gram, change) / 2


def removed(weight, gram, curvature, owner, step=1):
    tensors = [torch.from_numpy(array) for array in (weight, gram, curvature)]
    return remove_parts(tensors[0], inverse(tensors[1]), tensors[2], torch.as_tensor(owner), step)


def owners(parts, width, mixed, seed=0):
    """The part of each column; mixed: scattered, and of unequal sizes."""
    owner = np.arange(parts).repeat(width)
    if not mixed:
        return owner
    random = np.random.default_rng(seed)
    return random.permutation(np.concatenate([np.arange(parts), random.integers(0, parts, parts * (width - 1))]))


def test_the_reference_itself_is_least_squares():
    """Rows of x and the damping as further examples, by numpy's lstsq."""
    random = np.random.default_rng(3)
    x, weight = random.normal(size=(30, 6)), random.normal(size=(4, 6))
    keep = np.array([True, False, True, True, False, True])
    rows = np.concatenate([x / np.sqrt(30), np.sqrt(DAMPING * np.mean(np.sum(x * x, 0) / 30)) * np.eye(6)])
    rest = np.linalg.lstsq(rows[:, keep], rows @ weight.T, rcond=None)[0]
    left = rows[:, keep] @ rest - rows @ weight.T
    assert np.allclose(rise(weight, x.T @ x / 30, np.eye(4)[None], keep), np.sum(left**2) / 2, **EXACT)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(("width", "mixed"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("tasks", [1, 3])
def test_removing_parts_costs_what_the_refit_leaves(tasks, width, mixed, step):
    weight, gram, curvature = problem(tasks, parts=7, width=width)
    owner = owners(7, width, mixed)
    removal = removed(weight, gram, curvature, owner, step)
    assert sorted(removal.order.tolist()) == list(range(7))
    assert removal.left.tolist() == (list(range(7, 0, -1)) if step == 1 else [7, 4, 1])
    assert removal.rise.shape == (len(removal.left), tasks) and removal.rise.dtype == torch.float64
    for left, cost in zip(removal.left.tolist(), removal.rise, strict=True):
        keep = np.isin(owner, removal.order[7 - left :].numpy())
        assert np.allclose(cost, rise(weight, gram, curvature, keep), **EXACT)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("width", "mixed"), [(1, False), (2, True)])
def test_the_part_that_the_worst_off_task_misses_least_goes_first(width, mixed, seed):
    weight, gram, curvature = problem(3, parts=6, width=width, seed=seed)
    owner, there = owners(6, width, mixed, seed), set(range(6))
    for gone in removed(weight, gram, curvature, owner).order.tolist()[:-1]:
        # What the worst-off task loses beyond what it has lost.
        before = rise(weight, gram, curvature, np.isin(owner, list(there)))
        worst = {p: max(rise(weight, gram, curvature, np.isin(owner, list(there - {p}))) - before) for p in there}
        assert gone == min(worst, key=worst.get)
        there.remove(gone)


def test_parts_that_go_at_once_are_those_that_would_go_alone():
    weight, gram, curvature = problem(2, parts=7, width=2, seed=5)
    owner, there = owners(7, 2, mixed=True), set(range(7))
    order = removed(weight, gram, curvature, owner, step=3).order.tolist()
    for begin in (0, 3):
        before = rise(weight, gram, curvature, np.isin(owner, list(there)))
        worst = {p: max(rise(weight, gram, curvature, np.isin(owner, list(there - {p}))) - before) for p in there}
        gone = order[begin : begin + 3]
        assert gone == sorted(worst, key=worst.get)[:3]
        there -= set(gone)


def test_a_part_that_a_task_needs_stays_though_the_tasks_need_it_less_on_average():
    """Part 0 is read by output 0 alone, which only the second task looks at; part 1 by both, and costs more in sum."""
    weight, gram = np.array([[1.0, 0.0], [0.0, 0.9]]), np.eye(2)
    curvature = np.stack([np.diag([0.0, 1.0]), np.diag([1.0, 1.0])])
    assert (
        rise(weight, gram, curvature, np.array([False, True])).sum()
        < rise(weight, gram, curvature, np.array([True, False])).sum()
    )
    assert removed(weight, gram, curvature, [0, 1]).order.tolist() == [1, 0]


def test_a_copy_of_another_part_goes_first_at_the_price_of_the_damping_alone():
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(50, 4)), 5 + random.normal(size=(3, 4))
    x[:, 2] = x[:, 1]
    gram = x.T @ x / 50
    removal = removed(weight, gram, np.eye(3)[None], np.arange(4))
    gone = removal.order[0].item()
    assert gone in (1, 2) and removal.order[1].item() not in (1, 2), "the copy is needed now"
    # Moving its weights to its copy changes no output, and two columns by as much as they were.
    moved = DAMPING * np.mean(np.diag(gram)) * 2 * np.square(weight[:, gone]).sum() / 2
    assert 0 < removal.rise[1, 0] <= moved < rise(weight, gram, np.eye(3)[None], np.arange(4) != 0)[0] / 10


def test_one_part_stays_and_nothing_is_changed_in_place():
    weight, gram, curvature = problem(parts=1, width=3)
    tensors = [torch.from_numpy(array) for array in (weight, gram, curvature)]
    given = [tensors[0], inverse(tensors[1]), tensors[2]]
    before = [tensor.clone() for tensor in given]
    removal = remove_parts(*given, torch.zeros(3, dtype=torch.int64))
    assert removal.order.tolist() == [0] and removal.left.tolist() == [1] and removal.rise.tolist() == [[0.0, 0.0]]
    remove_parts(*given, torch.arange(3))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_an_inverse_is_numpys(damping):
    _, gram, _ = problem(parts=5)
    found = inverse(torch.from_numpy(gram).float(), damping)
    assert found.dtype == torch.float64
    assert np.allclose(found, np.linalg.inv(damped(gram.astype(np.float32).astype(float), damping)), **EXACT)
    # Inputs that are always zero have an inverse, too, so that removing what reads them costs nothing.
    nothing = inverse(torch.zeros(3, 3))
    assert nothing.isfinite().all()
    assert np.allclose(weight_rise(torch.ones(2, 3), nothing), 0, atol=1e-9)


def test_a_weight_costs_what_the_refit_of_its_row_leaves():
    weight, gram, curvature = problem(3)
    diagonal = np.diagonal(curvature, axis1=1, axis2=2).copy()
    found = diagonal[:, :, None] * weight_rise(torch.from_numpy(weight), inverse(torch.from_numpy(gram))).numpy()
    assert found.shape == (3, *weight.shape)
    for row, column in np.ndindex(weight.shape):
        keep = np.arange(weight.shape[1]) != column
        alone = rise(weight[row : row + 1], gram, np.ones((1, 1, 1)), keep)[0]
        assert np.allclose(found[:, row, column], diagonal[:, row] * alone, **EXACT)


@pytest.mark.parametrize("gone", [[0], [0, 3, 4], [0, 1, 2, 4, 5, 6, 7]])
def test_several_weights_of_a_row_cost_what_its_refit_leaves(gone):
    weight, gram, _ = problem()
    keep = ~np.isin(np.arange(8), gone)
    found = row_rise(torch.from_numpy(weight[1]), inverse(torch.from_numpy(gram)), torch.from_numpy(~keep))
    assert np.isclose(found, rise(weight[1:2], gram, np.ones((1, 1, 1)), keep)[0], **EXACT)


def test_a_whole_row_costs_what_it_gave():
    weight, gram, _ = problem()
    found = row_rise(torch.from_numpy(weight[1]), inverse(torch.from_numpy(gram)), torch.ones(8, dtype=torch.bool))
    assert np.isclose(found, weight[1] @ damped(gram) @ weight[1] / 2, **EXACT)
