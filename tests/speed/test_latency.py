"""The table of seconds, by a clock that knows how long a shape takes."""

import copy

import pytest
import torch

from hf_disparse.export import compact
from hf_disparse.model.architectures import find_sites
from hf_disparse.speed.latency import ZEROS, LatencyTable, Timer, measure_table
from tests.helpers.clock import WEIGHTS, seconds_of, set_clock
from tests.helpers.compacting import model_of, prune_parts
from tests.helpers.tiny import CONFIGS
from tests.helpers.training import assert_same, weights


def by_table(table: LatencyTable, encoder) -> float:
    parts = {kind: [site.parts for site in find_sites(encoder)[kind].values()] for kind in ("head", "neuron")}
    return table.least + sum(table.at(kind, number, 0.0) for kind in parts for number in parts[kind])


@pytest.mark.parametrize("scale", [1e-3, 1e-6])
def test_layers_that_are_quick_are_repeated_and_counted_once(scale, monkeypatch):
    copies = []

    def seconds(encoder):
        copies.append(len(encoder.encoder.layer))
        return scale * seconds_of(encoder)

    set_clock(monkeypatch, seconds)
    model = model_of("bert")
    table = measure_table(Timer(model.encoder, "torch", 2, 8))
    assert set(copies[2:]) == {3}, "all but one measurement, which is to see how quick they are"
    assert by_table(table, model.encoder) == pytest.approx(scale * seconds_of(model.encoder))
    assert table.at("head", 4, 0.0) == pytest.approx(3 * scale)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_it_adds_up_to_what_encoders_of_any_shape_take(model_type):
    model = model_of(model_type)
    before = weights(model)
    table = measure_table(Timer(model.encoder, "torch", 2, 8))
    assert_same(before, weights(model))
    assert table.zeros == [0.0] and table.parts["head"][0] == table.parts["neuron"][0] == 1
    assert by_table(table, model.encoder) == pytest.approx(seconds_of(model.encoder))
    for seed in range(3):
        small = copy.deepcopy(model)
        prune_parts(small, seed=seed)
        compact(small)
        assert by_table(table, small.encoder) == pytest.approx(seconds_of(small.encoder))
    again = measure_table(Timer(small.encoder, "torch", 2, 8))  # of layers that differ
    assert by_table(again, small.encoder) == pytest.approx(seconds_of(small.encoder))


def test_zeros_are_measured_where_a_runtime_gains_by_them():
    model = model_of("bert")
    table = measure_table(Timer(model.encoder, "fast", 2, 8))
    assert table.zeros == list(ZEROS)
    for kind in ("head", "neuron"):
        for sparser, denser in zip(ZEROS[1:], ZEROS, strict=False):
            assert table.at(kind, table.parts[kind][-1], sparser) < table.at(kind, table.parts[kind][-1], denser)
        for zeros in ZEROS:  # which the layers of the table drew
            number, weight = table.parts[kind][-1], WEIGHTS[kind]
            further = table.at(kind, number, zeros) - table.at(kind, 1, zeros)
            assert further == pytest.approx((number - 1) * weight * (1 - zeros / 2), rel=0.05)


def test_more_parts_never_take_less(monkeypatch):
    """Even if the clock says so, as noise may."""
    noise = iter([1.0, 0.9, 1.2, 0.8, 1.1, 1.3] * 9)
    monkeypatch.setattr(Timer, "_least", lambda self, *encoders: [next(noise) for _ in encoders])
    table = measure_table(Timer(model_of("bert").encoder, "torch", 2, 8))
    for kind in ("head", "neuron"):
        assert table.seconds[kind][0.0] == sorted(table.seconds[kind][0.0]) and table.seconds[kind][0.0][0] >= 0


def test_between_and_beyond_what_was_measured():
    table = LatencyTable(1.0, {"head": [1, 3], "neuron": [1]}, {"head": {0.0: [0.0, 4.0]}, "neuron": {0.0: [0.5]}})
    assert [table.at("head", n, 0.0) for n in (1, 2, 3)] == [0.0, 2.0, 4.0] and table.at("neuron", 1, 0.0) == 0.5


def test_a_real_clock_gives_seconds(monkeypatch):
    monkeypatch.undo()
    threads = torch.get_num_threads()
    timer = Timer(model_of("bert").encoder, "torch", 2, 8)
    assert 0 < timer.before() < 10 and timer.after(timer.whole) > 0
    assert timer.ids.shape == (2, 8) and torch.get_num_threads() == threads
