"""The choice that costs the tasks least within a budget of time: one option for each site, by integer programming."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from hf_disparse.config import UserError

_GAP = 1e-3  # of the cost; the budget holds exactly


@dataclass(frozen=True)
class Options:
    """What can be done with one site: cost (options, tasks) and seconds (options,), both float64."""

    cost: np.ndarray
    seconds: np.ndarray


def choose(sites: Sequence[Options], seconds: float, by_worst: bool) -> list[int]:
    """Returns the option of each site such that the tasks' costs are least and the times add up to at most `seconds`.

    With x_so = 1 for the chosen option o of site s, the multiple-choice knapsack problem

        minimise max_t sum_so cost_sot x_so    (`by_worst`; else the sum over t)
        with     sum_o x_so = 1 for every s    and    sum_so seconds_so x_so <= seconds

    is solved by HiGHS (scipy).

    Raises:
        UserError: the fastest options take longer.
    """
    fastest = sum(site.seconds.min() for site in sites)
    if fastest > seconds:
        raise UserError(f"expected at least {1000 * fastest:.3g} ms, got {1000 * seconds:.3g} ms")
    cost, time = (np.concatenate([getattr(site, key) for site in sites]) for key in ("cost", "seconds"))
    sizes = [len(site.seconds) for site in sites]
    number, tasks = cost.shape
    cost = cost / max(cost.max(), 1e-300)
    site_of = np.repeat(np.arange(len(sites)), sizes)
    one_each = csr_array((np.ones(number), (site_of, np.arange(number))), shape=(len(sites), number + 1))
    unit = seconds or time.max() or 1.0
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint([[*(time / unit), 0]], -np.inf, seconds / unit)]
    if by_worst:  # the last variable is the cost of the worst-off task
        each_task = np.column_stack([cost.T, -np.ones(tasks)])
        constraints.append(LinearConstraint(each_task, -np.inf, 0))
    found = milp(
        [*np.zeros(number), 1] if by_worst else [*cost.sum(1), 0],
        constraints=constraints,
        integrality=[*np.ones(number), 0],
        bounds=Bounds(0, [*np.ones(number), np.inf]),
        options={"mip_rel_gap": _GAP},
    )
    return [int(chosen.argmax()) for chosen in np.split(found.x[:-1], np.cumsum(sizes)[:-1])]
