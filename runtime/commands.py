"""The life of a command: flags, signals, torchrun's environment, and one line as its end where it fails."""

import argparse
import ctypes
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from runtime.files import read_bytes
from runtime.messages import WAITED, InputError, explained

# -------------------------------------------------------------------------------------- the life of a command






def run_command(name: str, command: Callable[[], None]) -> None:
    """Run a program, and end it: bad input, a full disk and Ctrl-C are one line, not a stack trace."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an old locale must not end a run because of a letter
            stream.reconfigure(errors="backslashreplace")
    message, status = "", 2
    try:
        end_with_torchrun()
        command()
    except (Exception, KeyboardInterrupt) as error:
        message = explained(error)
        if not message:
            raise
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            status = 130
    finally:
        if not message:  # else first say why: as soon as this one leaves, the others say that they waited
            leave_process_group()
    if not message:
        return

    if WAITED in message or os.environ.get("LOCAL_RANK", "0") != "0":
        # Mostly all ranks meet the same mistake. Then rank 0 says it, and torchrun ends this one meanwhile.
        # So it does where another one has ended and said why.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    # The exception is gone, and with it the frames that held progress bars: those are closed, and end in a
    # line break. So the message is the last thing, on a line of its own.
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    leave_process_group()
    if status == 130:
        os._exit(status)  # at once: threads may wait for a server's reply
    sys.exit(status)






@contextmanager
def noticing_stop_signals() -> Iterator[list[int]]:
    """SIGTERM, as a preempted job gets, and Ctrl-C end up in the list, and the step comes to its end."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun sends it twice
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C does not wait

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_on_any_rank(asked: list[int]) -> int:
    """The signal that a rank was asked to stop by, 0 if none was. Collective: it may reach the ranks between
    different optimizer steps, but all must stop after the same one."""
    signal_number = torch.tensor(max(asked, default=0))
    dist.all_reduce(signal_number, dist.ReduceOp.MAX)
    return int(signal_number)


@contextmanager
def waiting_for_disks() -> Iterator[Callable[[], None]]:
    """Within, some ranks may read, write or download for hours, longer than --timeout. Collective.

    All wait for each other at the end, and before it wherever they call what this yields. Whoever has ended
    meanwhile, instead of working, is an error at once.
    """
    if not dist.is_initialized():
        yield lambda: None
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    yield lambda: dist.barrier(group)
    dist.barrier(group)
    dist.destroy_process_group(group)


def end_with_torchrun() -> None:
    """Let the kernel end this process when torchrun is gone: it would write beside the next start."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    # It may be gone already. Who has lost his parent has init for one, which in a container may be torchrun.
    if os.getppid() == 1 and b"torch" not in read_bytes("/proc/1/cmdline"):
        raise InputError("torchrun has ended")


def local_rank() -> int:
    """This process' number on its node, as torchrun says it."""
    return number_in_environment("LOCAL_RANK", "0")


def local_processes() -> int:
    """How many processes torchrun has started on this node."""
    return number_in_environment("LOCAL_WORLD_SIZE", "1")


def number_in_environment(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(f"{name} in the environment must be a number, got {text!r}")
    return int(text)


@contextmanager
def joining() -> Iterator[None]:
    """Turns what torch says about the environment into a line that names it."""
    try:
        yield
    except ValueError as error:
        raise InputError("RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment must be as "
                         f"torchrun sets them, or not set ({error})") from None


def leave_process_group() -> None:
    """The end of a program that torchrun may have started."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # A thread of gloo may still hold the tensors of its last message, and needs Python to drop them:
        # without this pause one run in fifty ended by SIGABRT, when all was done.
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------- reading and writing
















# ------------------------------------------------------------------------------------------------------ flags


class Parser(argparse.ArgumentParser):
    """Flags with hyphens or underscores, never abbreviated; @FILE reads flags from a file, # is a comment."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        try:
            return super().parse_args(expand(words), namespace)
        except InputError as error:
            self.error(str(error))


def expand(words: Sequence[str], files: tuple[str, ...] = ()) -> list[str]:
    """The words, with those of FILE in the place of @FILE; `files` are those that it stands in."""
    expanded = []
    for word in words:
        if not word.startswith("@"):
            expanded.append(with_hyphens(word))
            continue
        path = word[1:]
        if os.path.realpath(path) in files:
            raise InputError(f"{path}: includes itself")
        for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
            try:
                words_of_line = shlex.split(line.decode(), comments=True)
                if b"\0" in line:
                    raise ValueError("a null byte")
            except ValueError as error:  # not text, or a quotation that does not end
                raise InputError(f"{path}:{number}: {error}") from None
            expanded += expand(words_of_line, (*files, os.path.realpath(path)))
    return expanded


def with_hyphens(word: str) -> str:
    """--learning_rate=1 as --learning-rate=1; values stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def checked(kind: type, holds: Callable[[Any], bool], must: str) -> Callable[[str], Any]:
    """An argparse type: an int, float or str for which `holds` is true; else "must be ..."."""
    def parse(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {must}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


LARGEST = 10**12  # above all that makes sense, and below what overflows somewhere later
TEXT = checked(str, bool, "more than nothing")  # which an unset shell variable is
POSITIVE_INT = checked(int, lambda x: 0 < x <= LARGEST, "above 0 and at most 10^12")
POSITIVE_FLOAT = checked(float, lambda x: 0 < x < math.inf, "above 0")
INT = checked(int, lambda x: 0 <= x <= LARGEST, "at least 0 and at most 10^12")
NOT_NEGATIVE = checked(float, lambda x: 0 <= x < math.inf, "at least 0")
SHARE = checked(float, lambda x: 0 <= x <= 1, "from 0 to 1")
MINUTES = checked(float, lambda x: 0 < x <= 1e6, "above 0 and at most 1000000")
# Without a name and password in it, which messages would show.
URL = checked(str, lambda x: re.fullmatch(r"https?://[\w.:\[\]-]+(/[^\s@]*)?", x, re.A),
              "an address like http://localhost:8000")


def SOURCE_OR_SHARE(text: str) -> str | float:
    """A file or hub dataset; or, where no file is called that, a share of the training data."""
    try:
        share = float(text)
    except ValueError:
        return TEXT(text)
    if os.path.exists(text):
        return text
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must be a file or above 0 and below 1, got {text}")
    return share
