"""The README and the pages below docs/, as tests read them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

DOCS = {
    path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS[page], re.DOTALL)
