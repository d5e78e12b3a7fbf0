"""Speed of sparse encoders by `speed_up` relative to dense torch, beside other engines, and the memory of their layers.

    python tests/benchmarks/sparse_speed.py                 # hours: MiniLM-L6, a compact quarter of it, BERT-base, real rows
    python tests/benchmarks/sparse_speed.py --models minilm --zeros 90 --threads 1 --json speed.json

The weights are random, the zeros are at random places. Every engine that is installed takes part: torch with SDPA in inference mode
(dense), torch.compile, onnxruntime and OpenVINO in float32 and int8 (lossy: onnxruntime's quantize_dynamic, nncf's quantize with
default settings), ours. The model `compact` keeps 7 4 6 4 4 7 of 12 heads and 648 289 206 183 60 22 of 1,536 neurons, and is compared
with dense torch of the whole MiniLM-L6. `ragged` has real rows: 12 batches of 32 of the quickstart's validation rows in random order,
padded to the longest of a batch for every engine.

In each cell the engines take turns in several rounds. A turn is a pass to warm up, so that caches which the engine before has left
cold do not count, and several timed passes (one, without a warm-up, where a pass takes more than a second). The least time of all
counts. With one thread it is the process's CPU time, so that waiting for a core which others use does not count.

With --json the results are added to a file after every cell, and what it has is not measured anew; start it with the same environment.
These variables keep torch, OpenVINO's oneDNN and ours to AVX2 on a CPU with AVX-512. onnxruntime has no such switch, so its figures
are those of the CPU, where VNNI makes int8 about twice as fast as AVX2 would.

    CFLAGS=-mno-avx512f ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
"""

import argparse
import gc
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

import torch
from sparse_engines import (
    ENGINES,
    Batch,
    Bench,
    Engine,
    cut,
    equal_rows,
    layer_bytes,
    missing,
    new_model,
    quickstart_rows,
    zero,
)
from transformers import logging

MODELS = {
    "minilm": "MiniLM-L6",
    "compact": "A compact quarter of MiniLM-L6",
    "base": "BERT-base",
    "ragged": "MiniLM-L6, real rows",
}
ZEROS = {
    "minilm": (0, 50, 70, 80, 90, 95),
    "base": (0, 50, 70, 80, 90, 95),
    "compact": (0, 50, 70, 80),
    "ragged": (90,),
}
SHAPES = ("1x32", "1x128", "8x128", "32x128")
LENGTHS = (32, 128)  # most tokens of a real row
TURN, MOST, LONG = 0.2, 20, 1.0  # seconds and passes of a turn, and the seconds of a pass that needs no warm-up
EXACT = 1e-4  # of the largest hidden state


def least(engines: dict[str, Engine], batches: list[Batch], rounds: int) -> dict[str, float]:
    """Each engine's least seconds for all batches; the engines take turns, also at going first."""
    names, best = list(engines), {}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def once(name: str) -> float:
        start = clock()
        for batch in batches:
            engines[name](batch)
        return clock() - start

    with torch.inference_mode():
        for name in names:  # compiles and allocates
            once(name)
            best[name] = once(name)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                passes = max(2, min(MOST, int(TURN / best[name])))
                if best[name] < LONG:
                    once(name)
                else:
                    passes = 1
                best[name] = min(best[name], *(once(name) for _ in range(passes)))
    return best


def check(engine: Engine, dense: Engine, batches: list[Batch]) -> None:
    """Raises an error unless an engine's hidden states are dense torch's."""
    with torch.inference_mode():
        for batch in batches:
            mask = batch["attention_mask"].unsqueeze(-1)
            expected = dense(batch) * mask
            difference = (engine(batch) * mask - expected).abs().max() / expected.abs().max()
            assert difference <= EXACT, f"hidden states differ by {difference:.1e} of the largest"


def measure(name: str, options: argparse.Namespace, results: dict) -> None:
    """Adds the cells of a model to `results`, and writes the file after each."""
    torch._dynamo.reset()
    size = "base" if name == "base" else "minilm"
    dense = new_model(size)
    model = cut(new_model(size)) if name == "compact" else dense
    engines = [e for e in options.engines if e != "compact" or name == "compact"]
    if name == "ragged":  # torch.compile would compile each of the shapes
        engines = [e for e in engines if e != "compile"]
        data = {f"32, up to {length}": quickstart_rows(length) for length in LENGTHS}
    else:
        data = {shape: equal_rows(*map(int, shape.split("x"))) for shape in options.shapes}
    for zeros in sorted(options.zeros or ZEROS[name]):
        zero(model, zeros)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(dense, model, Path(folder))
            for threads in options.threads:
                torch.set_num_threads(threads)
                for shape, batches in data.items():
                    cell = results.setdefault("|".join((name, str(threads), shape, str(zeros))), {})
                    wanted = [e for e in engines if e not in cell]
                    if wanted:
                        cell.update(_cell(bench, wanted, threads, shape, batches, options.rounds))
                        if "ours" in wanted:
                            cell["memory"] = layer_bytes(bench.ours) / layer_bytes(dense)
                        print(f"{name}, {zeros} % zeros, {threads} threads, {shape}: {_line(cell)}", flush=True)
                        save(options.json, results)
        del bench
        gc.collect()


