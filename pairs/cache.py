"""A file of rows that is only ever added to: what makes every stage restartable.

What a model has said, to a problem or as a judge, is on disk before the next is asked for, and is never asked
for again.
"""

import datetime
import glob
import json
import os
from typing import Any

import torch.distributed as dist

from runtime.files import lock, parse_json, read_bytes, writing
from runtime.messages import InputError


class Cache:
    """A JSONL file of rows, each under a key, that is only ever added to.

    Its first line are the settings that all rows depend on; a file with others, or that begins with anything
    else, is refused and not touched. Each rank of torchrun adds to a file of its own (FILE.jsonl,
    FILE.rank1.jsonl, ...), and reads all of them. A last line that a kill -9 tore is dropped.
    """

    def __init__(self, path: str, settings: dict[str, Any], types: dict[str, Any] | None = None):
        """`types` are those of the fields that each row must have, besides its key."""
        self.rows: dict[str, dict] = {}
        self.unshared: list[dict] = []
        self.settings, self.types = settings, {"key": str, **(types or {})}
        self.rank, self.ranks, self.group = 0, 1, None
        if dist.is_initialized():
            self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
            # Of its own, because ranks wait for the slowest of a wave, which may take hours.
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
        stem = path.removesuffix(".jsonl")
        own = path if self.rank == 0 else f"{stem}.rank{self.rank}.jsonl"

        if os.path.islink(own):
            raise InputError(f"{own}: is a link, and what it leads to is not written to; "
                             "remove the link, or choose another --out")
        for other in (path, *sorted(glob.glob(f"{glob.escape(stem)}.rank*.jsonl"))):
            if other != own and os.path.exists(other):
                self._take_in(other, read_bytes(other))
        self.file = lock(own)  # for as long as the cache: closing it would give up the lock
        self.file.seek(0)
        complete = self._take_in(own, self.file.read())

        if len(set(self._gathered(len(self.rows)))) > 1:  # waits: nobody adds before all have read
            raise InputError(f"{path}: the ranks see different files; --out must be one shared folder")
        self.file.truncate(complete)
        if complete == 0:
            self._write([{"settings": settings}])

    def _take_in(self, path: str, content: bytes) -> int:
        """Add a file's rows. Returns the length of its complete lines. Raises InputError if not ours."""
        *lines, torn = content.split(b"\n")
        if not lines and not line_of({"settings": self.settings}).startswith(torn):
            lines = [torn]  # not the beginning of our first line, so it has to be refused

        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if number == 1:
                first = parse_row(where, line, {"settings": dict}, "choose another --out")
                self._refuse_other_settings(path, first["settings"])
            else:
                row = parse_row(where, line, self.types, "remove that line, and what it held is made again")
                self.rows.setdefault(row["key"], row)
        return len(content) - len(torn)

    def _refuse_other_settings(self, path: str, known: dict[str, Any]) -> None:
        for name, value in self.settings.items():
            if known.get(name) != value:
                raise InputError(f"{path}: was made with {name} = {known.get(name)!r}, and this is "
                                 f"{value!r}; use the same setting to continue it, or another --out")

    def _write(self, rows: list[dict]) -> None:
        with writing(self.file.name):
            self.file.write(b"".join(map(line_of, rows)))
            self.file.flush()
            os.fsync(self.file.fileno())

    def _gathered(self, thing: Any) -> list:
        """What each rank gives here. Collective."""
        things = [thing] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(things, thing, group=self.group)
        return things

    def add(self, rows: list[dict]) -> None:
        """Rows with their `key`, on disk when this returns."""
        self._write(rows)
        self.unshared += rows

    def share(self) -> None:
        """Take in what this rank and the others have added. Collective."""
        for rows in self._gathered(self.unshared):
            self.rows.update({row["key"]: row for row in rows})
        self.unshared = []


def recorded_args(path: str) -> dict[str, Any] | None:
    """The variables of the chat template that a cache was made with; None if there are none."""
    if not os.path.isfile(path) or os.path.islink(path):
        return None
    try:
        settings = json.loads(read_bytes(path).partition(b"\n")[0])["settings"]
        return settings.get("template_args")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None  # no cache of ours, which Cache refuses


def line_of(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


def parse_row(where: str, line: bytes, types: dict[str, Any], remedy: str) -> dict:
    """A line of a cache. Raises InputError if it does not have fields of these types."""
    try:
        row = parse_json(where, line)
    except InputError as error:  # which does not say yet what to do
        raise InputError(f"{error}; {remedy}") from None
    for name, kind in types.items():
        if not isinstance(row, dict) or name not in row or not isinstance(row[name], kind):
            raise InputError(f"{where}: was not written by this command, or is damaged (look at {name!r}); "
                             f"{remedy}")
    return row
