"""The compiler of the C files: what it keeps, what it trusts, and what it says when it cannot work."""

import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from hf_disparse import UserError
from hf_disparse.fast import compiler
from hf_disparse.fast.compiler import library

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of compiled libraries, which does not exist yet; a warning is an error unless a test expects it."""
    for name in ("CC", "CFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield tmp_path / "cache" / "hf_disparse"


@pytest.fixture
def copies(tmp_path):
    """Writes the same C file into a new folder at each call, so that `library` meets it as a new process would."""
    made = []

    def copy(text: str = "int answer(void) { return ANSWER; }\n", header: str = "#define ANSWER 42\n") -> list[Path]:
        folder = tmp_path / f"copy{len(made)}"
        folder.mkdir()
        (folder / "part.h").write_text(header)
        (folder / "part.c").write_text(f'#include "part.h"\n{text}')
        made.append(folder)
        return [folder / "part.c"]

    return copy


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Makes CC a script that writes down its arguments and then compiles; returns the calls that compiled."""
    script, log = tmp_path / "my compiler", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nexec cc "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CC", f"'{script}' -DARGUMENT=7")
    return lambda: [line for line in log.read_text().splitlines() if "-shared" in line]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def in_a_process(sources: list[Path]) -> subprocess.Popen:
    script = (
        "import sys, pathlib; from hf_disparse.fast.compiler import library\n"
        "print(library([pathlib.Path(sys.argv[1])]).answer(), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(sources[0])]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def test_what_is_compiled_once_is_loaded_from_then_on(copies, calls, cache):
    first = copies()
    assert library(first) is library(first)
    assert library(copies()).answer() == library(first).answer() == 42
    assert len(calls()) == len(files(cache)) == 1
    assert in_a_process(copies()).communicate(timeout=60)[0].split() == ["42", "False"]
    assert len(calls()) == 1


def test_cc_may_have_arguments(copies, calls):
    assert library(copies("int answer(void) { return ARGUMENT; }\n")).answer() == 7
    assert "-ffast-math" not in calls()[0] and calls()[0].startswith("-DARGUMENT=7 -O3 ")


def test_cflags_sources_headers_compiler_and_cpu_have_a_file_each(copies, cache, monkeypatch):
    text = "#ifdef CHANGED\nint answer(void) { return 1; }\n#else\nint answer(void) { return ANSWER; }\n#endif\n"
    found = [library(copies(text)).answer(), library(copies(text + "\n")).answer()]
    found.append(library(copies(text, "#define ANSWER 43\n")).answer())
    monkeypatch.setenv("CFLAGS", "-O1 -DCHANGED")
    found.append(library(copies(text)).answer())
    monkeypatch.setenv("CC", "cc -DCHANGED")
    found.append(library(copies(text)).answer())
    monkeypatch.setattr(compiler, "_cpu", lambda: "another one")
    found.append(library(copies(text)).answer())
    assert found == [42, 42, 43, 1, 1, 1]
    assert len(files(cache)) == 6


def test_a_compiler_of_another_version_compiles_anew(copies, calls, cache, tmp_path):
    library(copies())
    script = tmp_path / "my compiler"
    script.write_text(script.read_text().replace("exec", 'test "$2" = --version && echo 2.0 && exit\nexec'))
    assert library(copies()).answer() == 42
    assert len(calls()) == 2
    assert len({path.name.split("-")[0] for path in files(cache)}) == 2


def test_two_processes_at_once_both_get_the_library(copies, cache):
    both = [in_a_process(copies()) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].split() for process in both] == [["42", "False"]] * 2
    assert {path.suffix for path in files(cache)} == {".so"}


