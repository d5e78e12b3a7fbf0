"""What tests/distributed/test_launch.py has every process do: commands of `hf-disparse`, one after the other, and what they print."""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

from hf_disparse.cli import main as cli
from tests.helpers.commands import hf_disparse


def main(folder: Path) -> None:
    """Runs the commands of `commands.json`; the last line of that of rank N goes to `said-N.json`."""
    said = []
    with patch.object(cli, "_leave", lambda: None), patch.object(cli, "_GRACE", 0.0):  # one after the other
        for words in json.loads((folder / "commands.json").read_text()):
            said.append(hf_disparse(*words))
    (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
