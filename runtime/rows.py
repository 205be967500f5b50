"""Rows of step pairs: how they are read, and which are refused or dropped, by file and line."""

import hashlib
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from data import SPANS, Pair, encode, prompt_of, without_end
from runtime.files import content_key, parse_json, read_bytes
from runtime.messages import InputError, print0
from runtime.templates import HALF_CHARACTER, control_token_in, control_tokens, end_of_answer

Row = tuple[str, dict]  # where it stands, as "file:line" or "file: row n" for messages; and its fields

# ---------------------------------------------------------------------------------------------------- reading


def read_rows(path: str) -> list[Row]:
    """Rows of a .jsonl, .json (one list), .parquet file, or of the training split of a hub dataset.

    Raises InputError naming file and line for what is not UTF-8, not JSON or not an object.
    """
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.exists(path)

    if path.endswith(".jsonl"):
        rows = []
        for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
            if line.strip():
                where = f"{path}:{number}"
                rows.append((where, parse_json(where, line)))
    elif path.endswith(".json"):
        parsed = parse_json(path, read_bytes(path))
        if not isinstance(parsed, list):
            raise InputError(f"{path}: must be one JSON list of rows, got {type(parsed).__name__}; "
                             "one object per line is called .jsonl")
        rows = [(f"{path}: row {number}", row) for number, row in enumerate(parsed, 1)]
    elif path.endswith(".parquet") or is_hub_name:
        rows = [(f"{path}: row {number}", row) for number, row in enumerate(_read_with_datasets(path), 1)]
    else:
        raise InputError(f"{path}: must be a .jsonl, .json or .parquet file or a hub dataset (owner/name)")

    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be a JSON object, got {type(row).__name__}")
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def _read_with_datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path}: reading parquet files and hub datasets needs: "
                         "pip install datasets") from None
    try:
        if path.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=path, split="train")
        return datasets.load_dataset(path, split="train")
    except Exception as error:  # the library raises a dozen unrelated types for "not there" or "not readable"
        raise InputError(f"{path}: {type(error).__name__}: {error}") from None


def hold_out(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(the rest, the rows of a share of the problems), the same however the rows are ordered."""
    held_out = []
    rest = []
    for where, row in rows:
        number = int(content_key(str(row.get("prompt")))[:8], 16) / 2**32  # as good as random
        (held_out if number < share else rest).append((where, row))
    if not held_out or not rest:
        raise InputError(f"--eval-data {share}: leaves {len(rest)} of {len(rows)} pairs to train on")
    return rest, held_out


# ----------------------------------------------------------------------------------------- refusing, dropping


def read_pairs(tokenizer: Any, config: Namespace) -> tuple[list[Pair], list[Pair]]:
    """The training pairs of --data and the held-out pairs of --eval-data."""
    rows = [row for source in config.data for row in read_rows(source)]
    held_out = []
    if isinstance(config.eval_data, float):
        rows, held_out = hold_out(rows, config.eval_data)
    elif config.eval_data:
        held_out = read_rows(config.eval_data)
    return pairs_of(rows, "training", tokenizer, config), pairs_of(held_out, "held-out", tokenizer, config)


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
    names = ("prompt", "initial_reason_steps", *SPANS[span])
    for name in names:
        if name not in row:
            return f"has no field {name!r}; a row needs {', '.join(names)}"
        text = row[name]
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
    for name, ids in zip(SPANS[span], (pair.chosen, pair.rejected), strict=True):
        if not row[name].strip() or not ids:
            return f"{name!r} is empty"
    if not pair.prefix:
        return "nothing comes before the steps"
    chosen, rejected = (row[name].strip() for name in SPANS[span])
    if chosen == rejected or pair.chosen == pair.rejected:
        return f"{' equals '.join(map(repr, SPANS[span]))}, so there is nothing to prefer"
    return ""


def _control_token(row: dict, span: str, tokens: list[str], end: str) -> str:
    """Says which control token stands in the text of a row, if one does. Whole solutions may end in `end`."""
    texts = {"prompt": prompt_of(row), "initial_reason_steps": row["initial_reason_steps"]}
    texts |= {name: without_end(row[name], end) for name in SPANS[span]}
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
