"""The life of a command: torchrun's environment, signals, and one line as its end where it fails."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
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
