"""The choice within a budget of time, against all choices tried one by one."""

from itertools import product

import numpy as np
import pytest

from hf_disparse import UserError
from hf_disparse.pruning.budget import _GAP, Options, choose


def total(sites, choice, by_worst):
    cost = sum(site.cost[i] for site, i in zip(sites, choice, strict=True))
    return cost.max() if by_worst else cost.sum()


def seconds(sites, choice):
    return sum(site.seconds[i] for site, i in zip(sites, choice, strict=True))


def within(sites, budget):
    return [c for c in product(*(range(len(site.seconds)) for site in sites)) if seconds(sites, c) <= budget]


def draw(seed, tasks):
    """Sites with unequal numbers of options, of very unequal costs, as those of layers are."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 6, size=4)
    sites = [Options(random.random((n, tasks)) * 10 ** random.uniform(-2, 2), random.random(n) / 1000) for n in sizes]
    fastest, slowest = (sum(pick(site.seconds) for site in sites) for pick in (np.min, np.max))
    return sites, fastest + random.uniform(0.05, 0.9) * (slowest - fastest)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("by_worst", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_within_the_budget_costs_less(by_worst, seed, tasks):
    sites, budget = draw(seed, tasks)
    chosen = choose(sites, budget, by_worst)
    assert seconds(sites, chosen) <= budget * (1 + 1e-6), "HiGHS's tolerance"
    best = min(total(sites, choice, by_worst) for choice in within(sites, budget))
    assert total(sites, chosen, by_worst) <= best * (1 + 2 * _GAP)


def test_the_worst_off_task_and_the_sum_want_different_things():
    """Option 0 costs one task 3, option 1 each of them 2."""
    sites = [Options(np.array([[3.0, 0.0], [2.0, 2.0], [0.0, 0.0]]), np.array([1.0, 1.0, 2.0]))]
    assert choose(sites, 1.5, by_worst=True) == [1] and choose(sites, 1.5, by_worst=False) == [0]


def test_tasks_that_lose_in_different_places_share_the_loss():
    """Each site costs one task 2 or the other 2.1: two of the same would cost the sum less and one task twice as much."""
    sites = [Options(np.array([[2.0, 0.0], [0.0, 2.1]]), np.ones(2)) for _ in range(2)]
    assert sorted(choose(sites, 2.0, by_worst=True)) == [0, 1] and choose(sites, 2.0, by_worst=False) == [0, 0]


@pytest.mark.parametrize("by_worst", [True, False])
def test_a_budget_that_is_just_enough_is_used_up(by_worst):
    sites = [Options(np.array([[9.0], [1.0]]), np.array([1.0, 2.0])) for _ in range(3)]
    for number in range(4):
        assert sum(choose(sites, 3.0 + number, by_worst)) == number
        assert sum(choose(sites, 3.0 + number + 0.999, by_worst)) == number


@pytest.mark.parametrize("by_worst", [True, False])
def test_without_any_time_what_takes_none_is_chosen(by_worst):
    sites = [Options(np.array([[0.0], [1.0]]), np.array([0.01, 0.0])) for _ in range(3)]
    assert choose(sites, 0.0, by_worst) == [1, 1, 1]
    assert choose([Options(site.cost, np.zeros(2)) for site in sites], 0.0, by_worst) == [0, 0, 0]


@pytest.mark.parametrize("by_worst", [True, False])
def test_with_time_for_all_nothing_goes_and_what_costs_nothing_is_chosen_without_a_fault(by_worst):
    sites, _ = draw(0, 2)
    free = [Options(site.cost - site.cost.min(0), site.seconds) for site in sites]
    chosen = choose(free, 1.0, by_worst)
    assert total(free, chosen, by_worst) <= min(total(free, c, by_worst) for c in within(free, 1.0)) * (1 + 2 * _GAP)
    costless = [Options(np.zeros((3, 2)), np.arange(3.0)) for _ in range(2)]
    assert seconds(costless, choose(costless, 1.0, by_worst)) <= 1


def test_a_budget_below_the_fastest_choice_is_refused():
    with pytest.raises(UserError, match=r"expected at least 1e\+03 ms, got 900 ms"):
        choose([Options(np.zeros((2, 1)), np.array([1.0, 2.0]))], 0.9, True)
