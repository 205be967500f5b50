"""Step pairs: what they are, how they become tokens, and how a batch shares its prefixes.

One row, in the format of Math-Step-DPO-10K (eight text fields; `chosen` and `rejected` are single steps):

    {"dataset": "gsm8k", "prompt": "Tom has 3 boxes of 4 pens and gives 5 pens away. How many pens are left?",
     "initial_reason_steps": "Let's think step by step.\\nStep 1: 3 boxes hold 3 * 4 = 12 pens.\\nStep 2:",
     "chosen": " After giving 5 away, 12 - 5 = 7 pens are left.", "rejected": " 12 + 5 = 17 pens are left.",
     "full_chosen": "... and everything after it", "full_rejected": "...", "answer": "7"}

One pair in a row of tokens. Chosen and rejected share all that comes before them, so that is laid out once:

    token      <user> Tom has ... <assistant> Let's ... Step 2 : | After giving ... left . | 12 + 5 ... left .
    branch     0 ---------------------- prefix --------------- 0 | 1 ----- chosen ------ 1 | 2 - rejected -- 2
    position   0 1 2 ...                                     P-1 | P P+1 ...               | P P+1 ...

A token attends to earlier tokens of its own pair that are in the prefix or in its own branch. So each branch
sees exactly what it would see alone, and the last prefix token predicts the first token of both. Many pairs
stand in one row.
"""

import hashlib
import heapq
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
TEMPLATES = ("chat", "alpaca", "deepseek-math")
SPANS = {"step": ("chosen", "rejected"), "solution": ("full_chosen", "full_rejected")}


class InputError(ValueError):
    """Bad input: the message says where and what to do. The command lines print it without a stack trace."""


# ---------------------------------------------------------------------------------------------------- reading


