"""Analyses and comparisons with known answers, for any number of tasks and layers, and the inputs to make such."""

import itertools
import random

import numpy as np
import torch

from hf_disparse.analysis.names import layer_and_kind

KINDS = ["query", "key", "value", "output", "up", "down"]


def stage(name: str, tasks: list[str], layers: int, draw: random.Random) -> dict:
    """One stage: agreement falls in the middle layer and with the distance of the tasks in a pair, and so do cosines."""
    count, rows, keepers, parts = len(tasks), [], [], []
    groups = [*itertools.combinations(range(count), 2)]
    groups += [tuple(range(count))] if count > 2 else []
    for layer in range(layers):
        high = layer < layers // 2
        for kind, group in itertools.product([*KINDS, "all"], groups):
            value = (0.75 if high else 0.15) - 0.05 * (group[1] - group[0]) / count + 0.02 * draw.random()
            row = {"layer": layer, "kind": kind, "tasks": [tasks[i] for i in group], "iou": 0.3 + 0.7 * value}
            rows.append(row | {"chance": 0.3, "beyond_chance": value, "low": value - 0.04, "high": value + 0.05})
        for kind in [*KINDS, "all"]:
            weights = [draw.random() + 0.2 for _ in range(count + 1)]
            keepers.append({"layer": layer, "kind": kind, "kept_by": [w / sum(weights) for w in weights]})
        kept = [[task for task in tasks if draw.random() < (0.8 if high else 0.4)] for _ in range(4)]
        for granularity, number in (("head", 4), ("neuron", 32)):
            by = [0] * (count + 1)
            for i in range(number):
                by[len(kept[i % 4])] += 1
            mine = {task: sum(task in k for k in kept) * number // 4 for task in tasks}
            part = {"layer": layer, "granularity": granularity, "count": number, "kept_by_task": mine, "kept_by": by}
            parts.append(part | ({"heads": kept} if granularity == "head" else {}))
    cosine = [[1.0 if i == j else 0.3 - 0.2 * abs(i - j) for j in range(count)] for i in range(count)]
    shared = [[1.0 if i == j else 0.8 - 0.6 * abs(i - j) / count for j in range(count)] for i in range(count)]
    found = count > 1
    return {
        "name": name,
        "agreement": rows,
        "watershed": {
            "layer": layers // 2 if found else None,
            "low": layers // 2 - 1 if found else None,
            "high": layers // 2 if found else None,
            "share": 0.97 if found else 0.0,
        },
        "affinity": {"importance": shared, "gradient_cosine": cosine},
        "keepers": keepers,
        "parts": parts,
    }


def curve(tasks: list[str]) -> dict:
    """A cost curve that is flat up to 75 % and then falls, more for later tasks; recovered points lose a third."""
    points = []
    for recovered, sparsity in itertools.product((False, True), (0.0, 0.5, 0.8, 0.9, 0.95)):
        lost = max(0.0, sparsity - 0.75) * 100 * (0.33 if recovered else 1.0)
        metrics = {task: 90.0 - i - lost * (1 + i / len(tasks)) for i, task in enumerate(tasks)}
        average = sum(metrics.values()) / len(metrics)
        points.append({"sparsity": sparsity, "recovered": recovered, "metrics": metrics, "average": average})
    knee = {task: 0.8 for task in tasks} | {"average": 0.8}
    within = {"points": 2.0, "sparsity": 0.8}
    return {"denominator": "prunable weights", "points": points, "knee": knee, "within": within}


def footprint(layers: int) -> list[dict]:
    """A footprint of embeddings and layers, of which later ones keep more non-zeros."""
    rows = [("embeddings", 30_000_000, 30_000_000, 0)]
    rows += [(f"layer {i}", 7_000_000, 1_500_000 + 100_000 * i, 7_000_000) for i in range(layers)]
    return [
        {
            "module": name,
            "parameters": size,
            "nonzeros": left,
            "bytes_dense": 4 * size,
            "bytes_packed": 4 * left + size // 8,
            "multiplications": work,
            "multiplications_left": left if work else 0,
        }
        for name, size, left, work in rows
    ]


def analysis(tasks: list[str], layers: int = 6, stages: tuple = ("before training", "dense", "sparse")) -> dict:
    """As `analysis.json`."""
    draw = random.Random(0)
    return {
        "version": 1,
        "model": "runs/quickstart",
        "tasks": tasks,
        "criterion": "disparse",
        "sparsity": 0.8,
        "score_batches": 16,
        "seed": 0,
        "stages": [stage(name, tasks, layers, draw) for name in stages],
        "curve": curve(tasks),
        "footprint": footprint(layers),
    }


def comparison(methods: list[str], sparsities=(0.5, 0.8, 0.9), tasks=("topic", "sentiment"), seeds=(0, 1, 2)) -> dict:
    """As `compare.json`: a dense row at 90; method i is at 89 - i, less what its sparsity costs."""

    def row(method: str, criterion: str, sparsity: float, average: float) -> dict:
        mean = {"average": average, **{task: average for task in tasks}}
        spread = {name: 0.6 if len(seeds) > 1 else None for name in mean}
        row = {"method": method, "criterion": criterion, "sparsity": sparsity, "seeds": list(seeds), "mean": mean}
        return row | {"spread": spread, "against_dense": average - 90, "backward_passes": 100, "seconds": 1.0}

    rows = [row("dense", "", 0.0, 90.0)]
    rows += [row(m, "disparse", s, 89.0 - i - 10 * s**3) for s in sparsities for i, m in enumerate(methods)]
    return {"rows": rows, "cells": [], "failed": {}, "environment": {}}


def matrix_names(layers: int) -> list[str]:
    return [f"encoder.layer.{i}.{kind}.weight" for i in range(layers) for kind in ("attention.query", "output.dense")]


def random_masks(tasks: int, layers: int, seed: int = 0, shape=(24, 40), density=0.3) -> dict[str, dict]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{t}": {name: torch.rand(shape, generator=generator) < density for name in matrix_names(layers)}
        for t in range(tasks)
    }


def planted_gradients(tasks: int, layers: int, same: int, batches: int = 8, n: int = 4000, seed: int = 0):
    """Yields (task, its gradients by batch): tasks share importance below layer `same` and differ from there on."""
    draw = np.random.default_rng(seed)
    shared = {name: draw.exponential(size=n) ** 2 for name in matrix_names(layers)}
    for t in range(tasks):
        own = {name: draw.exponential(size=n) ** 2 for name in matrix_names(layers)}
        mean = {name: shared[name] if layer_and_kind([name])[name][0] < same else own[name] for name in shared}
        noisy = [{k: torch.tensor(m * draw.normal(1, 0.1, n)).float() for k, m in mean.items()} for _ in range(batches)]
        yield f"t{t}", noisy
