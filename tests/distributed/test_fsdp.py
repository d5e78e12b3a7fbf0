"""FSDP2 in real processes: weights, scores and masks in parts, decisions of one process, checkpoints for any number of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hf_disparse import MovementConfig, PruningConfig, UserError, load_masks
from hf_disparse.distributed.fsdp import gather, is_sharded, local, place
from hf_disparse.trainer.arguments import check_fsdp
from hf_disparse.trainer.checkpoints import SEAL_NAME, last_whole_checkpoint, torn
from tests.helpers.ddp_worker import trained, trainer_of
from tests.helpers.fsdp_worker import CONFIGS, ROUND, main
from tests.helpers.processes import in_processes
from tests.helpers.resuming import slow
from tests.helpers.training import assert_same, multitask_trainer

RESUMED = ["saliency", "sharded"]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The folder of two processes whose runs are resumed, and name -> what each was left with."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run(folder, 2, RESUMED)


def run(folder, count: int, jobs: list[str]) -> dict[str, list[dict]]:
    assert in_processes(count, main, folder, jobs) == [([], 0)] * count
    names = [job.partition("@")[0] for job in jobs]
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(count)] for name in names
    }


def assert_as_one(several: list[dict], one: dict) -> None:
    """The processes have parts of one model, whose masks are those of one process but for 0.1 % of the weights."""
    for theirs in several:
        assert 0 < theirs["mine"] < theirs["all"] and 0 < theirs["masks_mine"] < theirs["counted"][1]
        assert theirs["alive"] == 0 and len(theirs["masks"]) > 0
        assert theirs["counted"] == several[0]["counted"] and theirs["report"] == several[0]["report"]
        assert_same(theirs["weights"], several[0]["weights"])
        assert_same(theirs["masks"][-1], several[0]["masks"][-1])
    assert sum(theirs["mine"] for theirs in several) == several[0]["all"]
    for now, then in zip(several[0]["masks"], one["masks"][-len(several[0]["masks"]) :], strict=True):
        size = sum(mask.numel() for mask in then.values())
        assert sum(int(mask.sum()) for mask in now.values()) == sum(int(mask.sum()) for mask in then.values())
        assert sum(int((mask != then[n]).sum()) for n, mask in now.items()) <= size / 1000
    last = several[0]["masks"][-1]
    pruned = sum(int((~mask).sum()) for mask in last.values())
    assert several[0]["counted"] == (pruned, sum(mask.numel() for mask in last.values()))
    assert several[0]["report"]["prunable"] == pruned / several[0]["counted"][1]
    for n, weight in one["weights"].items():
        torch.testing.assert_close(several[0]["weights"][n], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["saliency", *slow(*(name for name in CONFIGS if name != "saliency"))])
def test_two_processes_with_parts_prune_as_one_with_the_whole(tmp_path, name):
    several, one = run(tmp_path, 2, [name])[name], trained(tmp_path / "one", CONFIGS[name], **ROUND)
    assert_as_one(several, one)
    assert [theirs["passes"] for theirs in several] == [one["passes"]] * 2


@pytest.mark.slow
def test_whole_and_sharded_checkpoints_are_found_and_a_torn_one_is_not(of_two, tmp_path):
    folder, several = of_two
    for name in RESUMED:
        assert last_whole_checkpoint(folder / name).endswith("checkpoint-10")
        masks = load_masks(folder / name / "checkpoint-10" / "pruning_masks.safetensors")
        assert_same(dict(sorted(masks.items())), dict(sorted(several[name][0]["masks"][-1].items())))
    for name, part in (("sharded", "optimizer_0/.metadata"), ("saliency", "optimizer.bin")):
        last = Path(shutil.copytree(folder / name / "checkpoint-10", tmp_path / name / "checkpoint-10"))
        for file in (SEAL_NAME, part):  # a file that is gone, and before that as another Trainer leaves it
            assert torn(last) is None
            (last / file).unlink()
        assert torn(last)
        shutil.copy(folder / name / "checkpoint-10" / SEAL_NAME, last)
        assert part in torn(last)


@pytest.mark.slow
def test_the_main_process_has_for_the_log_how_much_the_tasks_agree(of_two, tmp_path):
    """Of weights in parts the masks tell which are zero."""
    trainer = trainer_of(tmp_path, CONFIGS["saliency"], **ROUND)
    trainer.train()
    kept = json.loads((of_two[0] / "saliency" / "checkpoint-10" / "disparse_state.json").read_text())
    assert "agreement" in trainer.pruner.measures
    assert kept["measures"] == pytest.approx(trainer.pruner.measures, abs=0.02)


@pytest.mark.slow
def test_four_processes_go_on_where_two_were_and_prune_as_one(of_two, tmp_path_factory, tmp_path):
    four = tmp_path_factory.mktemp("four")
    several = run(four, 4, ["random", *(f"{name}@{of_two[0]}" for name in RESUMED)])
    for name, theirs in several.items():
        assert_as_one(theirs, trained(tmp_path / name, CONFIGS[name], **ROUND))
    assert all(len(several[name][0]["tasks"]) == 6 for name in RESUMED)  # steps 5 to 10


def test_a_whole_tensor_is_its_own_part_and_a_mask_goes_to_its_weight():
    weight = torch.rand(3, 4)
    assert local(weight) is weight and not is_sharded({"w": weight})
    assert torch.equal(place(weight > 0.5, weight), weight > 0.5)
    assert torch.equal(gather({"w": weight})["w"], weight)


def test_what_fsdp_cannot_do_is_refused(tmp_path, monkeypatch):
    trainer = multitask_trainer(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fsdp: needs GPUs, because Accelerate ignores it on CPUs"):
        check_fsdp(trainer)
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin = type("Plugin", (), {"fsdp_version": 2})()
    for config, words in (
        (MovementConfig(sparsity=0.5, end_step=4), "pruning.method: expected saliency with FSDP"),
        (PruningConfig(sparsity=0.5, max_drop=1.0), "pruning.max_drop: not supported with FSDP"),
        (PruningConfig(sparsity=0.5, max_drop=0), "pruning.max_drop: not supported with FSDP"),
        (PruningConfig(sparsity=0.5, reconstruct=True), "pruning.reconstruct: not supported with FSDP"),
        (PruningConfig(sparsity=0.5, reinitialise=True), "pruning.reinitialise: not supported with FSDP"),
        (PruningConfig(sparsity=0.5, granularity="layer"), "pruning.granularity: expected weights, patterns, heads"),
        (
            PruningConfig(sparsity=0.5, granularity="head", criterion="taylor"),
            "pruning.criterion: expected one of weights",
        ),
    ):
        trainer.pruning_config = config
        with pytest.raises(UserError, match=words.replace(".", r"\.")):
            check_fsdp(trainer)
    trainer.accelerator.state.fsdp_plugin.fsdp_version = 1
    with pytest.raises(UserError, match="fsdp: expected version 2, got 1"):
        check_fsdp(trainer)