def read_rows(path: str) -> list[tuple[str, dict]]:
    """Rows of a .jsonl, .json (one list), .parquet file, or of the training split of a hub dataset.

    Returns (where, row) pairs; where is "file:line" (or "file: row n") for messages about that row.
    Raises InputError naming file and line for what is not UTF-8, not JSON or not an object.
    """
    if path.endswith(".jsonl"):
        lines = _read_bytes(path).split(b"\n")
        rows = [(f"{path}:{n}", _parse(f"{path}:{n}", line))
                for n, line in enumerate(lines, 1) if line.strip()]
    elif path.endswith(".json"):
        parsed = _parse(path, _read_bytes(path))
        if not isinstance(parsed, list):
            raise InputError(f"{path}: must be one JSON list of rows, got {type(parsed).__name__}; "
                             "one object per line is called .jsonl")
        rows = [(f"{path}: row {n}", row) for n, row in enumerate(parsed, 1)]
    elif path.endswith(".parquet") or re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.exists(path):
        rows = [(f"{path}: row {n}", row) for n, row in enumerate(_read_with_datasets(path), 1)]
    else:
        raise InputError(f"{path}: must be a .jsonl, .json or .parquet file or a hub dataset (owner/name)")
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be a JSON object, got {type(row).__name__}")
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def _read_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _parse(where: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        line = where if where[-1].isdigit() else f"{where}:{error.lineno}"
        raise InputError(f"{line}: not valid JSON: {error.msg} at column {error.colno}") from None


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
        return len(self.prefix) * (1 if share_prefix else 2) + len(self.chosen) + len(self.rejected)


def open_turn(tokenizer, prompt: str, template: str, instruction: str | None = None) -> str:
    """The text before the model's answer, up to the first step. `instruction` None is the template's own."""
    if template == "alpaca":
        user = f"{prompt}\n{instruction}" if instruction else prompt
        return ("Below is an instruction that describes a task. "
                "Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{user}\n\n### Response:\n")
    instruction = INSTRUCTION if instruction is None else instruction
    user = f"{prompt}\n{instruction}" if instruction else prompt
    if template == "deepseek-math":
        return f"User: {user}\n\nAssistant: "
    if template != "chat":
        raise InputError(f"--template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; pass "
                         "--template alpaca or --template deepseek-math, whichever the model was tuned with")
    turn = [{"role": "user", "content": user}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def tokenize(tokenizer, texts: Sequence[str], template: str) -> list[list[int]]:
    """Token ids of each text, with BOS exactly where the model has it and never an EOS.

    A chat template writes BOS itself, so nothing is added to its text. Otherwise BOS is put in front if and
    only if that is what this tokenizer does with any text.
    """
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else []
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
) -> tuple[list[Pair], list[str]]:
    """Pairs of token ids, and one message for each pair that was dropped because it is too long.

    A step is *not* followed by an end-of-sequence token: it is not the end of the answer. Prefix and step are
    tokenized together, as the model saw them when it wrote them; the shared prefix is what both results have
    in common with the prefix tokenized alone, so no merge across the boundary is invented or lost.
    Raises InputError that lists the first bad rows.
    """
    problems = [problem for where, row in rows if (problem := _bad_row(where, row, span))]
    if problems:
        raise InputError(f"{len(problems)} of {len(rows)} rows cannot be trained on:\n  "
                         + "\n  ".join(problems[:5]) + ("\n  ..." if len(problems) > 5 else ""))
    if span == "solution" and tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: --span solution ends with EOS, "
                         "but the tokenizer has no eos_token")

    texts = []
    for _, row in rows:
        steps = row["initial_reason_steps"]
        prefix = open_turn(tokenizer, row["prompt"], template, instruction) + steps
        texts += [prefix, *(prefix + row[field].removeprefix(steps) for field in SPANS[span])]
    ids = tokenize(tokenizer, texts, template)

    pairs, dropped = [], []
    for (where, _), prefix, chosen, rejected in zip(rows, ids[0::3], ids[1::3], ids[2::3], strict=True):
        shared = _common(prefix, chosen, rejected)
        end = [tokenizer.eos_token_id] if span == "solution" else []
        pair = Pair(chosen[:shared], chosen[shared:] + end, rejected[shared:] + end, where)
        if not pair.prefix or pair.chosen == pair.rejected:
            raise InputError(
                f"{where}: {'chosen and rejected become the same' if pair.prefix else 'no prefix in'} tokens")
        length = max(len(chosen), len(rejected)) + len(end)
        if length > max_length:
            dropped.append(f"{where}: {length} tokens")
        else:
            pairs.append(pair)
    if not pairs:
        raise InputError(f"all {len(dropped)} pairs are longer than --max-length {max_length} "
                         f"(first: {dropped[0]})")
    return pairs, dropped


def _bad_row(where: str, row: dict, span: str) -> str | None:
    names = ("prompt", "initial_reason_steps", *SPANS[span])
    for name in names:
        if name not in row:
            return f"{where}: has no field {name!r}; a row needs {', '.join(names)}"
        if not isinstance(row[name], str):
            return f"{where}: {name!r} must be text, got {type(row[name]).__name__}"
        if not row[name].strip() and name != "initial_reason_steps":
            return f"{where}: {name!r} is empty; remove the row or fill it in"
    if row[names[2]].strip() == row[names[3]].strip():
        return f"{where}: {names[2]!r} equals {names[3]!r}, so there is nothing to prefer; remove the row"
    return None


