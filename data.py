"""Step pairs: what they are, how they become tokens, and how a batch shares its prefixes.

One row, in the format of Math-Step-DPO-10K (eight text fields; `chosen` and `rejected` are single steps):

    {"dataset": "gsm8k", "prompt": "Tom has 3 boxes of 4 pens and gives 5 pens away. How many pens are left?",
     "initial_reason_steps": "Let's think step by step.\\nStep 1: 3 boxes hold 3 * 4 = 12 pens.\\nStep 2:",
     "chosen": " After giving 5 away, 12 - 5 = 7 pens are left.", "rejected": " 12 + 5 = 17 pens are left.",
     "full_chosen": "... and everything after it", "full_rejected": "...", "answer": "7"}

One pair in a row of tokens. Chosen and rejected share all that comes before them, so that is laid out once:

    token      <user> Tom has ... <assistant> Let's ... Step 2 : | After giving ... left . | 12 + 5 ... left .
    segment    --------------------- prefix -------------------- | ------- chosen -------- | ---- rejected ---
    position   0 1 2 ...                                     P-1 | P P+1 ...               | P P+1 ...

What a token attends to, for a prefix of three tokens and steps of two (one line for each query):

                 keys:   prefix   chosen   rejected
    prefix               x . .    . .      . .
                         x x .    . .      . .
                         x x x    . .      . .
    chosen               x x x    x .      . .
                         x x x    x x      . .
    rejected             x x x    . .      x .
                         x x x    . .      x x

So each step sees exactly what it would see alone, and the last prefix token predicts the first token of both.
Many pairs stand in one row, and do not see each other. No mask of a row is made: the keys of a step are those
of its prefix followed by its own, and then attention is ordinary causal attention, segment by segment.

In reading order: reading rows; encoding them; the plan of a run and the packing of a batch.
"""

import hashlib
import heapq
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from files import InputError, content_key, parse_json, progress, read_bytes

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
TEMPLATES = ("chat", "alpaca", "deepseek-math")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate, which is no text
SPANS = {"step": ("chosen", "rejected"), "solution": ("full_chosen", "full_rejected")}


# ---------------------------------------------------------------------------------------------------- reading


def read_rows(path: str) -> list[tuple[str, dict]]:
    """Rows of a .jsonl, .json (one list), .parquet file, or of the training split of a hub dataset.

    Returns (where, row) pairs; where is "file:line" (or "file: row n") for messages about that row.
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


def hold_out(rows: list[tuple[str, dict]], share: float) -> tuple[list, list]:
    """(the rest, the rows of a share of the problems), the same however the rows are ordered."""
    held_out = []
    rest = []
    for where, row in rows:
        number = int(content_key(str(row.get("prompt")))[:8], 16) / 2**32  # as good as random
        (held_out if number < share else rest).append((where, row))
    if not held_out or not rest:
        raise InputError(f"--eval-data {share}: leaves {len(rest)} of {len(rows)} pairs to train on")
    return rest, held_out


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


# --------------------------------------------------------------------------------------------------- encoding


class Pair(NamedTuple):
    """Token ids of one pair. The prefix has at least one token, and so has each of the two trained spans."""

    prefix: list[int]
    chosen: list[int]
    rejected: list[int]
    where: str  # the row it came from, for messages

    def tokens(self, share_prefix: bool) -> int:
        """Tokens it takes up in a packed row."""
        prefixes = 1 if share_prefix else 2
        return prefixes * len(self.prefix) + len(self.chosen) + len(self.rejected)


def read_tokenizer(model: str) -> Any:
    """Of a model's folder or hub name."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        is_empty = not tokenizer("1").input_ids  # without its files the library makes an empty one
    except Exception as error:  # whatever the reader of an odd file happens to run into
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{model}: its tokenizer cannot be read ({problem})") from None
    if is_empty:
        raise InputError(f"{model}: has no tokenizer")
    return tokenizer


