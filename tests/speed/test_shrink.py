"""A tiny model made as fast as asked, by a clock that knows how long a shape takes."""

import pytest
import torch

from hf_disparse import MultitaskModel, SpeedConfig, UserError, shrink, speed_up
from hf_disparse.config import PruningConfig
from hf_disparse.model.architectures import find_sites
from hf_disparse.speed.latency import Timer
from tests.helpers.speeding import sparse_model
from tests.helpers.tiny import tiny_model
from tests.helpers.training import multitask_trainer


def _seconds(encoder) -> float:
    """A second for the encoder, one for each head and a quarter for each neuron."""
    sites = find_sites(encoder)
    return 1 + sum(w * site.parts for kind, w in (("head", 1), ("neuron", 0.25)) for site in sites[kind].values())


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(Timer, "_least", lambda self, *encoders: [_seconds(encoder) for encoder in encoders])


@pytest.fixture
def batches(tmp_path):
    trainer = multitask_trainer(tmp_path, PruningConfig(sparsity=0.5))
    return {
        task: [batch for _, batch in zip(range(2), loader, strict=False)]
        for task, loader in trainer.pruner.loaders.items()
    }


@pytest.mark.parametrize("decision", ["unanimous", "sum", "joint"])
def test_a_model_becomes_as_fast_as_asked_and_compact(batches, tmp_path, decision):
    model = tiny_model().eval()
    before = _seconds(model.encoder)
    done = shrink(model, batches, SpeedConfig(speedup=1.5, runtime="torch", batch=2, length=8, decision=decision))
    assert _seconds(model.encoder) <= before / 1.5
    assert done.before == 1000 * before and done.after == pytest.approx(1000 * _seconds(model.encoder))
    assert done.parts["neuron"] == [site.parts for site in find_sites(model.encoder)["neuron"].values()]
    model.save_pretrained(tmp_path / "saved")
    again, batch = MultitaskModel.from_pretrained(tmp_path / "saved").eval(), next(iter(batches.values()))[0]
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_speed_that_cannot_be_had_is_refused(batches):
    with pytest.raises(UserError, match="expected at least"):
        shrink(tiny_model().eval(), batches, SpeedConfig(speedup=1000, runtime="torch", batch=2, length=8))


def test_what_cannot_be_shrunk_says_why(gains_nothing, batches):
    with pytest.raises(UserError, match="undo_speed_up"):
        shrink(gains_nothing, batches, SpeedConfig(speedup=2))
    with pytest.raises(UserError, match=r"model\.float"):
        shrink(tiny_model().bfloat16(), batches, SpeedConfig(speedup=2))


@pytest.fixture
def gains_nothing(monkeypatch):
    """A sped-up model, whatever its speed."""
    import itertools

    from tests.helpers.speeding import MODULE

    seconds = itertools.cycle([[3.0, 3.0], [1.0, 1.0]])
    monkeypatch.setattr(MODULE, "_seconds", lambda model: next(seconds))
    return speed_up(sparse_model())


def test_who_asks_for_a_speed_prunes_to_a_speed(tmp_path):
    config = PruningConfig.from_dict({"speedup": 5})
    assert isinstance(config, SpeedConfig) and config.method == "speed"
    config.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == config
    with pytest.raises(UserError, match="shrink"):
        multitask_trainer(tmp_path, config)
    for wrong in ({}, {"speedup": 2, "latency_ms": 3}, {"speedup": 1}, {"speedup": 2, "runtime": "gpu"}):
        with pytest.raises(UserError):
            SpeedConfig(**wrong)
