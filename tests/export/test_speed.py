"""The measured speed and memory of a model, dense and sped up. The times themselves are never asserted."""

import copy

import pytest
import torch

from hf_disparse import UserError, prunable_parameters
from hf_disparse.export import measurements, write_card
from hf_disparse.export.measurements import measure_speed
from hf_disparse.fast import speed_up as fast
from hf_disparse.report.sentences import speed_sentence
from hf_disparse.report.values import speed_cells, speed_rows
from tests.helpers.tiny import tiny_model


def sparse_model():
    """A tiny model with exactly a tenth of each prunable matrix."""
    model = tiny_model().eval()
    with torch.no_grad():
        for parameter in prunable_parameters(model).values():
            order = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(0))
            parameter.view(-1)[order[parameter.numel() // 10 :]] = 0
    return model


@pytest.fixture
def always_faster(monkeypatch):
    """Tiny models gain, however busy the machine is."""
    monkeypatch.setattr(fast, "_seconds", lambda model: [1.0])


def test_the_model_and_torch_are_left_as_they_were(always_faster):
    model, threads = sparse_model(), torch.get_num_threads()
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    model.train()
    torch.set_num_threads(2)
    try:
        speed = measure_speed(model, 16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert model.encoder.training and not fast.is_sped_up(model)
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (speed["tokens"], speed["threads"]) == (16, 1) and list(speed["milliseconds"]) == ["1", "32"]
    assert all(x > 0 for times in speed["milliseconds"].values() for x in (times["dense"], times["fast"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megabytes_are_those_of_the_encoder_by_an_independent_count(always_faster, dtype):
    model = sparse_model().to(dtype)
    speed = measure_speed(model, 16)
    matrices = prunable_parameters(model).values()
    parts = [*model.encoder.parameters(), *(b for b in model.encoder.buffers() if not b.dtype.is_floating_point)]
    dense = sum(4 * p.numel() if p.dtype.is_floating_point else p.nbytes for p in parts)
    assert speed["megabytes"]["dense"] == pytest.approx(dense / 1e6)
    others = dense - sum(4 * m.numel() for m in matrices)
    nonzeros = sum(int((m != 0).sum()) for m in matrices)
    assert others + 4 * nonzeros < 1e6 * speed["megabytes"]["fast"] < others + 0.75 * (dense - others)
    assert model.dtype == dtype


def test_texts_have_at_most_as_many_tokens_as_the_encoder_has_positions():
    assert measure_speed(tiny_model(), 1000)["tokens"] <= tiny_model().encoder.config.max_position_embeddings


def test_a_batch_that_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(measurements, "_TOO_LONG", 0)
    assert list(measure_speed(tiny_model(), 16)["milliseconds"]) == ["1"]


def test_without_a_compiler_the_dense_model_is_measured_and_the_card_says_why(monkeypatch, tmp_path):
    def missing():
        raise UserError("no C compiler was found; install gcc or clang")

    monkeypatch.setattr(fast, "library", missing)
    speed = measure_speed(sparse_model(), 16)
    assert speed["reason"] == "no C compiler was found; install gcc or clang"
    assert all(list(values) == ["dense"] for values in (*speed["milliseconds"].values(), speed["megabytes"]))
    sparse_model().save_pretrained(tmp_path)
    text = write_card(tmp_path).text
    assert "cannot be sped up: no C compiler was found" in text and "fast=True" not in text


def test_a_model_that_gains_nothing_says_so(monkeypatch):
    times = iter([[1.0], [2.0]])
    monkeypatch.setattr(fast, "_seconds", lambda model: next(times))
    assert measure_speed(sparse_model(), 16)["reason"] == "it would be 0.50 times as fast"


def test_ratios_are_formed_from_the_measured_values():
    times = {"1": {"dense": 12.0, "fast": 3.0}, "32": {"dense": 300.0, "fast": 40.0}}
    speed = {"tokens": 32, "threads": 1, "milliseconds": times, "megabytes": {"dense": 90.0, "fast": 60.0}}
    assert [gain for *_, gain in speed_rows(speed)] == [4.0, 7.5, 1.5]
    assert speed_cells(speed)[:2] == [
        ("milliseconds, 1 text", "12.0", "3.0", "4.0x"),
        ("milliseconds, 32 texts", "300.0", "40.0", "7.5x"),
    ]
    assert 'MultitaskPipeline.from_pretrained("me/small", fast=True)' in speed_sentence(speed, "me/small")
    dense = {"milliseconds": {"1": {"dense": 12.0}}, "megabytes": {"dense": 90.0}}
    assert speed_cells(dense) == [("milliseconds, 1 text", "12.0", "", ""), ("megabytes in memory", "90.0", "", "")]