def _common(*sequences: list[int]) -> int:
    """Length of the longest prefix that all sequences have in common."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)


def marked(pair: Pair, tokenizer) -> str:
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


# ------------------------------------------------------------------------------------------- plan and packing


def schedule(pairs: int, batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """The pair indices of each optimizer step: every pair exactly once per epoch, in a new order each epoch.

    An epoch is cut into round(pairs / batch_size) batches that differ by at most one pair, so that no step is
    a small leftover: the paper's 10,795 pairs at batch size 128 give 84 steps of 128 or 129 pairs.
    """
    steps = max(1, round(pairs / batch_size))
    orders = [np.random.default_rng((seed, epoch)).permutation(pairs) for epoch in range(epochs)]
    return [batch for order in orders for batch in np.array_split(order, steps)]


def split(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Cut one global batch into micro-batches of at most `budget` tokens: result[m][r] lists rank r's items.

    Longest first into the emptiest bin; then bins of like size are dealt to the ranks together, so that in
    every micro-batch all ranks have about the same work. All ranks compute the same plan, so no messages are
    needed. With more ranks than items some lists are empty.
    Raises ValueError if one item alone exceeds the budget.
    """
    if max(lengths) > budget:
        raise ValueError(f"every length must be <= budget {budget}, got {max(lengths)}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for count in range(-(-sum(lengths) // (budget * ranks)), len(lengths) + 1):
        bins: list[list[int]] = [[] for _ in range(count * ranks)]
        loads = [(0, b) for b in range(len(bins))]
        for i in order:
            load, b = heapq.heappop(loads)
            bins[b].append(i)
            heapq.heappush(loads, (load + lengths[i], b))
        if max(loads)[0] <= budget:
            break
    loads.sort(key=lambda item: (-item[0], item[1]))
    return [[bins[b] for _, b in loads[m * ranks:(m + 1) * ranks]] for m in range(count)]


@dataclass
class Batch:
    """B pairs in one row of L tokens, with T trained tokens. Padding, if any, is a document of its own."""

    input_ids: torch.Tensor     # (1, L) int64
    position_ids: torch.Tensor  # (1, L) int64
    document: torch.Tensor      # (L,) int64: tokens of different documents do not see each other
    branch: torch.Tensor        # (L,) int64: 0 prefix, 1 chosen, 2 rejected
    predict_at: torch.Tensor    # (T,) int64: the position whose hidden state predicts the token
    targets: torch.Tensor       # (T,) int64: the token
    sequence: torch.Tensor      # (T,) int64: the logp it adds to: i for the chosen of pair i, B + i rejected
    pairs: int                  # B
    tokens: int                 # L without padding

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v
                        for k, v in moved.items()})


def pack(pairs: Sequence[Pair], share_prefix: bool = True, multiple_of: int = 1) -> Batch:
    """Lay pairs out in one row, padded to a multiple of `multiple_of` tokens. No pairs give a row of padding.

    With `share_prefix` a pair is one document [prefix | chosen | rejected]; without, it is two plain causal
    documents [prefix | chosen] and [prefix | rejected].
    """
    ids, positions, documents, branches = [], [], [], []
    predict_at, targets, sequence = [], [], []
    document = -1

    def add(tokens: list[int], position: int, branch: int) -> int:
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        documents.extend([document] * len(tokens))
        branches.extend([branch] * len(tokens))
        return len(ids) - len(tokens)

    for i, pair in enumerate(pairs):
        for branch, step in ((1, pair.chosen), (2, pair.rejected)):
            if branch == 1 or not share_prefix:
                document += 1
                last = add(pair.prefix, 0, 0) + len(pair.prefix) - 1
            first = add(step, len(pair.prefix), branch)
            predict_at += [last, *range(first, first + len(step) - 1)]
            targets += step
            sequence += [(branch - 1) * len(pairs) + i] * len(step)

    tokens = len(ids)
    document += 1
    add([0] * (-tokens % multiple_of if tokens else max(multiple_of, 1)), 0, 0)
    row = torch.tensor([ids, positions, documents, branches]).long()
    spans = torch.tensor([predict_at, targets, sequence]).long()  # empty lists would be float
    return Batch(row[:1], row[1:2], row[2], row[3], *spans, len(pairs), tokens)


def may_attend(batch: Batch, window: int | None = None) -> Callable[..., torch.Tensor]:
    """The attention rule of a packed row, as a function (batch, head, query index, key index) -> bool tensor.

    `window`: also at most window - 1 positions back (sliding window, counted in the pair's own positions).
    """
    document, branch, position = batch.document, batch.branch, batch.position_ids[0]

    def rule(b, h, query, key):
        same = (key <= query) & (document[query] == document[key])
        seen = same & ((branch[key] == 0) | (branch[key] == branch[query]))
        return seen if window is None else seen & (position[query] - position[key] < window)

    return rule
