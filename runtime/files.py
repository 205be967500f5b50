"""Files that are there completely or not at all, and errors that name them.

Nothing is removed or replaced but what was written here, and what is read is data, never code.
"""

import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import safetensors

from runtime.messages import InputError


def content_key(*parts: str) -> str:
    """A name for some content: 64 bits of SHA-256, in hex."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def read_bytes(path: str) -> bytes:
    try:
        # Not to wait for ever for the other end of a pipe.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{path}: is not a file, but a pipe or a device")
            return file.read().removeprefix(b"\xef\xbb\xbf")  # the byte order mark of Windows' editors
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a null byte in the path
        raise error if isinstance(error, InputError) else InputError(f"{path!r}: {error}") from None


def parse_json(where: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        line = where if where[-1].isdigit() else f"{where}:{error.lineno}"
        raise InputError(f"{line}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise InputError(f"{where}: not a row: {error}") from None


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turns what goes wrong inside (a full disk, a folder that is read-only) into a line about `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: cannot be written: {error}") from None


def write_atomically(path: str, text: str) -> None:
    """Write a file so that it is there completely or not at all."""
    # "x" follows no link that somebody put there, and the name cannot be guessed.
    unfinished = f"{path}.{secrets.token_hex(4)}.unfinished"
    with writing(path):
        try:
            with open(unfinished, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            with suppress(OSError):
                os.unlink(unfinished)


def add_lines(path: str, text: str) -> None:
    """Add to a file's end."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def lock(path: str) -> Any:
    """The file, made if needed, for one process alone as long as the returned object lives."""
    with writing(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(path, "a+b")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process writes there; is this command running?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be locked: {error.strerror}") from None
    return file
