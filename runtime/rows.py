"""Rows of step pairs: how they are read, and which are refused or dropped, by file and line."""

import hashlib
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from data import SPAN_FIELDS, Pair, encode, prompt_of, without_end
from runtime.files import content_key, parse_json, read_bytes
from runtime.messages import InputError, in_one_line, print0
from runtime.templates import HALF_CHARACTER, control_token_in, control_tokens, end_of_answer

Row = tuple[str, dict]  # where it stands, as "file:line" or "file: row n" for messages; and its fields
SOURCES = "a .jsonl, .json or .parquet file or a hub dataset (owner/name, owner/name:split or " \
          "owner/name:config:split)"

# ---------------------------------------------------------------------------------------------------- reading


def read_rows(source: str, default_split: str | None = None) -> list[Row]:
    """The rows of a .jsonl, .json (one list) or .parquet file, or of one split of a hub dataset.

    `default_split` is taken where a hub dataset has it and the source names none.
    Raises InputError naming file and line for what is not UTF-8, not JSON or not an object.
    """
    if source.endswith(".jsonl"):
        rows = []
        for number, line in enumerate(read_bytes(source).split(b"\n"), 1):
            if line.strip():
                where = f"{source}:{number}"
                rows.append((where, parse_json(where, line)))
    elif source.endswith(".json"):
        parsed = parse_json(source, read_bytes(source))
        if not isinstance(parsed, list):
            raise InputError(f"{source}: must be one JSON list of rows, got {type(parsed).__name__}; "
                             "one object per line is called .jsonl")
        rows = _numbered(source, parsed)
    elif source.endswith(".parquet"):
        rows = _read_parquet(source)
    elif is_on_hub(source):
        rows = _read_from_hub(source, default_split)
    elif os.path.isdir(source.partition(":")[0]):
        raise InputError(f"{source}: is a folder here; name {SOURCES}")
    else:
        raise InputError(f"{source}: must be {SOURCES}")

    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be a JSON object, got {type(row).__name__}")
    if not rows:
        raise InputError(f"{source}: holds no rows")
    return rows


def is_on_hub(source: str) -> bool:
    """Whether it names a hub dataset. What is there under that name is a file or folder."""
    name, *parts = source.split(":")
    if source.endswith((".jsonl", ".json", ".parquet")) or os.path.exists(name) or os.path.exists(source):
        return False
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and len(parts) <= 2 and all(parts)


def refuse_missing_library(*sources: Any) -> None:
    """Raise InputError if one of the sources of rows needs a library that is not installed.

    For the beginning of a command, before hours or gigabytes are spent.
    """
    for source in sources:
        if isinstance(source, str) and (source.endswith(".parquet") or is_on_hub(source)):
            try:
                # Not the bare package: a folder of that name would do.
                from datasets import load_dataset  # noqa: F401
            except ImportError as error:
                raise InputError(f"{source}: reading parquet files and hub datasets needs: "
                                 f"pip install datasets ({in_one_line(error)})") from None


def _numbered(name: str, rows: Any) -> list[Row]:
    return [(f"{name}: row {number}", row) for number, row in enumerate(rows, 1)]


def _read_parquet(path: str) -> list[Row]:
    refuse_missing_library(path)
    import pyarrow.parquet  # comes with datasets, which would take the path for a pattern
    content = pyarrow.BufferReader(read_bytes(path))
    try:
        return _numbered(path, pyarrow.parquet.ParquetFile(content).read().to_pylist())
    except Exception as error:  # the library raises a dozen unrelated types for "not readable"
        raise InputError(f"{path}: {in_one_line(error)}") from None


def _read_from_hub(source: str, default_split: str | None) -> list[Row]:
    refuse_missing_library(source)
    import datasets
    name, *parts = source.split(":")
    split = parts.pop() if parts else None
    config = parts.pop() if parts else None
    try:
        splits = datasets.load_dataset(name, config)  # all of them, as it downloads them in any case
    except Exception as error:  # the library raises a dozen unrelated types for "not there"
        problem = _what_configuration(name, config) or in_one_line(error)
        raise InputError(f"{source}: {problem}") from None

    with_config = f"{name}:{config}" if config else name
    there_are = ", ".join(f"{with_config}:{one}" for one in splits)
    if split is None and default_split in splits:
        split = default_split
    elif split is None and len(splits) == 1:
        split, = splits
    elif split is None:
        raise InputError(f"{source}: has several splits; name one: {there_are}")
    elif split not in splits:
        raise InputError(f"{source}: has no split {split!r}; there are: {there_are}")
    return _numbered(f"{with_config}:{split}", splits[split])


