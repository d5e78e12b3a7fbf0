"""The entry point of `hf-disparse`: errors of one to three lines, exit statuses, the end of all processes."""

import os
import signal
import sys
import time
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from hf_disparse.cli.commands import app
from hf_disparse.cli.quiet import rank
from hf_disparse.cli.tables import close_bars

_GRACE = 10.0  # seconds that other processes leave the first one to print its error


def main() -> None:
    """Runs the command of `sys.argv` and exits."""
    from hf_disparse.config import UserError, one_line

    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if "LOCAL_RANK" not in os.environ:  # a launcher wants its processes to end at once
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # as an exception, so that half-written folders are removed
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        _leave()
        sys.exit(status)
    except TyperException as error:
        fail(f"{error.format_message()}\nTry: hf-disparse --help")
    except typer.Abort:
        sys.exit(130)
    except UserError as error:
        fail(with_flags(str(error)))
    except OSError as error:  # a full disk or a vanished file, met where its purpose is unknown
        fail(f"{error.filename or 'reading or writing'}: {error.strerror or one_line(error)}")


def with_flags(message: str) -> str:
    """Writes the command's flags for the names of Python arguments: `name` in backticks, and the key before the colon.

    The keys of a recipe stay as they are, even where the command has an option of the same name.
    """
    from hf_disparse.recipes.keys import SECTIONS

    command = typer.main.get_command(app).commands.get(sys.argv[1])
    for option in command.params if command else ():
        name, flag = option.name.rstrip("_"), option.opts[0] if option.opts[0].startswith("-") else option.metavar
        message = message.replace(f"`{name}`", flag)
        if name not in ("recipe", *SECTIONS) and message.startswith(f"{name}:"):
            message = flag + message.removeprefix(name)
    return message


def fail(message: str) -> NoReturn:
    """Prints at most three lines of the message and exits with status 2."""
    close_bars()
    lines = [line for line in message.splitlines() if line.strip()][:3]
    where = ""
    if rank() > 0:
        time.sleep(_GRACE)  # most often all have the same error: the launcher ends us once rank 0 has printed it
        where = f"rank {rank()}: "
    print("error: " + where + "\n".join(lines), file=sys.stderr, flush=True)
    sys.exit(2)


def _leave() -> None:
    """Leaves the process group, if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from hf_disparse.distributed import processes as distributed

        distributed.end()
