"""What a machine does to a run, said in two lines: disks that fill up, files torn, processes that are gone. Layer 1."""

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

_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream")  # in what it says of a disk, as a RuntimeError


@contextmanager
def writing(folder: str | Path, remedy: str = "Once that is mended, the same command goes on.") -> Iterator[None]:
    """Turns what the system refuses while a folder is written into a UserError that ends with `remedy`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = one_line(error)
        if isinstance(error, RuntimeError):
            if not any(word in reason for word in _TORCH_SAVE):
                raise
            reason = f"torch.save broke off ({reason})"
        if isinstance(error, OSError) and error.strerror:  # without the number
            reason = error.strerror + (f": {error.filename}" if error.filename else "")
        raise UserError(f"output_dir: cannot write to {folder}: {reason}{_free(Path(folder))}.\n{remedy}") from error


def _free(folder: Path) -> str:
    """The room there is, for torch does not say that it lacked any."""
    try:
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    except OSError:
        return ""
    return f" ({free / 1e6:,.1f} MB are free there)"


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """A safetensors file, open, its header checked against its size; one that is not whole is the user's to mend."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        got = f"a file that does not parse ({one_line(error)})"
        raise UserError(f"{path}: expected whole safetensors, got {got}; write or download it again") from None


_PART = ".part"


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also where the machine loses power; of several processes in one."""
    part = path.with_name(path.name + _PART)
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
    """A folder beside `folder` to write to, which takes its name if all goes well and is gone if not.

    Raises:
        UserError: `folder` holds something.
    """
    folder = Path(folder).resolve()
    with writing(folder, "Mend that or name another folder."):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"output_dir: expected a new or empty folder, got {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:40]}-") as inside:
            target = Path(inside, "new")
            target.mkdir()
            yield target
            os.replace(target, folder)  # the current folder, for one, cannot be replaced


def read_json(path: Path) -> dict[str, Any]:
    """A file of a model's folder."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, got a file that does not parse: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def sync(folder: Path) -> None:
    """Has the disk hold what was written to a folder, for a machine may lose power, too."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def resolve(reference: str) -> str:
    """`package:NAME/path` as the path of that file of an installed package; anything else as it is.

    The package is located, not imported: none of its code runs.

    Raises:
        UserError: the package is not installed, the file is not there, or the path leaves the package.
    """
    if not reference.startswith("package:"):
        return reference
    name, _, inner = reference.removeprefix("package:").partition("/")
    module = name.replace("-", "_")
    if not module.isidentifier():
        raise UserError(f"{reference}: expected package:NAME/path, got the package name '{name}'")
    spec = None if module == "__main__" else importlib.util.find_spec(module)  # which has none, and find_spec raises
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{reference}: the package '{name}' is not installed; try: pip install {name.replace('_', '-')}"
        )
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root) or not path.exists():
        raise UserError(f"{reference}: the package '{name}' carries no file '{inner}'")
    return str(path)
