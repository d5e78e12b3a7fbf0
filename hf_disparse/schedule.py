"""When to prune and how far: pure functions of the optimizer step. Layer 6."""

from hf_disparse.config import PruningConfig


def cubic_sparsity(step: int, start: int, end: int, final: float) -> float:
    """Sparsity at `step`: final * (1 - (1 - (step - start) / (end - start))^3), held outside [start, end].

    Fast at first, when most weights can go, and slow at the end. Source: Zhu and Gupta 2017 (arXiv 1710.01878), eq. 1
    with an initial sparsity of 0.
    """
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    return final * (1 - (1 - progress) ** 3)


def update_steps(config: PruningConfig) -> range:
    """The optimizer steps at which masks change; pruning happens before the step's first forward pass.

    One shot: `start_step` alone. Cubic: every `update_every` steps after `start_step`, counted back from `end_step`, so
    that the last update is at `end_step` exactly.
    """
    if config.sparsity == 0:
        return range(0)
    if config.schedule == "one_shot":
        return range(config.start_step, config.start_step + 1)
    first = config.start_step + ((config.end_step - config.start_step - 1) % config.update_every) + 1
    return range(first, config.end_step + 1, config.update_every)


def sparsity_at(config: PruningConfig, step: int) -> float | None:
    """The sparsity to prune to at optimizer step `step`, or None where nothing changes."""
    if step not in update_steps(config):
        return None
    if config.schedule == "one_shot":
        return config.sparsity
    return cubic_sparsity(step, config.start_step, config.end_step, config.sparsity)