def open_turn(tokenizer, prompt: str, template: str, instruction: str | None = None) -> str:
    """The text before the model's answer, up to the first step. `instruction` None is the template's own."""
    if instruction is None:
        instruction = "" if template == "alpaca" else INSTRUCTION
    user = f"{prompt}\n{instruction}" if instruction else prompt

    if template == "alpaca":
        return ("Below is an instruction that describes a task. "
                "Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{user}\n\n### Response:\n")
    if template == "deepseek-math":
        return f"User: {user}\n\nAssistant: "
    if template != "chat":
        raise InputError(f"--template must be one of {', '.join(TEMPLATES)}, got {template!r}")

    # The assistant's turn is opened and left open: the steps go on from there.
    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; pass "
                         "--template alpaca or --template deepseek-math, whichever the model was tuned with")
    turn = [{"role": "user", "content": user}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may fail in any way
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{tokenizer.name_or_path}: its chat template fails on {user[:60]!r} "
                         f"({problem!r})") from None
    if user.strip() not in text or HALF_CHARACTER.search(text):
        raise InputError(f"{tokenizer.name_or_path}: its chat template changes or drops the problem: "
                         f"{user[:60]!r} becomes {text[:200]!r}")
    return text


def tokenize(tokenizer, texts: Sequence[str], template: str) -> list[list[int]]:
    """Token ids of each text, with BOS exactly where the model has it and never an EOS.

    A chat template writes BOS itself, so nothing is added to its text. Otherwise BOS is put in front if and
    only if that is what this tokenizer does with any text.
    """
    if not texts:
        return []
    # Without special tokens: the tokenizer would add an EOS, or a second BOS.
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    bos = tokenizer.bos_token_id
    if template != "chat" and bos is not None and tokenizer("a").input_ids[0] == bos:
        return [[bos, *row] for row in ids]
    return ids


def encode(
    rows: list[tuple[str, dict]],
    tokenizer,
    template: str,
    instruction: str | None,
    span: str,        # "step": one step after the shared ones; "solution": all that follows + EOS (plain DPO)
    max_length: int,  # tokens of prefix + longer branch; a longer pair is dropped, never truncated
) -> tuple[list[Pair], dict[str, list[str]]]:
    """Pairs of token ids, and the places of the rows that were dropped, by the reason.

    A step is *not* followed by an end-of-sequence token: it is not the end of the answer. Prefix and step are
    tokenized together, as the model saw them when it wrote them; the shared prefix is what both results have
    in common with the prefix tokenized alone, so no merge across the boundary is invented or lost.
    Raises InputError that lists the first bad rows, and if more than a fifth of the rows cannot teach.
    """
    _refuse_bad_rows(rows, span)
    if span == "solution" and tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: --span solution ends with EOS, "
                         "but the tokenizer has no eos_token")
    end = [tokenizer.eos_token_id] if span == "solution" else []

    texts = []  # of each row three: the prefix, prefix + chosen, prefix + rejected
    for _, row in progress(rows, f"template {template}"):
        steps = row["initial_reason_steps"]
        prefix = open_turn(tokenizer, prompt_of(row), template, instruction) + steps
        texts.append(prefix)
        for name in SPANS[span]:
            # A full solution may repeat the steps it goes on from.
            branch = row[name].removeprefix(steps) if span == "solution" else row[name]
            texts.append(prefix + branch)
    ids = tokenize(tokenizer, texts, template)  # in one call, because fast tokenizers then use all cores

    pairs, dropped = [], {}
    for i, (where, row) in enumerate(rows):
        prefix, chosen, rejected = ids[3 * i:3 * i + 3]
        # Where the tokenizer merges across the boundary, the prefix ends earlier, and the steps begin there.
        shared = _common_length(prefix, chosen, rejected)
        pair = Pair(chosen[:shared], chosen[shared:] + end, rejected[shared:] + end, where)
        length = len(pair.prefix) + max(len(pair.chosen), len(pair.rejected))

        reason = _why_it_cannot_teach(row, pair, span)
        if not reason and length > max_length:
            reason = f"longer than --max-length {max_length}"
            where = f"{where}: {length} tokens"
        if reason:
            dropped.setdefault(reason, []).append(where)
        else:
            pairs.append(pair)

    _refuse_too_few(len(rows), len(pairs), dropped)
    return pairs, dropped


