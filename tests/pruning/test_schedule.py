"""When masks change and how far."""

from itertools import pairwise

import pytest

from hf_disparse import PruningConfig
from hf_disparse.pruning.schedule import cubic_sparsity, sparsity_at, update_steps


def test_cubic_follows_the_curve_of_zhu_and_gupta():
    # s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 with s_i = 0, written out at a quarter, a half and the end
    values = [cubic_sparsity(step, 100, 500, 0.8) for step in (0, 100, 200, 300, 500, 900)]
    assert values == pytest.approx([0, 0, 0.8 * (1 - 0.421875), 0.8 * (1 - 0.125), 0.8, 0.8])


def test_one_shot_prunes_once():
    config = PruningConfig(sparsity=0.7, start_step=5)
    assert [(s, sparsity_at(config, s)) for s in range(10) if sparsity_at(config, s) is not None] == [(5, 0.7)]


@pytest.mark.parametrize(("start", "end", "every"), [(0, 100, 10), (7, 100, 10), (0, 5, 100), (3, 4, 1)])
def test_cubic_ends_at_the_target_exactly_and_never_falls_back(start, end, every):
    config = PruningConfig(sparsity=0.9, schedule="cubic", start_step=start, end_step=end, update_every=every)
    steps = list(update_steps(config))
    values = [sparsity_at(config, step) for step in steps]
    assert steps[-1] == end
    assert values[-1] == 0.9
    assert all(start < step <= end for step in steps)
    assert all(b - a == every for a, b in pairwise(steps))
    assert values == sorted(values)
    assert values[0] > 0


def test_sparsity_zero_never_prunes():
    assert list(update_steps(PruningConfig(sparsity=0))) == []
