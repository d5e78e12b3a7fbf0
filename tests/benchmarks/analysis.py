"""CPU time (of all threads) and memory that the measures of an analysis take on given scores.

    python tests/benchmarks/analysis.py                           # 8 tasks on 85M weights, 32 batches each; 2 minutes, 4 GiB
    python tests/benchmarks/analysis.py --tasks 4 --width 384     # smaller

Scores and what each batch adds to them are random numbers, made task by task; making them is not counted. Memory is the peak of
the process above its memory before the first task, as a multiple of one task's scores, and in GiB beyond two of them.
"""

import argparse
import resource
import time
from collections.abc import Iterator

import torch

from hf_disparse.analysis import Examination, Sampled, sketch
from hf_disparse.pruning.parts import Site
from hf_disparse.pruning.scores import snip

DRAWS, HEADS = 200, 12


def weights(layers: int, width: int) -> dict[str, torch.Tensor]:
    """The prunable weights of a BERT of this size."""
    shapes = dict.fromkeys(("query", "key", "value", "attention.output.dense"), (width, width))
    shapes |= {"intermediate.dense": (4 * width, width), "output.dense": (width, 4 * width)}
    return {f"layer.{i}.{name}.weight": torch.ones(shape) for i in range(layers) for name, shape in shapes.items()}


def sites(layers: int, width: int) -> dict[str, dict[str, Site]]:
    """Heads and neurons of a BERT of this size."""
    by_head, by_neuron = torch.arange(width) * HEADS // width, torch.arange(4 * width)
    heads, neurons = {}, {}
    for i in range(layers):
        members = {f"layer.{i}.{name}": (0, by_head) for name in ("query", "key", "value")}
        members[f"layer.{i}.attention.output.dense"] = (1, by_head)
        heads[f"layer.{i}.attention"] = Site(HEADS, members)
        members = {f"layer.{i}.intermediate.dense": (0, by_neuron), f"layer.{i}.output.dense": (1, by_neuron)}
        neurons[f"layer.{i}.intermediate"] = Site(4 * width, members)
    return {"head": heads, "neuron": neurons}


def made(own: dict[str, torch.Tensor], sample: dict[str, torch.Tensor], tasks: int, batches: int) -> Iterator[tuple]:
    """Yields (task, scores, what each of its batches adds on the sample)."""
    for task in range(tasks):
        generator = torch.Generator().manual_seed(task)
        scores = {name: torch.rand(w.shape, generator=generator) for name, w in own.items()}
        by_batch = {name: torch.rand(batches, len(where), generator=generator) for name, where in sample.items()}
        yield f"task{task}", scores, by_batch


def peak() -> int:
    """Peak memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    options = parser.parse_args()
    own = weights(options.layers, options.width)
    size = sum(weight.numel() for weight in own.values())
    before, seconds = peak(), {}

    def clock(what: str, start: float) -> None:
        seconds[what] = seconds.get(what, 0.0) + time.process_time() - start

    start = time.process_time()
    exam = Examination(own, "snip", 0.9, sites(options.layers, options.width))
    on_sample = {name: torch.ones(len(where)) for name, where in exam.sample.items()}
    clock("sample", start)
    for task, scores, by_batch in made(own, exam.sample, options.tasks, options.batches):
        start = time.process_time()
        gradient = sketch(scores)  # in place of the gradient, which has the same size
        clock("sketches", start)
        start = time.process_time()
        exam.see(task, scores, Sampled(by_batch, on_sample, snip), gradient)
        clock("masks, heads, neurons", start)
        del scores
    start = time.process_time()
    found = exam.measures(DRAWS)
    clock("measures and bootstrap", start)
    used = peak() - before
    print(
        f"{options.tasks} tasks, {size / 1e6:.0f}M weights, {len(found['agreement'])} rows, {torch.get_num_threads()} threads"
    )
    for what, spent in seconds.items():
        print(f"{what:<24} {spent:7.1f} s")
    total = sum(seconds.values())
    print(
        f"{'all':<24} {total:7.1f} s = {1e9 * total / size / options.tasks:.0f} ns a weight and task (60 s on 2 cores for 8 x 85M: 176)"
    )
    beyond = (used - 8 * size) / 2**30
    print(
        f"peak memory above the weights: {used / (4 * size):.1f} tasks' scores, {beyond:.2f} GiB beyond two of them (at most 2)"
    )


if __name__ == "__main__":
    main()