def is_one_message(prompt: list) -> bool:
    """Whether it is a list of one message of the user, as chat data sets have prompts."""
    return [isinstance(turn, dict) and turn.get("role") for turn in prompt] == ["user"]


def prompt_of(row: dict) -> str:
    """The problem: `prompt` is its text, or a list of one message of the user."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def _refuse_bad_rows(rows: list[tuple[str, dict]], span: str) -> None:
    problems = []
    for where, row in rows:
        problem = _what_is_wrong(row, span)
        if problem:
            problems.append(f"{where}: {problem}")
    if problems:
        more = "\n  ..." if len(problems) > 5 else ""
        raise InputError(f"{len(problems)} of {len(rows)} rows cannot be trained on:\n  "
                         + "\n  ".join(problems[:5]) + more)


def _what_is_wrong(row: dict, span: str) -> str | None:
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
    return None


def _why_it_cannot_teach(row: dict, pair: Pair, span: str) -> str | None:
    for name, ids in zip(SPANS[span], (pair.chosen, pair.rejected), strict=True):
        if not row[name].strip() or not ids:
            return f"{name!r} is empty"
    if not pair.prefix:
        return "nothing comes before the steps"
    chosen, rejected = (row[name].strip() for name in SPANS[span])
    if chosen == rejected or pair.chosen == pair.rejected:
        return f"{' equals '.join(map(repr, SPANS[span]))}, so there is nothing to prefer"
    return None


def _refuse_too_few(rows: int, pairs: int, dropped: dict[str, list[str]]) -> None:
    reasons = "; ".join(f"{len(places)} {reason} (first: {places[0]})" for reason, places in dropped.items())
    cannot_teach = sum(len(places) for reason, places in dropped.items() if "--max-length" not in reason)
    if cannot_teach > rows / 5:
        raise InputError(f"{cannot_teach} of {rows} rows cannot be trained on, more than a fifth: {reasons}")
    if not pairs:
        raise InputError(f"no pair of {rows} is left: {reasons}")


def _common_length(*sequences: list[int]) -> int:
    """Length of the longest prefix that all sequences have in common."""
    for i, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return i
    return min(map(len, sequences))


def marked_text(pair: Pair, tokenizer) -> str:
    """The pair as text, exactly as it is trained on, with the two spans marked."""
    prefix, chosen, rejected = map(tokenizer.decode, pair[:3])
    return f"{prefix}[[chosen>{chosen}<]][[rejected>{rejected}<]]"


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Hash of all token ids: of the data, template, instruction, span and tokenizer at once."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in pair[:3]:
            digest.update(np.asarray([len(ids), *ids], np.int64).tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------- the plan of a run, packing


def steps_per_epoch(pairs: int, batch_size: int) -> int:
    """Optimizer steps of an epoch, so many that no step is a small leftover: the paper's 10,795 pairs at
    batch size 128 give 84 steps of 128 or 129 pairs."""
    return max(1, round(pairs / batch_size))


def indices_of_step(step: int, pairs: int, batch_size: int, seed: int) -> np.ndarray:
    """The pairs of an optimizer step: every pair exactly once per epoch, in a new order each epoch."""
    steps = steps_per_epoch(pairs, batch_size)
    epoch, step_of_epoch = divmod(step, steps)
    # Seeded by epoch, so that a run that resumes need not replay the random numbers before it.
    order = np.random.default_rng((seed, epoch)).permutation(pairs)
    return np.array_split(order, steps)[step_of_epoch]


def split(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Cut one global batch into micro-batches of at most `budget` tokens: result[m][r] lists rank r's items.

    Longest first into the emptiest bin; then bins of like size are dealt to the ranks together, so that in
    every micro-batch all ranks have about the same work. All ranks compute the same plan, so no messages are
    needed. With more ranks than items some lists are empty.
    Raises ValueError if one item alone exceeds the budget.
    """
    if max(lengths) > budget:
        raise ValueError(f"every length must be <= budget {budget}, got {max(lengths)}")
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # Begin with the fewest micro-batches that could do, and take more until all fits.
    count = math.ceil(sum(lengths) / (budget * ranks))

    while True:
        bins: list[list[int]] = [[] for _ in range(count * ranks)]
        loads = [(0, b) for b in range(len(bins))]  # a heap: the emptiest bin is at its top
        for i in longest_first:
            load, b = heapq.heappop(loads)
            bins[b].append(i)
            heapq.heappush(loads, (load + lengths[i], b))
        if max(loads)[0] <= budget:
            break
        count += 1 + count // 50  # by 2%: one by one takes minutes where two items seldom share a bin

    loads.sort(key=lambda item: (-item[0], item[1]))
    fullest_first = [bins[b] for _, b in loads]
    return [fullest_first[m * ranks:(m + 1) * ranks] for m in range(count)]