def _what_configuration(name: str, config: str | None) -> str:
    """Says what configurations a hub dataset has, if it does not have this one or needs one; else ""."""
    import datasets
    try:
        configs = datasets.get_dataset_config_names(name)
        if config is None and datasets.get_dataset_default_config_name(name) is None:
            problem = "has several configurations; name one and a split"
        elif config is not None and config not in configs:
            problem = f"has no configuration {config!r}; there are"
        else:
            return ""

        if len(configs) > 10:
            return f"{problem}: {name}:CONFIG:SPLIT with the CONFIG {', '.join(configs)}"
        sources = []
        for one in configs:
            prefix = f"{name}:{one}" if len(configs) > 1 else name
            sources += [f"{prefix}:{split}" for split in datasets.get_dataset_split_names(name, one)]
        return f"{problem}: {', '.join(sources)}"
    except Exception:  # as the dataset itself, whose error says more
        return ""


def hold_out(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(the rest, the rows of a share of the problems), the same however the rows are ordered."""
    held_out = []
    rest = []
    for where, row in rows:
        number = int(content_key(prompt_of(row))[:8], 16) / 2**32  # as good as random
        (held_out if number < share else rest).append((where, row))
    if not held_out or not rest:
        raise InputError(f"--eval-data {share}: leaves {len(rest)} of {len(rows)} pairs to train on")
    return rest, held_out


# ----------------------------------------------------------------------------------------- refusing, dropping


def read_pairs(tokenizer: Any, config: Namespace) -> tuple[list[Pair], list[Pair]]:
    """The training pairs of --data and the held-out pairs of --eval-data."""
    rows = []
    for source in config.data:
        rows += read_rows(source, default_split="train")
    held_out = []
    if isinstance(config.eval_data, float):
        _refuse_bad_rows(rows, config.span)  # their prompts say where they belong
        rows, held_out = hold_out(rows, config.eval_data)
    elif config.eval_data:
        held_out = read_rows(config.eval_data)

    training_pairs = pairs_of(rows, "training", tokenizer, config)
    held_out_pairs = pairs_of(held_out, "held-out", tokenizer, config)
    _refuse_training_pairs(held_out_pairs, training_pairs, config.eval_data)
    return training_pairs, held_out_pairs


def pairs_of(rows: list[Row], name: str, tokenizer: Any, config: Namespace) -> list[Pair]:
    """The pairs that something can be learned from. Says how many were dropped, and why.

    A pair that is too long is dropped, never truncated: what was cut off would be the problem.
    Raises InputError that lists the first bad rows, and if nothing can be learned from more than a fifth.
    """
    if not rows:
        return []
    _refuse_bad_rows(rows, config.span)
    too_long = f"longer than --max-length {config.max_length}"
    pairs: list[Pair] = []
    dropped: dict[str, list[str]] = {}  # reason -> places

    encoded = encode(rows, tokenizer, config.template, config.instruction, config.span, config.template_args)
    tokens = control_tokens(tokenizer)
    end = ""
    if config.span == "solution":
        end, _ = end_of_answer(tokenizer, config.template, config.template_args)
    for (where, row), pair in zip(rows, encoded, strict=True):
        reason = _why_it_cannot_teach(row, pair, config.span) or _control_token(row, config.span, tokens, end)
        length = len(pair.prefix) + max(len(pair.chosen), len(pair.rejected))
        if not reason and length > config.max_length:
            reason, where = too_long, f"{where}: {length} tokens"
        if reason:
            dropped.setdefault(reason, []).append(where)
        else:
            pairs.append(pair)

    _refuse_too_few(len(rows), len(pairs), dropped)
    print0(f"{name:11s} {len(pairs):,} pairs, {len(dropped.get(too_long, [])):,} dropped as {too_long}")
    for reason, places in dropped.items():
        print0(f"{'':11s} dropped {len(places):,}: {reason} (first: {', '.join(places[:3])})")
    return pairs


def _refuse_training_pairs(held_out: list[Pair], training: list[Pair], eval_data: str | float) -> None:
    """Raise InputError if all held-out pairs are trained on too, as they are if both are one file."""
    trained = {fingerprint([pair]): pair.where for pair in training}
    again = [pair for pair in held_out if fingerprint([pair]) in trained]
    if not again:
        return
    first = f"{again[0].where}, which is {trained[fingerprint(again[:1])]}"
    if len(again) == len(held_out):
        raise InputError(f"--eval-data {eval_data}: all its pairs are in --data too ({first}); name other "
                         "pairs, or a share of --data, as 0.05")
    print0(f"{'':11s} {len(again):,} of them are trained on too (first: {first})")


def is_one_message(prompt: list) -> bool:
    """Whether it is a list of one message of the user, as chat data sets have prompts."""
    return [isinstance(turn, dict) and turn.get("role") for turn in prompt] == ["user"]


def _refuse_bad_rows(rows: list[Row], span: str) -> None:
    problems = []
    for where, row in rows:
        problem = _what_is_wrong(row, span)
        if problem:
            problems.append(f"{where}: {problem}")
    if problems:
        more = "\n  ..." if len(problems) > 5 else ""
        raise InputError(f"{len(problems)} of {len(rows)} rows cannot be trained on:\n  "
                         + "\n  ".join(problems[:5]) + more)


def _what_is_wrong(row: dict, span: str) -> str:
    """Why the row is none, "" if it is one."""
    names = ("prompt", "initial_reason_steps", *SPAN_FIELDS[span])
    for name in names:
        text = row.get(name)
        if text is None:  # as in a file of one table, which has null where a row has no such field
            return f"has no field {name!r}; a row needs {', '.join(names)}"
        if name == "prompt" and isinstance(text, list):
            if not is_one_message(text):
                return "'prompt' must be text, or a list of one message of the user"
            text = text[0].get("content")
        if not isinstance(text, str):
            return f"{name!r} must be text, got {type(text).__name__}"
        if HALF_CHARACTER.search(text):
            return f"{name!r} has half a character (a lone surrogate); remove the row or repair it"
        if name == "prompt" and not text.strip():
            return "'prompt' is empty; remove the row or fill it in"
    return ""


def _why_it_cannot_teach(row: dict, pair: Pair, span: str) -> str:
    """Why nothing can be learned from the row, "" if something can."""
    for name, ids in zip(SPAN_FIELDS[span], (pair.chosen, pair.rejected), strict=True):
        if not row[name].strip() or not ids:
            return f"{name!r} is empty"
    if not pair.prefix:
        return "nothing comes before the steps"
    chosen, rejected = (row[name].strip() for name in SPAN_FIELDS[span])
    if chosen == rejected or pair.chosen == pair.rejected:
        return f"{' equals '.join(map(repr, SPAN_FIELDS[span]))}, so there is nothing to prefer"
    return ""


def _control_token(row: dict, span: str, tokens: list[str], end: str) -> str:
    """Says which control token stands in the text of a row, if one does. Whole solutions may end in `end`."""
    texts = {"prompt": prompt_of(row), "initial_reason_steps": row["initial_reason_steps"]}
    texts |= {name: without_end(row[name], end) for name in SPAN_FIELDS[span]}
    for name, text in texts.items():
        token = control_token_in(text, tokens)
        if token:
            return f"{name!r} holds the control token {token!r}"
    return ""


def _refuse_too_few(rows: int, pairs: int, dropped: dict[str, list[str]]) -> None:
    reasons = "; ".join(f"{len(places)} {reason} (first: {places[0]})" for reason, places in dropped.items())
    cannot_teach = sum(len(places) for reason, places in dropped.items() if "--max-length" not in reason)
    if cannot_teach > rows / 5:
        raise InputError(f"{cannot_teach} of {rows} rows cannot be trained on, more than a fifth: {reasons}")
    if not pairs:
        raise InputError(f"no pair of {rows} is left: {reasons}")


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Hash of all token ids: of the data, template, instruction, span and tokenizer at once."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in pair[:3]:
            digest.update(np.asarray([len(ids), *ids], np.int64).tobytes())
    return digest.hexdigest()
