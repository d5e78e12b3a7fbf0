"""The choice within a budget of time, against all choices tried one by one."""

from itertools import product

import numpy as np
import pytest

from hf_disparse import UserError
from hf_disparse.pruning.budget import Options, choose


@pytest.mark.parametrize("by_worst", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_within_the_budget_costs_less(by_worst, seed):
    random = np.random.default_rng(seed)
    sites = [Options(random.random((4, 3)), random.random(4)) for _ in range(4)]
    budget = 0.2 + sum(site.seconds.min() for site in sites)

    def total(choice):
        cost = sum(site.cost[i] for site, i in zip(sites, choice, strict=True))
        return cost.max() if by_worst else cost.sum()

    def seconds(choice):
        return sum(site.seconds[i] for site, i in zip(sites, choice, strict=True))

    best = min(total(choice) for choice in product(range(4), repeat=4) if seconds(choice) <= budget)
    chosen = choose(sites, budget, by_worst)
    assert seconds(chosen) <= budget + 1e-9 and total(chosen) <= best * 1.0011


def test_a_budget_below_the_fastest_choice_is_refused():
    with pytest.raises(UserError, match=r"expected at least 1e\+03 ms, got 900 ms"):
        choose([Options(np.zeros((2, 1)), np.array([1.0, 2.0]))], 0.9, True)
