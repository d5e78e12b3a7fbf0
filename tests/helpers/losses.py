"""Losses, worked out number by number in double precision, and inputs for them."""

import math

import numpy as np
import torch
from scipy.special import expit, rel_entr, softmax

CLASSES, LABELS = "single_label_classification", "multi_label_classification"

REAL, TOKENS = "regression", "token_classification"

SHAPES = {CLASSES: (3, 4), LABELS: (3, 4), REAL: (3, 1), TOKENS: (3, 6, 4)}

MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_labels(problem: str) -> torch.Tensor:
    if problem in (LABELS, REAL):
        return torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])[:, : 4 if problem == LABELS else 1]
    labels = torch.randint(4, SHAPES[problem][:-1], generator=generator(2))
    return labels.masked_fill(torch.arange(6) % 2 == 0, -100) if problem == TOKENS else labels


def by_hand(student, teacher, problem: str, t: float) -> float:
    """The distillation loss, number by number or example by example, in double precision."""
    student, teacher = (np.asarray(x.detach().float(), dtype=float) for x in (student, teacher))
    if problem == REAL:
        return float(np.mean([(s - v) ** 2 for s, v in zip(student.flat, teacher.flat, strict=True)]))
    if problem == LABELS:
        pairs = [(expit(v / t), expit(s / t)) for s, v in zip(student.flat, teacher.flat, strict=True)]
        return t * t * float(np.mean([-p * math.log(q) - (1 - p) * math.log(1 - q) for p, q in pairs]))
    kept = [i for i in np.ndindex(student.shape[:-1]) if some_labels(problem)[i] != -100]
    return t * t * float(np.mean([rel_entr(softmax(teacher[i] / t), softmax(student[i] / t)).sum() for i in kept]))


def hidden_by_hand(hidden, teacher) -> float:
    at, layers = [i for i in np.ndindex(*MASK.shape) if MASK[i]], zip(hidden, teacher, strict=True)
    return float(np.mean([(h[i] - t[i]).detach().square().mean() for h, t in layers for i in at]))


def project(gradients: np.ndarray, seed: int) -> np.ndarray:
    """PCGrad as Yu et al. write it, algorithm 1: (tasks, width) -> (width,)."""
    random, out = generator(seed), gradients.astype(float).copy()
    for i in range(len(gradients)):
        for j in torch.randperm(len(gradients), generator=random).tolist():
            if j != i and (inner := out[i] @ gradients[j]) < 0:
                out[i] = out[i] - inner / (gradients[j] @ gradients[j]) * gradients[j]
    return out.sum(0)


def vector(parameters) -> np.ndarray:
    """Their gradients end to end, zeros where there is none."""
    return np.concatenate([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters])
