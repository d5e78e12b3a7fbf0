"""Real processes for milliseconds: forked from a server that has imported everything and done nothing else.

Each function here runs in such a process and talks through a connection: `report.send(...)`.
"""

import ctypes
import gc
import io
import multiprocessing
import os
import resource
import socket
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from huggingface_hub import constants
from transformers import TrainerCallback

from hf_disparse import DisparseTrainer, PruningConfig, UserError, last_whole_checkpoint
from hf_disparse.cli import main as cli
from hf_disparse.export import packed
from hf_disparse.trainer import trainer
from hf_disparse.trainer.checkpoints import seal
from tests.helpers.commands import hf_disparse
from tests.helpers.resuming import CUBIC, STEPS
from tests.helpers.tiny import three_datasets, tiny_model, tiny_tokenizer
from tests.helpers.training import arguments, multitask_trainer

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.helpers.processes"])


@contextmanager
def child(function, *arguments_):
    """Yields (process, connection); the process is gone afterwards."""
    mine, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_run, args=(function, theirs, *arguments_))
    process.start()
    theirs.close()
    try:
        yield process, mine
    finally:
        process.kill()
        process.join()
        mine.close()


def messages(connection):
    """What a child reports until it ends."""
    try:
        while connection.poll(300):
            yield connection.recv()
    except (EOFError, ConnectionResetError):
        pass


def in_processes(count: int, function, *arguments_) -> list[tuple[list, int]]:
    """What each of `count` processes reports, and its exit status; torch.distributed joins them, and no launcher ends them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        started = [
            stack.enter_context(child(_as_rank, rank, count, port, function, *arguments_)) for rank in range(count)
        ]
        reports = [list(messages(connection)) for _, connection in started]
        for process, _ in started:
            process.join(60)
        return [(said, process.exitcode) for said, (process, _) in zip(reports, started, strict=True)]


def _as_rank(report, rank: int, count: int, port: int, function, *arguments_) -> None:
    values = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in values.items()})
    function(report, *arguments_)


def _run(function, report, *arguments_) -> None:
    torch.set_num_threads(1)
    try:
        function(report, *arguments_)
    except UserError as error:
        report.send(("refused", str(error)))


class Telling(DisparseTrainer):
    """Reports where it is, and takes its time there."""

    report, pause = None, 0.0

    def _slowly(self, part, *arguments_):
        time.sleep(self.pause)
        part(*arguments_)
        time.sleep(self.pause)

    def _save_checkpoint(self, model, trial):
        self.report.send("checkpoint")
        super()._save_checkpoint(model, trial)
        self.report.send("training")

    def _save(self, output_dir=None, state_dict=None):
        self._slowly(super()._save, output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir):
        self._slowly(super()._save_optimizer_and_scheduler, output_dir)

    def _save_rng_state(self, output_dir):
        self._slowly(super()._save_rng_state, output_dir)


def train_telling(report, folder: str, address: str, pause: float) -> None:
    """Trains what is left of a run that pushes every checkpoint; reports "checkpoint", "pruning", "push" and "training"."""
    constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = address, True
    hub = dict(
        push_to_hub=True, hub_model_id="me/run", hub_token="good", hub_strategy="checkpoint", hub_always_push=True
    )
    telling = Telling(
        tiny_model(),
        arguments(folder, **STEPS, **hub, save_total_limit=2),
        pruning_config=CUBIC,
        train_dataset=three_datasets(),
        processing_class=tiny_tokenizer(),
    )
    telling.report, telling.pause, prune = report, pause, telling.pruner.prune

    def prune_telling(*arguments_):
        report.send("pruning")
        telling._slowly(prune, *arguments_)
        report.send("training")

    telling.pruner.prune = prune_telling
    report.send("training")
    telling.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    report.send("push")
    telling.push_to_hub()
    torch.save([telling.model.state_dict(), telling.pruner.masks], Path(folder, "part.pt"))
    Path(folder, "part.pt").rename(Path(folder, "end.pt"))
    report.send("end")


class At(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def train_where_files_may_not_grow(report, folder: str, size: int) -> None:
    """From step 4 on no file may be larger than `size`: to the kernel's mind the disk is full then."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = At(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, most)))
    multitask_trainer(folder, CUBIC, callbacks=[full], **STEPS).train()


