"""How the benchmarks in this folder measure time: as ratios of blocks that run in turn."""

import statistics
import time
from collections.abc import Callable

import torch


def timed(block: Callable[[], object]) -> Callable[[], list[float]]:
    """Returns a function that runs the block and returns [its seconds]."""

    def run() -> list[float]:
        start = time.perf_counter()
        block()
        return [time.perf_counter() - start]

    return run


def inference(block: Callable[[], object]) -> Callable[[], list[float]]:
    """As `timed`, without gradients; runs the block once to warm up."""

    def run() -> object:
        with torch.inference_mode():
            return block()

    run()
    return timed(run)


def side_by_side(blocks: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, float]:
    """Each block's time relative to the first block's: the median over rounds of the ratio of the medians in a round.

    The blocks take turns, also at going first, so that a noisy minute or a warm cache favours none of them.
    """
    names = list(blocks)
    ratios = {name: [] for name in names}
    for turn in range(rounds):
        times = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name] = statistics.median(blocks[name]())
        for name in names:
            ratios[name].append(times[name] / times[names[0]])
    return {name: statistics.median(values) for name, values in ratios.items()}