def _cell(bench: Bench, wanted: list[str], threads: int, shape: str, batches: list[Batch], rounds: int) -> dict:
    """Each engine's [seconds, seconds of dense torch in the same rounds]."""
    fixed = tuple(batches[0]["input_ids"].shape) if len(batches) == 1 else None
    made = {engine: bench.engine(engine, threads, fixed) for engine in ("dense", *wanted)}
    reference = bench.engine("compact", threads, fixed)
    for engine in wanted:
        if "int8" not in engine:
            check(made[engine], reference, batches[:1])
    seconds = least(made, batches, rounds)
    return {engine: [seconds[engine], seconds["dense"]] for engine in wanted}


def _line(cell: dict) -> str:
    return ", ".join(f"{e} {cell[e][1] / cell[e][0]:.2f}" for e in ENGINES if e in cell)


def save(path: Path | None, results: dict) -> None:
    """Writes the results whole or not at all."""
    if path:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(results, indent=1))
        os.replace(part, path)


def tables(results: dict) -> str:
    """A markdown table per model and number of threads."""
    groups: dict[tuple[str, int], list] = {}
    for key, cell in results.items():
        name, threads, shape, zeros = key.split("|")
        groups.setdefault((name, int(threads)), []).append((int(zeros), _order(shape), shape, cell))
    lines = []
    for name, threads in sorted(groups, key=lambda group: (list(MODELS).index(group[0]), group[1])):
        rows = sorted(groups[name, threads], key=lambda row: row[:2])
        columns = [e for e in ENGINES if any(e in cell for *_, cell in rows)]
        titles = ["batch x tokens", "zeros", "dense, ms", *columns, "ours, ms", "memory of layers"]
        lines += ["", f"### {MODELS[name]}, {threads} {'core' if threads == 1 else 'cores'}", ""]
        lines += [_row(titles), _row(["---", *["---:"] * (len(titles) - 1)])]
        for zeros, _, shape, cell in rows:
            dense = min(cell[e][1] for e in columns if e in cell)
            ratios = [f"{cell[e][1] / cell[e][0]:.2f}x" if e in cell else "" for e in columns]
            ours = [f"{cell['ours'][0] * 1000:.1f}", f"{cell['memory']:.0%}"] if "ours" in cell else ["", ""]
            lines.append(_row([shape.replace("x", " x "), f"{zeros} %", f"{dense * 1000:.1f}", *ratios, *ours]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _order(shape: str) -> int:
    return SHAPES.index(shape) if shape in SHAPES else int(shape.split()[-1])


def padding() -> str:
    """How many tokens, padding included, a batch of real rows has for each real one."""
    parts = []
    for length in LENGTHS:
        masks = [batch["attention_mask"] for batch in quickstart_rows(length)]
        parts.append(f"{sum(m.numel() for m in masks) / sum(int(m.sum()) for m in masks):.2f} at most {length} long")
    return "Real rows: padding makes of one token " + " and ".join(parts) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--zeros", nargs="+", type=int, help="percent")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES, help="texts x tokens")
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file of results that is continued")
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="(?!speed_up)")
    torch._dynamo.config.recompile_limit = 64
    for engine in [e for e in options.engines if missing(e)]:
        print(f"{engine}: left out, {missing(engine)} is not installed")
    options.engines = [e for e in options.engines if not missing(e)]
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, CFLAGS={os.environ.get('CFLAGS', '')}; least "
        f"time of {options.rounds} rounds in which the engines take turns, each after a warm-up pass (CPU time with one thread); "
        "times as fast as dense torch:",
        flush=True,
    )
    results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    with tempfile.TemporaryDirectory() as cache:
        # in a cache which runs with and without AVX-512 share, torch.compile finds kernels of the other kind, and memory is damaged
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in options.models:
            measure(name, options, results)
    print(tables(results))
    if "ragged" in options.models:
        print("\n" + padding())
    print("\nonnxruntime uses all that the CPU has (AVX-512 and VNNI, too), whatever the others are kept to.")


if __name__ == "__main__":
    main()
