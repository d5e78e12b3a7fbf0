"""What can stay of a site and what it costs, against sums and least squares by numpy."""

from itertools import product

import numpy as np
import pytest
import torch

from hf_disparse.pruning.parts import Site
from hf_disparse.speed.choice import Choice, JudgedSite, best_choices
from hf_disparse.speed.latency import LatencyTable
from hf_disparse.speed.statistics import Statistics

UP, DOWN = "up", "down"
TABLE = LatencyTable(
    1.0,
    {"head": [1, 6], "neuron": [1, 6]},
    {kind: {0.0: [0.0, 5.0], 0.5: [0.0, 2.5]} for kind in ("head", "neuron")},
)


def a_site(parts: int = 6) -> Site:
    owner = torch.arange(parts)
    return Site(parts, {UP: (0, owner), DOWN: (1, owner)})


def problem(tasks=2, parts=6, hidden=5, seed=0, correlated=True):
    """Weights of a site of neurons, and statistics of inputs and gradients."""
    random = np.random.default_rng(seed)
    weights = {"up.weight": random.normal(size=(parts, hidden)), "down.weight": random.normal(size=(hidden, parts))}
    gram, curvature = {}, {}
    for name, (rows, columns) in {UP: (parts, hidden), DOWN: (hidden, parts)}.items():
        x = random.normal(size=(40, columns)) @ (
            random.normal(size=(columns, columns)) if correlated else np.eye(columns)
        )
        gram[name] = x.T @ x / 40 if correlated else np.diag(random.random(columns) + 0.5)
        g = random.normal(size=(tasks, 30, rows))
        curvature[name] = np.einsum("tni,tnj->tij", g, g) / 30
    as_tensor = {k: torch.from_numpy(v).float() for k, v in weights.items()}
    found = Statistics(
        {k: torch.from_numpy(v).float() for k, v in gram.items()},
        {DOWN: torch.from_numpy(curvature[DOWN]).float()},
        {k: torch.from_numpy(v).float().diagonal(dim1=1, dim2=2) for k, v in curvature.items()},
    )
    return as_tensor, found


def judged(zeros=(0.0, 0.5), **kwargs) -> JudgedSite:
    return JudgedSite("neuron", a_site(kwargs.get("parts", 6)), *problem(**kwargs), zeros)


def damped(gram: torch.Tensor) -> np.ndarray:
    gram = gram.double().numpy()
    return gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))


def test_choices_cost_what_their_removal_does_and_take_what_the_table_says():
    site = judged(zeros=(0.0,))
    choices, options = site.options(TABLE)
    assert [choice.parts for choice in choices] == [6, 5, 4, 3, 2, 1] and {c.zeros for c in choices} == {0.0}
    assert np.array_equal(options.cost, site.removal.rise.numpy())
    assert options.seconds.tolist() == [5, 4, 3, 2, 1, 0]


def test_with_zeros_each_number_of_parts_is_cheaper_in_time_and_dearer_in_loss():
    choices, options = judged().options(TABLE)
    assert {(c.parts, c.zeros) for c in choices} == set(product(range(1, 7), (0.0, 0.5)))
    place = {(c.parts, c.zeros): i for i, c in enumerate(choices)}
    for parts in range(2, 7):
        whole, sparse = place[parts, 0.0], place[parts, 0.5]
        assert options.seconds[sparse] == options.seconds[whole] / 2
        assert (options.cost[sparse] > options.cost[whole]).all()


def test_zeros_of_uncorrelated_inputs_cost_the_sum_of_what_each_costs():
    """With weights that all cost the same, so that the draw of the estimate plays no part."""
    weights = {"up.weight": torch.ones(6, 5), "down.weight": -torch.ones(5, 6)}
    sizes = {UP: (6, 5), DOWN: (5, 6)}
    found = Statistics(
        {name: torch.eye(columns) for name, (_, columns) in sizes.items()},
        {DOWN: torch.stack([torch.eye(5), 3 * torch.eye(5)])},
        {name: torch.stack([torch.ones(rows), 3 * torch.ones(rows)]) for name, (rows, _) in sizes.items()},
    )
    choices, options = JudgedSite("neuron", a_site(), weights, found, [0.0, 0.5, 0.9]).options(TABLE_OF_ZEROS)
    for zeros in (0.5, 0.9):
        cost = options.cost[choices.index(Choice(6, zeros))]
        assert np.allclose(cost, zeros * 60 * 1.01 / 2 * np.array([1, 3]), rtol=1e-5)  # 1.01: damping


TABLE_OF_ZEROS = LatencyTable(
    1.0, TABLE.parts, {kind: {z: [0.0, 5.0 * (1 - z)] for z in (0.0, 0.5, 0.9)} for kind in ("head", "neuron")}
)