def test_threads_at_once_compile_once(copies, calls):
    sources, found = copies(), []
    threads = [threading.Thread(target=lambda: found.append(library(sources))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1 and len(found) == 4
    assert len(calls()) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_a_thread_compiles_can_use_the_library(copies, calls, tmp_path):
    sources, slow = copies(), tmp_path / "my compiler"
    slow.write_text(slow.read_text().replace("exec", f'touch "{tmp_path}/started"; sleep 0.3; exec'))
    thread = threading.Thread(target=library, args=[sources])
    thread.start()
    while not (tmp_path / "started").exists():
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python 3.12: forks beside threads may deadlock
        child = os.fork()
    if child == 0:
        os._exit(library(sources).answer())
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert len(calls()) == 1


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + b"x"])
def test_a_damaged_library_is_compiled_anew(damage, copies, calls, cache):
    library(copies())
    (kept,) = files(cache)
    whole = kept.read_bytes()
    damaged = cache / "damaged"
    damaged.write_bytes(damage(whole))
    damaged.replace(kept)  # not into the file itself, which this process has mapped
    assert library(copies()).answer() == 42
    assert len(calls()) == 2
    assert files(cache) == [kept] and kept.read_bytes() == whole


def test_a_file_under_the_right_name_that_is_no_library_is_compiled_anew(copies, calls, cache):
    library(copies())
    (kept,) = files(cache)
    fake = cache / "fake"
    fake.write_text("no library")
    fake.replace(cache / compiler._name(kept.name.split("-")[0], fake))
    kept.unlink()
    assert library(copies()).answer() == 42
    assert len(calls()) == 2


def test_a_killed_compiler_leaves_nothing_that_is_loaded(copies, cache, monkeypatch, tmp_path):
    killed = tmp_path / "killed"
    killed.write_text('#!/bin/sh\ntest "$1" = --version || kill -9 $$\n')
    killed.chmod(0o700)
    monkeypatch.setenv("CC", str(killed))
    with pytest.raises(UserError, match="failed: it said nothing"):
        library(copies())
    assert files(cache) == []


def test_folder_and_file_are_closed_to_others_whatever_the_umask(copies, calls, cache):
    before = os.umask(0)
    try:
        library(copies())
    finally:
        os.umask(before)
    assert not any(path.stat().st_mode & 0o077 for path in (cache.parent, cache, *files(cache)))
    library(copies())
    assert len(calls()) == 1


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_folder_that_others_can_write_to_is_not_used(mode, copies, calls, cache):
    library(copies())
    cache.chmod(mode)
    kept = {path: path.stat().st_mtime_ns for path in files(cache)}
    with pytest.warns(UserWarning, match=f"compiled anew .*: {cache} can be changed by other users"):
        assert library(copies()).answer() == 42
    assert len(calls()) == 2
    assert {path: path.stat().st_mtime_ns for path in files(cache)} == kept


def test_a_folder_that_others_can_exchange_is_not_used(copies, cache):
    cache.parent.mkdir()
    cache.parent.chmod(0o777)
    with pytest.warns(UserWarning, match="can be changed by other users"):
        library(copies())
    cache.parent.chmod(0o1777)  # as /tmp: only what is one's own
    library(copies())
    assert len(files(cache)) == 1


def test_a_library_that_others_can_write_to_is_not_loaded(copies, calls, cache):
    library(copies())
    (kept,) = files(cache)
    kept.chmod(0o722)
    library(copies())
    assert len(calls()) == 2
    assert files(cache) == [kept] and kept.stat().st_mode & 0o777 == 0o700


def test_what_another_user_owns_is_not_used(copies, calls, cache, monkeypatch):
    library(copies())
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.warns(UserWarning, match="can be changed by other users"):
        assert library(copies()).answer() == 42
    assert len(calls()) == 2


