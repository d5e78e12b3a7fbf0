"""Files written whole or not at all, opened with errors that name them, and found in installed packages."""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_disparse.config import UserError, one_line

PART = ".part"  # the suffix of a file that is being written
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream")  # in its RuntimeErrors about the disk


@contextmanager
def writing(folder: str | Path, remedy: str = "Once this is fixed, the same command goes on.") -> Iterator[None]:
    """Turns errors of the disk while `folder` is written into a UserError that ends with `remedy`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = one_line(error)
        if isinstance(error, RuntimeError):
            if not any(word in reason for word in _TORCH_SAVE):
                raise
            reason = f"torch.save failed ({reason})"
        if isinstance(error, OSError) and error.strerror:  # without the number
            reason = error.strerror + (f": {error.filename}" if error.filename else "")
        raise UserError(f"output_dir: cannot write to {folder}: {reason}{_free(Path(folder))}.\n{remedy}") from error


def _free(folder: Path) -> str:
    """Returns the free space as text, as torch does not say when the disk is full."""
    try:
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    except OSError:
        return ""
    return f" ({free / 1e6:,.1f} MB are free there)"


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """Opens a safetensors file, which checks its header against its size; raises UserError if it is truncated."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        got = f"a file that does not parse ({one_line(error)})"
        raise UserError(f"{path}: expected whole safetensors, got {got}; write or download it again") from None


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, even if the machine loses power; call it in one process only."""
    part = path.with_name(path.name + PART)
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes `folder` once it is on the disk, or is removed after an error.

    Raises:
        UserError: `folder` is not empty, or the disk fails.
    """
    folder = Path(folder).resolve()
    with writing(folder, "Fix this or choose another folder."):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"output_dir: expected a new or empty folder, got {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:40]}-") as inside:
            target = Path(inside, "new")
            target.mkdir()
            yield target
            sync(target)
            os.replace(target, folder)  # fails, for example, if `folder` is the current folder


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """Returns the JSON object in a file; if there is none, `remedy` is the second line of the UserError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {values!r:.40}")
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{path}: expected a JSON object, got a file that does not parse: {one_line(error)}"
        raise UserError("\n".join([reason, remedy]).rstrip()) from None
    return values


def sync(folder: Path) -> None:
    """Flushes all files of a folder to the disk, in case the machine loses power."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def resolve(reference: str) -> str:
    """Returns the path of a file of an installed package for `package:NAME/path`, and any other reference unchanged.

    The package is located, not imported, so none of its code runs.

    Raises:
        UserError: the package is not installed, it has no such file, or the path leaves the package.
    """
    if not reference.startswith("package:"):
        return reference
    name, _, inner = reference.removeprefix("package:").partition("/")
    module = name.replace("-", "_")
    if not module.isidentifier():
        raise UserError(f"{reference}: expected package:NAME/path, got the package name '{name}'")
    spec = None if module == "__main__" else importlib.util.find_spec(module)  # find_spec("__main__") raises
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{reference}: the package '{name}' is not installed; try: pip install {name.replace('_', '-')}"
        )
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root) or not path.exists():
        raise UserError(f"{reference}: the package '{name}' has no file '{inner}'")
    return str(path)