@pytest.mark.parametrize("correlated", [True, False])
def test_how_much_more_weights_cost_together_is_least_squares(correlated):
    """Matrices of at most eight rows, which are all looked at."""
    weights, found = problem(tasks=1, correlated=correlated)
    site = JudgedSite("neuron", a_site(), weights, found, [0.0, 0.5])
    threshold, together, alone = float(site._scores.quantile(0.5)), 0.0, 0.0
    for module in (UP, DOWN):
        gram, slopes = damped(found.gram[module]), found.diagonal[module][0].numpy()
        for row, score, slope in zip(
            weights[f"{module}.weight"].double().numpy(), site.score[f"{module}.weight"].numpy(), slopes, strict=True
        ):
            keep = score > threshold
            fitted = np.zeros_like(row)
            fitted[keep] = np.linalg.solve(gram[np.ix_(keep, keep)], gram[keep] @ row)
            together += slope * (fitted - row) @ gram @ (fitted - row) / 2
            for j in np.flatnonzero(~keep):
                others = np.arange(len(row)) != j
                single = row * (~others)
                rest = np.linalg.solve(gram[np.ix_(others, others)], gram[others] @ single)
                change = -single
                change[others] = rest
                alone += slope * change @ gram @ change / 2
    assert site._growth[0.5] == pytest.approx(together / alone, rel=1e-4)
    if not correlated:
        assert site._growth[0.5] == pytest.approx(1, rel=1e-6)


def test_what_stays_are_the_parts_that_would_go_last():
    site = judged()
    for parts in range(1, 7):
        assert site.keep(parts).nonzero().squeeze(1).tolist() == sorted(site.removal.order[6 - parts :].tolist())


@pytest.mark.parametrize(("parts", "zeros"), [(6, 0.0), (4, 0.0), (6, 0.5), (3, 0.5), (1, 0.5)])
def test_masks_zero_whole_parts_and_of_the_rest_the_weights_that_the_worst_off_task_misses_least(parts, zeros):
    weights, found = problem(tasks=3)
    site = JudgedSite("neuron", a_site(), weights, found, [0.0, 0.5])
    whole = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    masks, keep = site.masks(Choice(parts, zeros), whole), site.keep(parts).numpy()
    assert not masks["up.weight"][~keep].any() and not masks["down.weight"][:, ~keep].any()
    # The score by hand: slope of the worst-off task times w^2 over the inverse's diagonal.
    scores, stays = [], []
    for module, take in ((UP, np.s_[keep]), (DOWN, np.s_[:, keep])):
        diagonal = np.diag(np.linalg.inv(damped(found.gram[module])))
        slopes = found.diagonal[module].numpy().max(0)[:, None]
        scores += (slopes * weights[f"{module}.weight"].numpy() ** 2 / diagonal / 2)[take].ravel().tolist()
        stays += masks[f"{module}.weight"].numpy()[take].ravel().tolist()
    gone = np.argsort(scores)[: round(zeros * len(scores))]
    assert np.flatnonzero(~np.array(stays)).tolist() == sorted(gone)


def test_what_was_pruned_stays_pruned():
    weights, found = problem()
    site = JudgedSite("neuron", a_site(), weights, found, [0.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    active = {name: torch.rand(w.shape, generator=generator) > 0.5 for name, w in weights.items()}
    before = {name: mask.clone() for name, mask in active.items()}
    masks = site.masks(Choice(4, 0.5), active)
    assert all(torch.equal(active[name], before[name]) and not (masks[name] & ~active[name]).any() for name in masks)


def test_the_best_choices_are_the_best_of_all():
    sites = {name: judged(seed=seed, zeros=(0.0,)).options(TABLE) for seed, name in enumerate("abc")}

    def of(choices, by_worst):
        cost, seconds = 0, 0
        for name, (own, options) in sites.items():
            place = own.index(choices[name])
            cost, seconds = cost + options.cost[place], seconds + options.seconds[place]
        return (cost.max() if by_worst else cost.sum()), seconds

    every = [dict(zip(sites, c, strict=True)) for c in product(*(own for own, _ in sites.values()))]
    for by_worst, budget in product((True, False), (0.0, 4.0, 9.5)):
        cost, seconds = of(best_choices(sites, budget + 1e-9, by_worst), by_worst)
        allowed = [of(choices, by_worst)[0] for choices in every if of(choices, by_worst)[1] <= budget]
        assert seconds <= budget + 1e-6 and cost <= min(allowed) * 1.002


@pytest.mark.parametrize("parts", [1, 2, 300])
def test_sites_of_any_size_have_choices_from_one_part_to_all(parts):
    site = judged(parts=parts, hidden=3)
    choices, options = site.options(TABLE)
    assert choices[0].parts >= 1 and max(c.parts for c in choices) == parts and len(choices) == len(options.cost)
    assert min(c.parts for c in choices) <= max(1, parts // 100)
    assert np.isfinite(options.cost).all() and (options.cost >= 0).all()
