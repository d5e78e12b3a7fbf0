"""A guarded config, and how many weights a guard left zero."""

from hf_disparse import PruningConfig, prunable_parameters

FIELDS = dict(sparsity=0.8, schedule="cubic", start_step=2, end_step=16, update_every=4, score_batches=2)
GUARDED = PruningConfig(**FIELDS, max_drop=5.0)


def zeros(model) -> tuple[int, int]:
    parameters = prunable_parameters(model).values()
    return sum(int((p == 0).sum()) for p in parameters), sum(p.numel() for p in parameters)
