"""Settings of pruning to a speed: read, written, and refused where they make no sense."""

import pytest

from hf_disparse import SpeedConfig, UserError
from hf_disparse.config import PruningConfig


def test_who_asks_for_a_speed_prunes_to_a_speed(tmp_path):
    config = PruningConfig.from_dict({"speedup": 5})
    assert config == SpeedConfig(speedup=5) and type(config) is SpeedConfig and config.method == "speed"
    assert PruningConfig.from_dict({"latency_ms": 2.5, "batch": 1}) == SpeedConfig(latency_ms=2.5, batch=1)
    config = SpeedConfig(latency_ms=3, runtime="torch", length=7, threads=2, decision="joint", score_batches=3, seed=4)
    config.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == config == SpeedConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "speedup: expected either speedup or latency_ms, got neither"),
        ({"speedup": 2, "latency_ms": 3}, "speedup: expected either speedup or latency_ms, got speedup and latency_ms"),
        ({"speedup": 1}, "speedup: expected a number above 1, got 1"),
        ({"speedup": 0.5}, "speedup: expected a number above 1, got 0.5"),
        ({"speedup": -2}, "speedup: "),
        ({"speedup": float("nan")}, "speedup: "),
        ({"speedup": float("inf")}, "speedup: "),
        ({"speedup": "3"}, "speedup: "),
        ({"speedup": True}, "speedup: "),
        ({"latency_ms": 0}, "latency_ms: "),
        ({"speedup": 2, "runtime": "fsat"}, "runtime: unknown value 'fsat'"),
        ({"speedup": 2, "batch": 0}, "batch: expected a whole number of at least 1"),
        ({"speedup": 2, "length": 1.5}, "length: expected a whole number of at least 1"),
        ({"speedup": 2, "threads": True}, "threads: expected a whole number of at least 1"),
        ({"speedup": 2, "criterion": "magnitude", "decision": "sum"}, "decision: must be unanimous with criterion"),
        ({"speedup": 2, "criterion": "snip"}, "criterion: "),
        ({"speedup": 2, "decision": "quorum"}, "decision: "),
        ({"speedup": 2, "score_batches": 0}, "score_batches: "),
        ({"speedup": 2, "sparsity": 0.5}, "sparsity: "),
        ({"speedup": 2, "granularity": "weight"}, "granularity: "),
        ({"speedup": 2, "schedule": "cubic"}, "schedule: "),
        ({"speedup": 2, "reconstruct": True}, "reconstruct: "),
        ({"speedup": 2, "start_step": 3}, "start_step: "),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UserError) as caught:
        SpeedConfig(**values)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
