"""Several real processes decide what one process decides on the same examples."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_disparse.distributed.processes import (
    differing_ranks,
    fingerprint,
    is_main,
    mean_over_processes,
    on_main,
    processes,
    require_same,
)
from hf_disparse.pruning import scores
from tests.helpers.ddp_worker import METHODS, ODD, VARIANTS, evaluated, main, trained, trainer_of
from tests.helpers.processes import in_processes
from tests.helpers.resuming import slow
from tests.helpers.tiny import tiny_model
from tests.helpers.training import assert_same


def run(folder, count: int, *names: str) -> dict[str, list]:
    """name -> what each process was left with."""
    assert in_processes(count, main, folder, names) == [([], 0)] * count
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(count)] for name in names
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict]:
    """What each of two processes evaluated."""
    return run(tmp_path_factory.mktemp("two"), 2, "evaluated")["evaluated"]


def assert_as_one(several: list[dict], folder, name: str, tolerance: float) -> None:
    """All processes have the same bits; the masks of one process differ in at most 0.1 % of the weights, in no count."""
    folder = folder / "one"
    one = trained(folder, METHODS.get(name, METHODS["saliency"]), **VARIANTS.get(name, {}))
    for theirs in several:
        assert theirs["tasks"] == one["tasks"] and len(set(one["tasks"])) > 1
        assert theirs["passes"] == one["passes"] and theirs["alive"] == 0
        assert len(theirs["masks"]) == len(one["masks"]) > 0
        for now, then in zip(theirs["masks"], one["masks"], strict=True):
            size = sum(mask.numel() for mask in then.values())
            assert sum(int(mask.sum()) for mask in now.values()) == sum(int(mask.sum()) for mask in then.values())
            assert sum(int((mask != then[n]).sum()) for n, mask in now.items()) <= size / 1000
        assert_same(theirs["weights"], several[0]["weights"])
    for n, weight in one["weights"].items():
        torch.testing.assert_close(several[0]["weights"][n], weight, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["saliency", *slow(*(name for name in METHODS if name != "saliency"))])
def test_two_processes_prune_as_one_does_on_the_same_examples(tmp_path, name):
    assert_as_one(run(tmp_path, 2, name)[name], tmp_path, name, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "compiled"])
def test_masks_hold_exactly_and_alike_in_two_processes_with(tmp_path, name):
    assert_as_one(run(tmp_path, 2, name)[name], tmp_path, name, 1e-3 if name == "bf16" else 1e-5)


@pytest.mark.slow
def test_masks_hold_in_compiled_models_and_in_four_processes(tmp_path):
    for count, names in ((2, ["compiled"]), (4, ["saliency", "movement", "platon", "l0"])):
        several = run(tmp_path, count, *names)
        for name in names:
            assert_as_one(several[name], tmp_path / name, name, 1e-5)


def test_metrics_and_losses_are_those_of_one_process_where_no_batch_is_full(of_two, tmp_path):
    one = evaluated(tmp_path)
    for theirs in of_two:
        assert theirs["counts"] == ODD
        assert set(theirs["metrics"]) == set(one["metrics"])
        for key, value in one["metrics"].items():
            if "time" not in key:
                assert theirs["metrics"][key] == pytest.approx(value, abs=1e-6), key


def test_the_loss_of_an_evaluation_is_the_mean_over_its_examples(of_two, tmp_path):
    trainer = trainer_of(tmp_path)
    output = trainer.predict({"two": trainer.eval_dataset["two"]})
    mean = cross_entropy(torch.tensor(output.predictions), torch.tensor(output.label_ids)).item()
    assert of_two[1]["metrics"]["eval_two_loss"] == pytest.approx(mean, abs=1e-6)


def test_masks_that_differ_are_refused_on_all_processes_with_the_rank(tmp_path):
    for said in run(tmp_path, 2, "disturbed")["disturbed"]:
        assert "expected the same masks on all 2 processes at step 5, but rank 1 decided otherwise than rank 0" in said


def test_other_rows_on_a_process_are_refused_with_its_rank(tmp_path):
    for said in run(tmp_path, 2, "other_data")["other_data"]:
        assert "expected the same rows on all processes" in said and "rank 1 has other tasks or numbers" in said


def test_a_fingerprint_knows_every_bit_name_and_shape_and_no_order():
    masks = {"a": torch.rand(5, 7) > 0.5, "b": torch.ones(3, dtype=torch.bool)}
    known = fingerprint(masks)
    assert known == fingerprint(dict(reversed(masks.items())))
    others = [{**masks, "a": masks["a"].view(7, 5)}, {"a": masks["a"], "c": masks["b"]}]
    for i in range(35):
        flipped = masks["a"].clone()
        flipped.view(-1)[i] ^= True
        others.append({**masks, "a": flipped})
    assert len({known, *map(fingerprint, others)}) == 1 + len(others)


def test_one_process_is_alone():
    tensor = torch.tensor([1.0, 2.0])
    assert processes() == 1 and is_main() and differing_ranks(b"") == [] and on_main(lambda x: x + 1)(6) == 7
    assert mean_over_processes([tensor])[0] is tensor and tensor.tolist() == [1, 2]
    require_same({"w": torch.ones(2, dtype=torch.bool)}, 3)


def test_gradients_are_averaged_before_they_are_scored_and_a_loss_with_them():
    """The other process is played by its gradients: |mean of both| summed over batches, not the mean of |both|."""
    model, parts = tiny_model(), []

    def halves(tensors):
        parts.append([tensor.clone() for tensor in tensors])
        for tensor in tensors:
            tensor.mul_(-0.5)  # as if the other had -2 times ours
        return tensors

    weight = {"w": model.encoder.encoder.layer[0].output.dense.weight}
    batches = [
        {"input_ids": torch.tensor([[2, i, i + 1, 3]]), "labels": torch.tensor([i % 2]), "task": "two"}
        for i in (5, 8, 12)
    ]
    ((_, got),) = scores.score(model, {"two": batches}, "snip", parameters=weight, average=halves)
    mean = sum((-0.5 * gradient).abs() for _, gradient in parts)
    torch.testing.assert_close(got["w"], weight["w"].detach().abs() * mean)
    assert len(parts) == 3 and all(math.isfinite(loss) for loss, _ in parts)

    def spoiled(tensors):
        tensors[0].fill_(math.nan)  # the loss of the other process
        return tensors

    with pytest.raises(ValueError, match="expected a finite loss while scoring"):
        list(scores.score(model, {"two": batches}, "snip", parameters=weight, average=spoiled))
