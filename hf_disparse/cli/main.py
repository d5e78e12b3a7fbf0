"""The entry point of `hf-disparse`: errors as one to three lines, exit statuses, the other processes."""

import os
import signal
import sys
import time
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from hf_disparse.cli.commands import _rank, app
from hf_disparse.cli.tables import close_bars

_GRACE = 10.0  # seconds


def main() -> None:
    """Entry point of `hf-disparse`."""
    from hf_disparse.config import UserError, one_line

    if _rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if "LOCAL_RANK" not in os.environ:  # a launcher's processes end at once, which other processes wait for
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # half-written folders are taken away
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
    except OSError as error:  # a full disk or a file that vanished, where nobody could say what it was for
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
    """Prints at most three lines and ends with status 2."""
    close_bars()
    lines = [line for line in message.splitlines() if line.strip()][:3]
    where = ""
    if _rank() > 0:
        time.sleep(_GRACE)  # most often all processes have one error: the launcher ends us when the first has said it
        where = f"rank {_rank()}: "
    print("error: " + where + "\n".join(lines), file=sys.stderr, flush=True)
    sys.exit(2)


def _leave() -> None:
    """Parts with the other processes, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from hf_disparse.distributed import processes as distributed

        distributed.end()