class Segments(NamedTuple):
    """How a row of L tokens is cut into S segments that attend each by itself.

    The queries of a segment stand together in the row, one segment after the other. Its keys, gathered from
    the row by `key_index`, are those of its prefix (if it has one) and then its own.
    """

    query_lengths: list[int]  # (S,), adding up to L
    key_lengths: list[int]    # (S,), adding up to K
    key_index: Tensor         # (K,) int64: places in the row
    query_offsets: Tensor     # (S + 1,) int32: where each segment's queries begin, and L
    key_offsets: Tensor       # (S + 1,) int32: where each segment's keys begin among the K, and K


class Batch(NamedTuple):
    """B pairs in one row of L tokens, with T trained tokens."""

    input_ids: Tensor     # (1, L) int64
    position_ids: Tensor  # (1, L) int64
    segments: Segments
    predict_at: Tensor    # (T,) int64: the place whose hidden state predicts the token
    targets: Tensor       # (T,) int64: the token
    step: Tensor          # (T,) int64: the step it belongs to: i the chosen of pair i, B + i its rejected
    pairs: int            # B

    def to(self, device: torch.device) -> "Batch":
        return pytree.tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), self)


def pack(pairs: Sequence[Pair], share_prefix: bool = True) -> Batch:
    """Lay pairs out in one row.

    With `share_prefix` a pair is three segments: prefix, chosen, rejected. Without, it is two plain
    sequences, prefix + chosen and prefix + rejected. No pairs give one token that nothing is trained on,
    because under FSDP every rank must run the layers whenever one does.
    """
    ids, positions, key_index, query_lengths, key_lengths = [], [], [], [], []
    predict_at, targets, step_of = [], [], []

    def add_segment(tokens: list[int], position: int, prefix: range) -> range:
        """Append tokens that see the prefix and, causally, each other. Returns their places in the row."""
        own = range(len(ids), len(ids) + len(tokens))
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        key_index.extend([*prefix, *own])
        query_lengths.append(len(own))
        key_lengths.append(len(prefix) + len(own))
        return own

    for i, pair in enumerate(pairs):
        begin = len(pair.prefix)  # the position of both steps
        shared = add_segment(pair.prefix, 0, range(0)) if share_prefix else None

        for number, step in ((i, pair.chosen), (len(pairs) + i, pair.rejected)):
            if share_prefix:
                prefix, own = shared, add_segment(step, begin, shared)
            else:
                whole = add_segment(pair.prefix + step, 0, range(0))
                prefix, own = whole[:begin], whole[begin:]
            predict_at += [prefix[-1], *own[:-1]]  # the token before it predicts a token
            targets += step
            step_of += [number] * len(step)

    if not pairs:
        add_segment([0], 0, range(0))

    segments = Segments(query_lengths, key_lengths, torch.tensor(key_index),
                        _offsets(query_lengths), _offsets(key_lengths))
    row = torch.tensor([ids, positions])
    spans = torch.tensor([predict_at, targets, step_of]).long()  # empty lists would be float
    return Batch(row[:1], row[1:], segments, *spans, len(pairs))


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
