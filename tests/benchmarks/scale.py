"""Cost of scoring and deciding on 1, 2 and 4 processes, beside the formulas of docs/scale.md.

    python tests/benchmarks/scale.py            # about 10 minutes on 2 cores
    python tests/benchmarks/scale.py [--processes 1,2,4] [--layers 6] [--width 384] [--tasks 3] [--batches 8] [--threads 1]

Prints a Markdown table. The parts (a pass, an all-reduce, one task's share of a decision) are measured separately, then the whole
update; times are medians of five. Traffic is counted on the loopback device and memory by Linux, so nothing else should run.
The processes share this machine's cores: give each as many threads as it would have alone.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import distributed
from transformers import BertConfig

from hf_disparse import MultitaskConfig, MultitaskModel, TaskConfig, decide, prunable_parameters, score
from hf_disparse.distributed.processes import mean_over_processes, processes

ROWS, TOKENS, TIMES = 16, 64, 5
HEADER = (
    "| processes | pass, s | all-reduce, s | decision, s a task | update, s (formula) | update, s | traffic, MB (formula) | "
    "traffic, MB | scoring, MB (formula) | scoring, MB | deciding, MB (formula) | deciding, MB |"
)


def model_of(layers: int, width: int, tasks: int) -> MultitaskModel:
    torch.manual_seed(0)
    encoder = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32, intermediate_size=4 * width
    )
    heads = [TaskConfig(name=f"task{i}", columns="text", labels=["no", "yes"]) for i in range(tasks)]
    return MultitaskModel(MultitaskConfig(encoder_config=encoder, tasks=heads))


def batches_of(task: str, count: int) -> list[dict]:
    rank = distributed.get_rank() if processes() > 1 else 0
    generator = torch.Generator().manual_seed(rank)
    ids = [torch.randint(5, 30_000, (ROWS, TOKENS), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": i[:, 0] % 2, "task": task} for i in ids]


def seconds(function: Callable[[], object]) -> float:
    """The median of five runs, which all processes start together."""
    taken = []
    for _ in range(TIMES):
        if processes() > 1:
            distributed.barrier()
        begin = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begin)
    return median(taken)


def peak(function: Callable[[], object]) -> int:
    """By how many bytes the process grows at most while `function` runs."""
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory, whose reuse would not be counted
    Path("/proc/self/clear_refs").write_text("5")  # forgets the earlier peak
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return 1024 * int(line.split()[1])


def activations(model: MultitaskModel, batch: dict) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


def loopback() -> int:
    """Bytes sent over the loopback device so far."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def measure(layers: int, width: int, tasks: int, batches: int) -> dict[str, float]:
    """One row of the table, as measured by this process."""
    model = model_of(layers, width, tasks)
    parameters, several = prunable_parameters(model), processes() > 1
    size = sum(p.numel() for p in parameters.values())
    loaders = {f"task{i}": batches_of(f"task{i}", batches) for i in range(tasks)}
    first = {"task0": loaders["task0"]}
    options = {"parameters": parameters, "average": mean_over_processes if several else None}

    def stream(of: dict):
        return score(model, of, "disparse", **options)

    one = {"task0": loaders["task0"][:1]}
    alone = seconds(lambda: list(score(model, one, "disparse", parameters=parameters)))
    gradients = [torch.randn_like(p) for p in parameters.values()]
    reduce = seconds(lambda: mean_over_processes(gradients)) if several else 0.0
    before = loopback()
    mean_over_processes(gradients)
    if several:
        distributed.barrier()
    traffic = loopback() - before
    known = dict(stream(first))
    deciding = seconds(lambda: decide(known, 0.9))
    memory = {"scoring": peak(lambda: list(stream(first))), "deciding": peak(lambda: decide(known, 0.9))}
    update = seconds(lambda: decide(stream(loaders), 0.9))
    formula = 2 * (processes() - 1) * 4 * size  # of all processes together
    return {
        "pass": alone,
        "reduce": reduce,
        "deciding": deciding,
        "formula": tasks * (batches * (alone + reduce) + deciding),
        "update": update,
        "traffic_formula": formula / 1e6,
        "traffic": traffic / 1e6 if several else 0.0,
        "scoring_formula": ((12 if several else 8) * size + activations(model.eval(), one["task0"][0])) / 1e6,
        "scoring_memory": memory["scoring"] / 1e6,
        "deciding_formula": 36 * size / 1e6,
        "deciding_memory": memory["deciding"] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4")
    for name, default in (("layers", 6), ("width", 384), ("tasks", 3), ("batches", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
        row = measure(given.layers, given.width, given.tasks, given.batches)
        if distributed.get_rank() == 0:
            print(json.dumps(row))
        distributed.destroy_process_group()
        return
    parameters = prunable_parameters(model_of(given.layers, given.width, given.tasks))
    print(
        f"{sum(p.numel() for p in parameters.values()):,} prunable weights, {given.tasks} tasks, {given.batches} batches\n"
    )
    print(HEADER + "\n|" + " ---: |" * HEADER.count(" |"))
    for count in given.processes.split(","):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
        done = subprocess.run([*command, *sys.argv], env=environment, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"| {count} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
