"""Compiles the C files of this folder into one library at first use, keeps it in the user's cache, and loads it.

A library is made for one CPU, so its file name holds a digest of the sources, the compiler, its flags and the CPU. A second digest, of the
library's own bytes, keeps damaged files from being loaded: mapping a truncated one can kill the process.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hf_disparse.config import UserError, one_line

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
# Without -ffast-math, which breaks NaN and infinity, and with which gcc links code that sets flush-to-zero for the whole process.
NATIVE = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
FLAGS = ("-O3", NATIVE, "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-std=gnu11")
# The lines of /proc/cpuinfo that tell CPUs apart, on x86 and on ARM.
_CPU_KEYS = {"vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features"}

_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a fork waits for the lock, which no thread of the child would release
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def library(sources: Sequence[Path] = SOURCES) -> ctypes.CDLL:
    """Returns the library of the C files `sources` and of the headers beside them; compiles it unless the cache has it.

    The environment variables CC, CFLAGS and XDG_CACHE_HOME have their usual meanings.

    Raises:
        UserError: there is no compiler, it fails, or its output cannot be loaded.
    """
    with _lock:
        return _library(tuple(sources))


@functools.cache
def _library(sources: tuple[Path, ...]) -> ctypes.CDLL:
    """Does what `library` says, once per process."""
    if not hasattr(os, "getuid"):
        raise UserError("the C code of the fast encoder is not supported on Windows; use the encoder as it is")
    compiler, flags = _compiler(), (*_words("CFLAGS"), *FLAGS)
    folder = _cache_folder()
    key = _key(compiler, flags, sources) if folder else ""
    if folder and (cached := _cached(folder, key)):
        return cached
    try:
        with tempfile.TemporaryDirectory(prefix="hf_disparse-") as private:
            built = Path(private, "library.so")
            # zig needs a cache of its own, also where the user's cannot be written to
            caches = {} if folder else {"ZIG_GLOBAL_CACHE_DIR": private}
            _compile([*compiler, *flags, *map(str, sources), "-o", str(built), "-lm"], **caches)
            with suppress(OSError):  # from a folder mounted noexec nothing loads, and `private` may be elsewhere
                return ctypes.CDLL(str(_keep(built, folder, key)))
            return ctypes.CDLL(str(built))
    except OSError as error:
        raise UserError(f"the compiled C code does not load: {one_line(error)}; try another TMPDIR") from None


def _words(variable: str) -> list[str]:
    """Splits an environment variable as a shell does."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise UserError(f"{variable}: {error} in {os.environ[variable]!r}; correct or unset it") from None


def _compiler() -> list[str]:
    """Returns the words that start the compiler: CC, else cc, gcc or clang, else the one of the extra `compiler`."""
    if named := _words("CC"):
        if not shutil.which(named[0]):
            raise UserError(f"CC: the compiler {named[0]!r} was not found; correct or unset this variable")
        return named
    for path in filter(None, map(shutil.which, ("cc", "gcc", "clang"))):
        return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise UserError(
        "no C compiler was found; install gcc or clang, set CC, or try: pip install 'hf_disparse[compiler]'"
    )


def _run(command: list[str], **environment: str) -> tuple[bool, str]:
    """Runs a compiler; returns whether it succeeded, and its output in English."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"the C compiler {command[0]!r} does not run: {one_line(error)}") from None
    return done.returncode == 0, done.stdout.decode(errors="replace")


def _compile(command: list[str], **environment: str) -> None:
    """Compiles; raises UserError with the first line that names an error."""
    succeeded, output = _run(command, **environment)
    if not succeeded:
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
        errors = [line for line in lines if re.search(r"error|undefined|cannot", line, re.IGNORECASE)]
        raise UserError(f"the C compiler {command[0]!r} failed: {(errors or lines)[0][:300]}")


def _key(compiler: list[str], flags: tuple[str, ...], sources: tuple[Path, ...]) -> str:
    """Returns a digest of all that decides what the library holds."""
    headers = {header for source in sources for header in source.parent.glob("*.h")}
    files = [(path.name, path.read_bytes()) for path in [*sources, *sorted(headers)]]
    _, version = _run([*compiler, "--version"])
    return hashlib.sha256(repr((compiler, version, flags, _cpu(), files)).encode()).hexdigest()[:32]


def _cpu() -> str:
    """Describes the CPU: a home may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        found = sorted({line for line in lines if line.partition(":")[0].strip() in _CPU_KEYS})
    except OSError:  # macOS
        found = [platform.processor()]
        with suppress(OSError):
            sysctl = ["sysctl", "-n", "machdep.cpu.brand_string"]
            found.append(subprocess.run(sysctl, capture_output=True, text=True).stdout)
    return repr((platform.machine(), found))


def _cache_folder() -> Path | None:
    """Returns the folder of compiled libraries; warns and returns None if there is none or others can write to it."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = cache.resolve() / "hf_disparse"
        folder.mkdir(mode=0o700, exist_ok=True)
        folder = folder.resolve()
        # where all may write, and not only to what is their own, all may exchange the folder
        if _only_mine(folder) and all(parent.stat().st_mode & 0o1002 != 0o0002 for parent in folder.parents):
            return folder
        reason = f"{folder} can be changed by other users"
    except (OSError, RuntimeError) as error:
        reason = one_line(error)
    _warn(reason)
    return None


def _only_mine(path: Path) -> bool:
    """Whether this user owns `path` and nobody else can write to it."""
    state = path.stat()
    return state.st_uid == os.getuid() and not state.st_mode & 0o022


def _cached(folder: Path, key: str) -> ctypes.CDLL | None:
    """Loads the library from the cache; returns None if it is missing, damaged or not to be trusted."""
    for path in folder.glob(f"{key}-*.so"):
        with suppress(OSError):
            if _only_mine(path) and path.name == _name(key, path):
                return ctypes.CDLL(str(path))
    return None


def _keep(built: Path, folder: Path | None, key: str) -> Path:
    """Puts a library into the cache, whole or not at all; returns where it is now."""
    if folder is None:
        return built
    try:
        built.chmod(0o700)  # whatever the umask is
        with tempfile.TemporaryDirectory(dir=folder) as part:
            copy, kept = shutil.copy(built, part), folder / _name(key, built)
            os.replace(copy, kept)
        return kept
    except OSError as error:
        _warn(one_line(error))
        return built


def _name(key: str, path: Path) -> str:
    return f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.so"


def _warn(reason: str) -> None:
    warnings.warn(f"C code is compiled anew in each process, as it cannot be kept: {reason}", stacklevel=5)