def train_where_the_folder_becomes_read_only(report, folder: str) -> None:
    """From step 4 on; the superuser gives up the right to write everywhere."""

    def lock() -> None:
        os.chmod(folder, 0o500)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(header, sets) == 0
        sets[0] &= ~0b10  # effective: CAP_DAC_OVERRIDE
        assert libc.capset(header, sets) == 0

    multitask_trainer(folder, CUBIC, callbacks=[At(4, lock)], **STEPS).train()


def train_as_rank(report, folder: str, deaths: dict[int, int]) -> None:
    """Trains what is left of a run; `deaths` has the ranks that are killed, and at which step."""
    rank = int(os.environ["RANK"])
    callbacks = [At(deaths[rank], lambda: os.kill(os.getpid(), 9))] if rank in deaths else []
    mine = multitask_trainer(folder, CUBIC, callbacks=callbacks, **STEPS)
    assert mine.args.world_size > 1
    mine.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    tensors = (mine.model.state_dict(), mine.pruner.masks)
    report.send(("end", *({name: tensor.numpy() for name, tensor in each.items()} for each in tensors)))


def run_commands(report, commands: list[list[str]]) -> None:
    """Commands of `hf-disparse`, one after the other; reports what they answer."""
    with patch.object(cli, "_leave", lambda: None), patch.object(cli, "_GRACE", 0.0):
        report.send([hf_disparse(*words) for words in commands])


def push_command(report, folder: str, address: str) -> None:
    """`hf-disparse push`."""
    constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = address, True
    report.send(hf_disparse("push", folder, "me/sparse", "--token", "good"))


def export_command(report, folder: str, target: str) -> None:
    """`hf-disparse export`, which reports once its folder is half written and then sleeps."""

    def wait(*_):
        report.send("writing")
        time.sleep(300)

    packed.copy_companions = wait
    sys.argv = ["hf-disparse", "export", folder, "--output_dir", target]
    cli.main()


def train_command(report, recipe: str) -> None:
    """`hf-disparse train`, which reports once its first checkpoint is written and then sleeps."""

    def wait(checkpoint):
        seal(checkpoint)
        report.send("sealed")
        if checkpoint.name == "checkpoint-4":
            time.sleep(300)

    trainer.seal = wait
    sys.stderr = io.StringIO()
    sys.argv = ["hf-disparse", "train", recipe]
    try:
        cli.main()
    finally:
        report.send(sys.stderr.getvalue())


def train_long(report, folder: str) -> None:
    """2,000 steps, an update at every tenth, a checkpoint at every hundredth; reports at every 400th what is held."""

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 400 == 0:
                gc.collect()
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                report.send(
                    {
                        "step": state.global_step,
                        "memory": pages * resource.getpagesize(),
                        "files": len(os.listdir("/proc/self/fd")),
                        "threads": len(os.listdir("/proc/self/task")),
                        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
                    }
                )

    config = PruningConfig(sparsity=0.9, schedule="cubic", end_step=1990, update_every=10, score_batches=1)
    changes = dict(max_steps=2000, save_strategy="steps", save_steps=100, save_total_limit=2, learning_rate=1e-3)
    long, updates = multitask_trainer(folder, config, callbacks=[Watch()], **changes), 0
    prune = long.pruner.prune

    def counting(*arguments_):
        nonlocal updates
        updates += 1
        prune(*arguments_)

    long.pruner.prune = counting
    long.train()
    report.send((long.state.global_step, updates))
