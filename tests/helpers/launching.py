"""Real processes: torchrun with gloo on one machine, a thread each."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(processes: int, *words) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node PROCESSES words...`, its output captured; the caller judges the status."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *map(str, words)], cwd=ROOT, env=environment, timeout=300, capture_output=True, text=True
    )
