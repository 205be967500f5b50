"""What a run says: lines and progress bars of rank 0, and errors in one line.

Bad input is an `InputError` that says where and what to do; a command prints it as its last line.
"""

import os
import re
import sys
from typing import Any, NoReturn

from tqdm import tqdm


class InputError(ValueError):
    """Bad input: the message says where and what to do. The command lines print it without a stack trace."""


def refuse_model(name: str, why: str) -> NoReturn:
    raise InputError(f"{name} is not supported: {why}")


def print0(*lines: str) -> None:
    """Print on rank 0 only, without tearing a progress bar."""
    if os.environ.get("RANK", "0") == "0" and sys.stdout:
        tqdm.write("\n".join(lines))
        sys.stdout.flush()


def progress(things: Any, desc: str, leave: bool = False, **options) -> tqdm:
    """A progress bar on rank 0 only, which is gone when the work is done unless it shall be left."""
    return tqdm(things, desc=desc, leave=leave, disable=os.environ.get("RANK", "0") != "0", **options)


def in_one_line(error: BaseException) -> str:
    """What a library says, and what it says the cause was."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return f"{line} ({in_one_line(error.__cause__)})" if error.__cause__ else line


WAITED = "waited in vain for another process: it hangs, or has ended"


def explained(error: BaseException) -> str:
    """What a user should read of an error; "" if it is a mistake in here, whose stack trace is wanted."""
    if isinstance(error, InputError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C; the same command goes on from what is on disk"
    if isinstance(error, OSError):
        return f"error: {error.filename or 'reading or writing'}: {error.strerror or error}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return f"error: out of GPU memory, smaller batches need less: {str(error).splitlines()[0]}"
    if isinstance(error, MemoryError):
        return "error: out of memory"
    if isinstance(error, RuntimeError) and re.search("timed out|connection (closed|reset)", str(error), re.I):
        return f"error: {WAITED} ({error})"
    return ""
