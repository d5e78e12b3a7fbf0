"""CPU seconds until a light command answers, and of `import hf_disparse` beside transformers' own import.

    python tests/benchmarks/front_door.py       # under a minute

Prints the minimum and the median of five fresh processes each (user and system time, one thread), and ratios of minima.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROUNDS = 5
MISTYPED = "model: {encoder: x}\ntasks: {a: {data: a.csv, columns: [t], labels: [a, b]}}\ntraining: {learning_rat: 1}\noutput_dir: out\n"


def cpu_seconds(words: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(MISTYPED)
        command = ["-m", "hf_disparse"]
        cases = {
            "from transformers import AutoModel": ["-c", "from transformers import AutoModel"],
            "import hf_disparse": ["-c", "import hf_disparse"],
            "from hf_disparse import MultitaskModel": ["-c", "from hf_disparse import MultitaskModel"],
            "from transformers import PreTrainedModel": ["-c", "from transformers import PreTrainedModel"],
            "hf-disparse --help": [*command, "--help"],
            "hf-disparse train --help": [*command, "train", "--help"],
            "hf-disparse --version": [*command, "--version"],
            "hf-disparse tran": [*command, "tran"],
            "hf-disparse train, a mistyped key": [*command, "train", str(recipe)],
        }
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(ROUNDS):  # interleaved: a busy moment of the machine hits all alike
            for name, words in cases.items():
                seconds[name].append(cpu_seconds(words))
    base = min(seconds["from transformers import AutoModel"])
    print(f"{'':42} minimum  median  over AutoModel")
    for name, values in seconds.items():
        print(f"{name:42} {min(values):6.2f} s {statistics.median(values):5.2f} s {min(values) / base:8.2f}")


if __name__ == "__main__":
    main()
