"""When to prune and how far: pure functions of the optimizer step."""

import math

from hf_disparse.config import PruningConfig


def cubic_sparsity(step: int, start: int, end: int, final: float) -> float:
    """Sparsity at `step`: final * (1 - (1 - (step - start) / (end - start))^3), constant outside [start, end].

    Fast at first, while many weights can go, and slow at the end. Source: Zhu and Gupta 2017 (arXiv 1710.01878), eq. 1
    with an initial sparsity of 0.
    """
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    return final * (1 - (1 - progress) ** 3)


def linear_sparsity(step: int, start: int, end: int, final: float) -> float:
    """Sparsity at `step`: final * (step - start) / (end - start), constant outside [start, end]."""
    return final * min(max((step - start) / (end - start), 0.0), 1.0)


def end_of(config: PruningConfig, max_steps: int | None = None) -> int:
    """The step of the last update: `end_step`, or if that is None the method's `end_share` of `max_steps`."""
    if config.end_step is not None or config.schedule == "one_shot":
        return config.start_step if config.schedule == "one_shot" else config.end_step
    return max(config.start_step + 1, int(config.end_share * max_steps))


def update_steps(config: PruningConfig, max_steps: int | None = None) -> range:
    """The optimizer steps at which masks change; pruning happens before the step's first forward pass.

    One shot: only `start_step`. Cubic: every `update_every` steps after `start_step`, counted back from the end, so that
    the last update falls exactly on the end. Constant: every `update_every` steps from `start_step` on. Linear: only the
    end, by which the target of soft gates has risen or a penalty has driven groups to zero.
    """
    start, end, every = config.start_step, end_of(config, max_steps), config.update_every
    if config.sparsity == 0:
        return range(0)
    if config.schedule == "cubic":
        return range(start + ((end - start - 1) % every) + 1, end + 1, every)
    if config.schedule == "linear":
        return range(end, end + 1)
    return range(start, end + 1, every)


def sparsity_at(config: PruningConfig, step: int, max_steps: int | None = None) -> float | None:
    """The sparsity to prune to at optimizer step `step`, or None if masks do not change at it."""
    if step not in update_steps(config, max_steps):
        return None
    if config.schedule == "cubic":
        return cubic_sparsity(step, config.start_step, end_of(config, max_steps), config.sparsity)
    return config.sparsity


def cosine_decay(step: int, start: int, end: int, first: float) -> float:
    """first / 2 * (1 + cos(pi (step - start) / (end - start))): `first` at the start, 0 from the end on.

    Source: the fraction of weights that RigL replaces, Evci et al. 2020 (arXiv 1911.11134), section 3.
    """
    progress = min(max((step - start) / max(1, end - start), 0.0), 1.0)
    return first / 2 * (1 + math.cos(math.pi * progress))