def test_without_a_home_the_library_is_compiled_and_deleted(copies, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.warns(UserWarning) as warned:
        assert library(copies()).answer() == 42
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert files(tmp_path / "temporary") == []


def test_the_home_s_cache_is_used_where_none_is_named(copies, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which counts as unset
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    library(copies())
    assert len(files(tmp_path / "home" / ".cache" / "hf_disparse")) == 1


@pytest.mark.parametrize("step", ["copy", "replace"])
def test_a_full_disk_costs_only_the_cache(step, copies, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((compiler.shutil, "copy", full) if step == "copy" else (compiler.os, "replace", full)))
    with pytest.warns(UserWarning, match="cannot be kept: .*No space left"):
        assert library(copies()).answer() == 42
    assert files(cache) == []


@pytest.mark.parametrize("folder", ["cache", "temporary"])
def test_a_folder_from_which_nothing_loads_is_not_the_only_one(folder, copies, monkeypatch, tmp_path):
    real = compiler.ctypes.CDLL
    refused = str(tmp_path / "cache") if folder == "cache" else compiler.tempfile.gettempdir() + "/hf_disparse-"

    def mounted_noexec(path):
        if path.startswith(refused):
            raise OSError(f"{path}: failed to map segment from shared object: Operation not permitted")
        return real(path)

    monkeypatch.setattr(compiler.ctypes, "CDLL", mounted_noexec)
    assert library(copies()).answer() == library(copies()).answer() == 42
    monkeypatch.setattr(compiler.ctypes, "CDLL", lambda path: mounted_noexec(refused))
    with pytest.raises(UserError, match=r"does not load: .*not permitted; try another TMPDIR"):
        library(copies())


def test_no_compiler_is_one_line(copies, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    expected = r"^no C compiler was found; install gcc or clang, .* pip install 'hf_disparse\[compiler\]'$"
    with pytest.raises(UserError, match=expected):
        library(copies())


def test_the_compiler_of_the_extra_is_the_last_one_asked(copies, monkeypatch, tmp_path):
    (tmp_path / "ziglang").mkdir()
    (tmp_path / "ziglang" / "__main__.py").write_text(
        f"import os, sys\nassert sys.argv[1] == 'cc'\nos.environ['PATH'] = {os.environ['PATH']!r}\n"
        "os.execvp('cc', ['cc', '-DARGUMENT=8', *sys.argv[2:]])\n"
    )
    (tmp_path / "ziglang" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    text = "#ifdef ARGUMENT\nint answer(void) { return ARGUMENT; }\n#else\nint answer(void) { return 1; }\n#endif\n"
    assert library(copies(text)).answer() == 1
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library(copies(text)).answer() == 8


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("CC", "no-such-compiler -O2", "CC: the compiler 'no-such-compiler' was not found; correct or unset"),
        ("CC", "'gcc", "CC: No closing quotation in"),
        ("CFLAGS", "-fno-such-flag", "the C compiler '.*cc' failed: .*no-such-flag"),
        ("CFLAGS", '"', "CFLAGS: No closing quotation in"),
    ],
)
def test_bad_variables_are_named(variable, value, says, copies, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=says) as error:
        library(copies())
    assert "\n" not in str(error.value)


def test_a_failing_compiler_s_first_error_is_shown(copies, cache):
    text = "#warning not this\nint answer(void) { return first; }\nint other(void) { return second; }\n"
    with pytest.raises(UserError, match=r"^the C compiler '.*cc' failed: .*part\.c:3:.* error: .*first") as error:
        library(copies(text))
    assert "\n" not in str(error.value)
    assert files(cache) == []


def test_a_file_that_does_not_run_as_a_compiler_is_named(copies, monkeypatch, tmp_path):
    (tmp_path / "broken").write_bytes(b"\x7fELF")
    (tmp_path / "broken").chmod(0o700)
    monkeypatch.setenv("CC", str(tmp_path / "broken"))
    with pytest.raises(UserError, match=r"the C compiler '.*broken' does not run: "):
        library(copies())


def test_denormal_numbers_stay_what_they_are(copies):
    """-ffast-math would flush them to zero in the whole process from the moment the library is loaded."""
    text = "float sum(float a, float b) { return a + b; }\nint isnan_(float a) { return a != a; }\n"
    loaded = library(copies(text))
    loaded.sum.argtypes, loaded.sum.restype = [compiler.ctypes.c_float] * 2, compiler.ctypes.c_float
    loaded.isnan_.argtypes = [compiler.ctypes.c_float]
    tiny = np.full(64, 1e-45, dtype=np.float32)
    assert (tiny * np.float32(1) != 0).all() and loaded.sum(1e-45, 1e-45) > 0
    assert loaded.isnan_(float("nan")) == 1
