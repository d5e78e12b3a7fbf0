"""What tests/distributed/test_fsdp.py has every process do: FSDP2 through the Trainer, on CPUs.

Accelerate shards on GPUs only, so the processes are made to look like such; the weights are sharded, gathered and reduced by gloo.
"""

from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from hf_disparse import PruningConfig
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.sparsity import sparsity_report
from hf_disparse.pruning.masks import count_pruned
from tests.helpers.ddp_worker import CUBIC, METHODS, Log, trainer_of

CONFIGS = {
    "saliency": METHODS["saliency"],
    "fisher quorum": METHODS["fisher quorum"],
    "joint heads": METHODS["joint heads"],
    "pattern": PruningConfig(sparsity=0.5, granularity="2:4", score_batches=2),
    "sharded": METHODS["saliency"],
    "random": PruningConfig(sparsity=0.8, criterion="random", **CUBIC),
}
# Every head has had a batch by step 3: FSDP's checkpoints are not read where AdamW has no state of a weight yet.
ROUND = {"task_sampling": "round_robin"}
_init = PartialState.__init__


def like_gpus(self, *args, **kwargs) -> None:
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def fsdp_trainer(folder: Path, name: str, pruning=None, **changes):
    kind = "SHARDED_STATE_DICT" if name == "sharded" else "FULL_STATE_DICT"
    fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": kind}
    values = dict(fsdp=True, fsdp_config=fsdp, save_strategy="steps", save_steps=4, **ROUND)
    return trainer_of(folder, pruning or CONFIGS[name], **values | changes)


def trained(folder: Path, name: str, checkpoint: Path | None = None) -> dict:
    """What a training leaves, whole, and what of it this process had."""
    trainer = fsdp_trainer(folder, name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    log = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Log))
    model, masks = trainer.model, trainer.pruner.masks
    parameters = dict(model.named_parameters())
    return {
        "alive": log.alive,
        "masks": log.masks,
        "tasks": log.tasks,
        "passes": trainer.backward_passes,
        "weights": {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()},
        "mine": sum(p.to_local().numel() for p in parameters.values()),
        "all": sum(p.numel() for p in parameters.values()),
        "masks_mine": sum(mask.to_local().numel() for mask in masks.values()),
        "counted": count_pruned(masks),
        "report": sparsity_report(model, model.encoder, prunable_parameters(model)),
    }


def main(report, folder: Path, jobs: list[str]) -> None:
    """A job is a name to train by, NAME@FOLDER to go on from step 4 of FOLDER."""
    PartialState.__init__ = like_gpus
    PartialState(cpu=True)  # begins torch.distributed, by which the batches are made
    for job in jobs:
        name, _, start = job.partition("@")
        result = trained(folder / name, name, Path(start, name, "checkpoint-4") if start else None)
        torch.save(result, folder / f"{name}-{torch.distributed.get_rank()}.pt")
