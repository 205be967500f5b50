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

import argparse
import fcntl
import hashlib
import heapq
import http.client
import importlib.util
import json
import os
import random
import re
import select
import shlex
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise InputError(f"{where}: not a row: {error}") from None


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
        repeated = steps if span == "solution" else ""  # a full solution may repeat the steps it goes on from
        texts += [prefix, *(prefix + row[name].removeprefix(repeated) for name in SPANS[span])]
    ids = tokenize(tokenizer, texts, template)

    pairs, dropped = [], []
    for (where, _), prefix, chosen, rejected in zip(rows, ids[0::3], ids[1::3], ids[2::3], strict=True):
        shared = _common(prefix, chosen, rejected)
        end = [tokenizer.eos_token_id] if span == "solution" else []
        pair = Pair(chosen[:shared], chosen[shared:] + end, rejected[shared:] + end, where)
        if not all(pair[:3]) or pair.chosen == pair.rejected:
            raise InputError(f"{where}: as tokens, the prefix, {' or '.join(SPANS[span])} is empty, or the "
                             "last two are equal; remove the row")
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
        if re.search("[\ud800-\udfff]", row[name]):
            return f"{where}: {name!r} has half a character (a lone surrogate); remove the row or repair it"
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
    count = -(-sum(lengths) // (budget * ranks))
    while True:
        bins: list[list[int]] = [[] for _ in range(count * ranks)]
        loads = [(0, b) for b in range(len(bins))]
        for i in order:
            load, b = heapq.heappop(loads)
            bins[b].append(i)
            heapq.heappush(loads, (load + lengths[i], b))
        if max(loads)[0] <= budget:
            break
        count += 1 + count // 50  # by 2%: one by one takes minutes where two items seldom share a bin
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


# ================================================================================== second half: making pairs
#
#   solve    problems -> solutions.jsonl  a graded solution per row: prompt, answer, solution, correct, ...
#   locate            -> located.jsonl    the wrong ones with `step`, the first wrong one, or why none is
#   rectify           -> pairs.jsonl      pairs as at the top of this file
#
# Every sampled continuation and every reply of a judge is appended to a ledger under what was asked; all the
# rest is a pure function of those. So any stage, stopped at any point, replays what it knows and goes on.

STEP_PREFIX = "Let's think step by step.\nStep 1:"
FORMATS = """GSM8K: question, answer (ends in "#### N")
  MATH: problem, and answer or solution (ends in \\boxed{})
  Step-DPO's test files: instruction, answer (a list)
  AQuA: question, options, correct
  plain: prompt, answer"""
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun


def content_key(*parts: str) -> str:
    """The identity of a row: 64 bits of SHA-256, in hex."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def read_problems(path: str) -> list[dict]:
    """Problems as {dataset, prompt, answer, reference}; reference is a worked solution or None. One that is
    there twice counts once. Raises InputError naming file and line; for an unknown format it lists the known
    ones."""
    problems = {}
    for where, row in read_rows(path):
        reference = row.get("solution") or row.get("output") or row.get("rationale")
        prompt = next((row[n] for n in ("question", "problem", "instruction", "prompt") if n in row), None)
        if "question" in row and "options" in row and "correct" in row:
            options = [re.sub(r"^\s*\(?([A-Z])\s*\)\s*", r"(\1) ", str(option)) for option in row["options"]]
            prompt, answer = f"{prompt}\nAnswer choices: {' '.join(options)}", row["correct"]
        elif "question" in row and "answer" in row:
            reference, mark, answer = str(row["answer"]).rpartition("####")
            if not mark:
                raise InputError(f'{where}: "answer" must end in "#### N", as in GSM8K; for a bare answer '
                                 'name the fields "prompt" and "answer"')
        elif "problem" in row and "solution" in row and "answer" not in row:
            answer = extract_answer(str(reference))
        elif prompt is not None and "answer" in row:
            answer = row["answer"]
            answer = ", ".join(map(str, answer)) if isinstance(answer, list) else answer
        else:
            raise InputError(f"{where}: unknown format ({', '.join(row) or 'empty'}); known are\n  {FORMATS}")
        if not isinstance(prompt, str) or not prompt.strip() or answer is None or not str(answer).strip():
            raise InputError(f"{where}: the problem or its answer is missing or empty")
        name = str(row.get("dataset") or os.path.basename(path).split(".")[0])
        problems.setdefault(prompt, dict(dataset=name, prompt=prompt, answer=str(answer).strip(),
                                         reference=str(reference).strip() if reference else None))
    return list(problems.values())


Steps = list[tuple[int, int]]  # of each: where its line begins, and where its text does, behind `Step k:`


def find_steps(solution: str) -> Steps | None:
    """A step runs to the next line that begins `Step k:`; a step mentioned within a line is text.

    None if the lines that look like the beginning of a step are not exactly `Step 1:` .. `Step n:`, or if a
    step is empty: no guessing.
    """
    steps: Steps = []
    for found in re.finditer(r"^[^\w\n]*step[ \t]*\d+[^\w\n]*?[:.)]", solution, re.M | re.I):
        heading = re.compile(rf"[ \t]*Step {len(steps) + 1}:").match(solution, found.start())
        if heading is None or steps and not solution[steps[-1][1]:found.start()].strip():
            return None
        steps.append((found.start(), heading.end()))
    return steps if steps and solution[steps[-1][1]:].strip() else None


def step_text(solution: str, steps: Steps, k: int) -> str:
    """Text of step k (1..n): from the space after `Step k:` up to, without, the line break at its end."""
    return solution[steps[k - 1][1]:steps[k][0] if k < len(steps) else None].rstrip()


# ---------------------------------------------------------------------------------------------------- grading
# Text, then exact fractions, then (rarely, if installed) symbols. Nothing approximates: 0.0005 is not 0.001,
# 50 is not 0.5, [0,1) is not (0,1), and a text that was cut off before its answer has none.

NO_UNITS = {"dozen", "score", "hundred", "thousand", "million", "billion", "trillion", "half", "third",
            "quarter", "sin", "cos", "tan", "log"}
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"^\s*\$(.*)\$\s*$|^\s*\\[(\[](.*)\\[)\]]\s*$", r"\1\2"), ("\u2212", "-"), ("\u00b2", "^2"),
    ("\u00b3", "^3"), ("\u03c0", r"\\pi"), ("\u221e", r"\\infty"), ("\u222a", r"\\cup "), (r"\\\$", "$"),
    (r"\\%", "%"),
    (r"\\(?:text\w*|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]|\{,\}|[~\u00a0\u00b0]|\^\s*\{?\\circ\}?", " "),
    (r"\\cdot|\\times|\u00d7", "*"), (r"\\[dt]frac", r"\\frac"), (r"\\(frac|sqrt)\s*(\w)", r"\\\1{\2}"),
    (r"(\\frac\s*\{\w\})\s*(\w)", r"\1{\2}"), (r"^\s*\$\s*(-?[\d.,]+)\s*$", r"\1 dollars"), (r"\$", ""),
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda found: found[0].replace(",", "")), (r"\s+", " "))]


def extract_answer(solution: str) -> str | None:
    r"""The last \boxed{...}, braces matched; else what follows the last "answer is" or "####" on its line."""
    if boxes := list(re.finditer(r"\\(?:boxed|fbox)\s*(\{?)", solution)):
        rest, depth = solution[boxes[-1].end():], 1
        if not boxes[-1][1]:
            return rest.split()[0].strip("$.,") or None if rest.strip() else None
        for token in re.finditer(r"\\.|[{}]", rest, re.S):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                return rest[:token.start()].strip() or None
        return None  # cut off inside the box
    if not (marks := list(re.finditer(r"answer is\b|####", solution, re.I))):
        return None
    line = solution[marks[-1].end():].split("\n")[0].strip(" \t:*")
    return re.split(r"[.!?](?:\s|$)", line)[0].strip(" \t*") or None


def is_correct(solution: str, answer: str) -> bool:
    """Whether the solution's final answer is `answer`. One capital letter A-E is graded as a multiple
    choice."""
    guess, answer = extract_answer(solution), extract_answer(answer) or answer
    if guess is None:
        return False
    if choice := re.fullmatch(r"\s*\(?([A-E])\)?\s*", answer):
        guess = re.sub(r"\\text\w*|\\math\w+|[{}$*]|^\s*(?:option|choice)\b", "", guess, flags=re.I).strip()
        letter = re.match(r"\(([A-Ea-e])\)|([A-E])(?=\s*[).:,]|$)|([a-e])$", guess)
        return bool(letter) and letter[letter.lastindex].upper() == choice[1]
    for pattern, new in REWRITES:
        guess, answer = (pattern.sub(new, text.strip().rstrip(".")) for text in (guess, answer))
    return _same(guess.strip(), answer.strip())


def _number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction, mixed number or a * 10^b; None for anything else."""
    n = r"(-?(?:\d{1,60}\.?\d{0,60}|\.\d{1,60}))"
    text = re.sub(rf"\\frac\s*\{{\s*{n}\s*\}}\s*\{{\s*{n}\s*\}}", r" \1/\2", text).strip(" +")
    text = re.sub(r"^-\s+", "-", text)
    if mixed := re.fullmatch(r"(-?)(\d{1,60}) (\d{1,60}) ?/ ?(0*[1-9]\d{0,60})", text):
        return (int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))) * (-1 if mixed[1] else 1)
    if scaled := re.fullmatch(rf"{n} ?\* ?10 ?\^ ?\{{?(-?\d\d?)\}}?", text):
        return Fraction(scaled[1]) * Fraction(10) ** int(scaled[2])
    ratio = re.fullmatch(rf"{n}(?: ?/ ?{n})?", text)
    return Fraction(ratio[1]) / Fraction(ratio[2] or 1) if ratio and Fraction(ratio[2] or 1) else None


def _split_unit(text: str) -> tuple[str, str]:
    """("12.5", "mile per hour") of "12.5 miles per hour"; a multiplier such as "million" is not a unit."""
    unit = r"(?:[a-zA-Z]{2,}|[mghslL])(?:[ /]+[a-zA-Z]+){0,3}(?: ?\^ ?\{?[23]\}?)?"
    found = re.fullmatch(rf"(.*\d\}}?)(?: ?(%|percent)|\s({unit}))", text)
    if not found or NO_UNITS & set(found[0].lower().split()):
        return text, ""
    words = re.sub(r"[{} ]+", " ", found[3] or "%").lower().split()
    return found[1], " ".join(word.rstrip("s") for word in words)


def _members(text: str) -> tuple[str, list[str]]:
    """(brackets, members) of a tuple, interval or set; a bare list counts as a set. ("", [text]) of a single
    value."""
    text, parts, depth = re.sub(r"\\([{}])", r"\1", text), [""], 0
    for token in re.findall(r"\\[a-zA-Z]+|\s(?:or|and)\s|.", text):
        depth += (token in "([{") - (token in ")]}")
        if depth == 0 and token.strip() in (",", r"\cup", "or", "and"):
            parts.append("")
        else:
            parts[-1] += token
    if len(parts) > 1:
        return "{}", [part.strip() for part in parts]
    if re.fullmatch(r"[(\[{].*,.*[)\]}]", text) and len(inner := _members(text[1:-1])[1]) > 1:
        return text[0] + text[-1], inner
    return "", [text[1:-1] if re.fullmatch(r"\([^()]*\)", text) else text]


def _same(guess: str, answer: str) -> bool:
    """Whether two answers, rewritten, are the same value."""
    (guess, unit), (answer, wanted) = _split_unit(guess), _split_unit(answer)
    name, asked = (re.match(r"(?:[a-zA-Z](?:\([a-z]\))? ?= ?)?", text)[0] for text in (guess, answer))
    if unit and wanted and unit != wanted or name and asked and name.strip() != asked.strip():
        return False
    guess, answer = guess[len(name):], answer[len(asked):]
    if guess.lower().replace(" ", "") == answer.lower().replace(" ", ""):
        return bool(guess)
    (brackets, left), (wanted, right) = _members(guess), _members(answer)
    if brackets != wanted or len(left) != len(right):
        return False
    if brackets == "{}":
        matches = ([b for b in right if _same(a, b)] for a in left)
        return all(matches) and all(any(_same(a, b) for a in left) for b in right)
    if brackets:
        return all(map(_same, left, right))
    numbers = _number(left[0]), _number(right[0])
    if None not in numbers:
        return numbers[0] == numbers[1]
    # Words and numerals of other bases are not formulas: symbolically, "east" and "seat" would be one
    # product.
    bare = re.sub(r"\\[a-zA-Z]+", "", left[0] + right[0])
    return not re.search(r"[a-zA-Z]{3}|[_%=<>]|[^\x00-\x7f]", bare) and _same_formula(left[0], right[0])


WORKER = """import json, sys
from math_verify import parse, verify
for line in sys.stdin:
    answer, guess = (parse("$" + text + "$", parsing_timeout=3) for text in json.loads(line))
    print(json.dumps(bool(answer and guess and verify(answer, guess, timeout_seconds=3))), flush=True)"""
_worker, _worker_lock = None, threading.Lock()


def _same_formula(guess: str, answer: str, seconds: float = 15) -> bool:
    """Asks math-verify in a process of its own: it ends endless computations by SIGALRM, which works in a
    main thread only; what that does not end is ended here. False without the package, which is said once."""
    global _worker
    with _worker_lock:
        if _worker is None and importlib.util.find_spec("math_verify") is None:
            _worker = False
            print("data.py: answers are compared as text and numbers only, not as formulas (that would need: "
                  "pip install math-verify antlr4-python3-runtime==4.13.2)", file=sys.stderr)
        if _worker is None:
            _worker = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if not _worker:
            return False
        with suppress(BrokenPipeError):
            _worker.stdin.write(json.dumps([answer, guess]).encode() + b"\n")
            _worker.stdin.flush()
            if select.select([_worker.stdout], [], [], seconds)[0] and (line := _worker.stdout.readline()):
                return json.loads(line)
        _worker.kill()
        _worker.communicate()
        _worker = None
        return False


# ----------------------------------------------------------------------------------------------------- ledger


class Ledger:
    """A JSONL file that grows batch by batch, through any number of stops, and by several processes at once.

    `rows` maps (id, sample) to the row. FILE.meta.json says what the rows were made with; another model,
    template or setting is an error, never a mixture. The ranks of torchrun append to one file under a lock
    (on one host, or on a file system with locks). A last line torn by kill -9 is removed.
    """

    def __init__(self, path: str, **made_with: Any):
        self.path, self.rows, self.offset, self.lines = path, {}, 0, 0
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with self._locked() as file:
            known, empty = made_with_of(path), os.fstat(file.fileno()).st_size == 0
            if known is None and not empty:
                raise InputError(f"{path}: without {path}.meta.json it is unknown what it was made with; "
                                 "choose another --out, or remove the file")
            for name, value in made_with.items() if not empty else ():
                if known.get(name) != value:
                    raise InputError(f"{path}: was made with {name} = {known.get(name)!r}, and this is "
                                     f"{value!r}; use the same setting to continue it, or another --out")
            if empty:
                write_whole(f"{path}.meta.json", json.dumps(made_with, indent=1) + "\n")
        self.refresh()

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def refresh(self) -> None:
        """Take in what is new in the file, from whatever process."""
        with self._locked() as file:
            file.seek(self.offset)
            new = file.read()
            whole = new.rfind(b"\n") + 1
            if whole < len(new):  # we hold the lock, so nobody is writing: this line will never be finished
                file.truncate(self.offset + whole)
        for line in new[:whole].splitlines():
            self.lines += 1
            row = _parse(f"{self.path}:{self.lines}", line)
            self.rows.setdefault((row["id"], row["sample"]), row)
        self.offset += whole

    def append(self, rows: list[dict]) -> None:
        with self._locked() as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.refresh()

    def wait(self, keys: Iterable) -> list[dict]:
        """The rows of all keys, once the other ranks have written theirs. (If one dies, torchrun ends
        all.)"""
        keys = list(keys)
        while not self.rows.keys() >= set(keys):
            if WORLD == 1:
                raise RuntimeError(f"{self.path}: rows are missing that should have been made")
            time.sleep(0.5)
            self.refresh()
        return [self.rows[key] for key in keys]


def made_with_of(path: str) -> dict | None:
    meta = f"{path}.meta.json"
    return _parse(meta, _read_bytes(meta)) if os.path.exists(meta) else None


def write_whole(path: str, text: str) -> None:
    """Write a file so that it is there completely or not at all."""
    with open(f"{path}.writing", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def model_identity(path: str) -> str:
    """The name of a hub model; of a folder, a hash of 256 kB samples of its weight files, config and
    tokenizer."""
    if not os.path.isdir(path):
        return path
    digest = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        if name.endswith((".safetensors", ".bin")) or name in ("config.json", "tokenizer.json"):
            with open(os.path.join(path, name), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                for i in range(256):
                    file.seek(i * size // 256)
                    digest.update(file.read(1024))
    return f"sha256:{digest.hexdigest()[:16]}"


# --------------------------------------------------------------------------------------------------- sampling
# A sampler has one method: sample(wanted) takes pairs of prompt ids and the name of the sample, and yields
# lists of (index in wanted, Continuation) as they are made. Equal names give equal samples.


class Continuation(NamedTuple):
    text: str
    tokens: int
    cut: bool  # ended by --max-new-tokens, not by the model


class Local:
    """Samples with a model in this process.

    Each sample draws from random numbers of its own, by its name; so it depends neither on the rest of the
    batch nor on stops in between (up to rounding). Equal prompts are prefilled once, and what has ended
    leaves the batch.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Any):
        from transformers import AutoModelForCausalLM
        cuda = torch.cuda.is_available()
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
        dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(self.device).eval()
        ends = self.model.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.args, self.tokenizer = args, tokenizer
        self.budget = args.batch_tokens or (131072 if cuda else 16384)
        self.warn = cache(lambda text: tqdm.write(text, file=sys.stderr))  # says the same only once

    def sample(self, wanted: list[tuple[list[int], str]]) -> Iterator[list[tuple[int, Continuation]]]:
        order = sorted(range(len(wanted)), key=lambda i: (len(wanted[i][0]), wanted[i]))
        while order:
            some = order[:self.budget // self.args.max_new_tokens + 1]
            room = [len(wanted[i][0]) + self.args.max_new_tokens for i in some]
            size = max(1, sum(n * tokens <= self.budget for n, tokens in enumerate(room, 1)))
            try:
                drawn = self._batch([wanted[i] for i in order[:size]])
            except RuntimeError as error:  # for CPU memory there is no exception of its own
                if size == 1 or not re.search("out of memory|can't allocate memory", str(error)):
                    raise
                drawn = None
            if drawn is None:  # outside of `except`, because the error holds on to the memory
                self.budget = size * room[size - 1] // 2
                self.warn("out of memory: batches are halved (a smaller --batch-tokens avoids this)")
                torch.cuda.empty_cache()
                continue
            yield list(zip(order[:size], drawn, strict=True))
            order = order[size:]

    @torch.inference_mode()
    def _batch(self, wanted: list[tuple[list[int], str]]) -> list[Continuation]:
        prompts = {prompt: n for n, prompt in enumerate(dict.fromkeys(tuple(ids) for ids, _ in wanted))}
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + [*row] for row in prompts], device=self.device)
        real = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
        mask = torch.tensor(real, device=self.device)
        out = self.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                         use_cache=True, logits_to_keep=1)
        rows = torch.tensor([prompts[tuple(ids)] for ids, _ in wanted], device=self.device)
        kv = out.past_key_values
        kv.batch_select_indices(rows)
        mask, logits = mask[rows], out.logits[rows, -1]
        alive, new = list(range(len(wanted))), [[] for _ in wanted]
        numbers = [random.Random(name) for _, name in wanted]
        while True:
            token = self._choose(logits, [numbers[i].random() for i in alive])
            for i, chosen in zip(alive, token.tolist(), strict=True):
                new[i].append(chosen)
            stay = [j for j, i in enumerate(alive)
                    if new[i][-1] not in self.ends and len(new[i]) < self.args.max_new_tokens]
            if not stay:
                return [self._continuation(ids, made) for (ids, _), made in zip(wanted, new, strict=True)]
            if len(stay) < len(alive):
                index, alive = torch.tensor(stay, device=self.device), [alive[j] for j in stay]
                kv.batch_select_indices(index)
                mask, token = mask[index], token[index]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            position = mask.sum(1, keepdim=True) - 1
            logits = self.model(token[:, None], attention_mask=mask, position_ids=position, use_cache=True,
                                past_key_values=kv).logits[:, -1]

    def _choose(self, logits: torch.Tensor, numbers: list[float]) -> torch.Tensor:
        """(rows, V) logits and a uniform number per row -> (rows,) tokens: the likeliest, or of the top-p
        nucleus."""
        if self.args.temperature == 0:
            return logits.argmax(-1)
        chances, size = (logits.float() / self.args.temperature).softmax(-1), 64
        while True:  # the nucleus is nearly always small, so the whole vocabulary need not be sorted
            best, tokens = chances.topk(min(size, chances.shape[1]))
            before = best.cumsum(-1) - best  # mass of all likelier tokens; the first is always in
            if size >= chances.shape[1] or before[:, -1].min() >= self.args.top_p:
                break
            size *= 16
        mass = (best * (before < self.args.top_p)).cumsum(-1)
        point = torch.tensor(numbers, device=mass.device)[:, None] * mass[:, -1:]
        drawn = torch.searchsorted(mass, point, right=True).clamp(max=mass.shape[1] - 1)
        return tokens.gather(1, drawn)[:, 0]

    def _continuation(self, ids: list[int], new: list[int]) -> Continuation:
        # Decoded behind its prompt, because some tokenizers drop the space at the beginning of a text.
        before, whole = (self.tokenizer.decode(x, skip_special_tokens=True) for x in (ids, ids + new))
        return Continuation(whole[len(before):], len(new), new[-1] not in self.ends)


class Remote:
    """Samples on an OpenAI-compatible server. Prompts go as token ids: exactly what is trained on."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any):
        self.args = args

    def sample(self, wanted: list[tuple[list[int], str]]) -> Iterator[list[tuple[int, Continuation]]]:
        args = self.args  # all sampling fields are sent, because an absent one takes the server's own default
        settings = dict(model=args.server_model, max_tokens=args.max_new_tokens, temperature=args.temperature,
                        top_p=args.top_p, n=1, stream=False)
        bodies = [settings | dict(prompt=ids, seed=int(content_key(name)[:7], 16)) for ids, name in wanted]
        for i, drawn in post_all(args.server, "completions", bodies, args.concurrency, self._continuation):
            yield [(i, drawn)]

    @staticmethod
    def _continuation(reply: dict) -> Continuation:
        choice = reply["choices"][0]
        return Continuation("" + choice["text"], reply["usage"]["completion_tokens"],
                            choice["finish_reason"] == "length")


TRIES, PAUSE, TIMEOUT = 6, 1.0, 600.0  # of a request; seconds before the second try; seconds for one try


def post(url: str, body: dict) -> dict:
    """POST JSON and return the JSON reply. Connection errors, broken replies, 408, 409, 429 and 5xx are tried
    again after a growing, jittered pause (or what Retry-After says); any other status is an InputError at
    once."""
    key, pause = os.environ.get("OPENAI_API_KEY", ""), 0.0
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    for attempt in range(TRIES):
        time.sleep(pause)
        pause = PAUSE * 2**attempt * random.uniform(0.5, 1)
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}"
            with suppress(OSError, http.client.HTTPException):
                problem += ": " + error.read(500).decode(errors="replace")
            problem = problem.replace(key, "***") if key else problem
            if error.code not in (408, 409, 429) and error.code < 500:
                raise InputError(f"{url}: {problem}") from None
            after = error.headers.get("Retry-After", "")
            pause = min(float(after), 120) if re.fullmatch(r"\d+(\.\d+)?", after) else pause
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not all JSON
            problem = f"{type(error).__name__}: {error}"
    raise InputError(f"{url}: gave up after {TRIES} tries, the last: {problem}; the same command continues")


def post_all(server: str, path: str, bodies: list[dict], concurrency: int,
             take: Callable[[dict], Any]) -> Iterator[tuple[int, Any]]:
    """Post all bodies to /v1/`path`, at most `concurrency` at a time; yields (index, take(reply)) as they
    come."""
    url = f"{server.rstrip('/').removesuffix('/v1')}/v1/{path}"

    def one(body: dict) -> Any:
        reply = post(url, body)
        try:
            return take(reply)
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{url}: not the reply of an OpenAI-compatible server ({type(error).__name__}: "
                             f"{error}): {json.dumps(reply)[:300]}") from None

    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = {pool.submit(one, body): i for i, body in enumerate(bodies)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# --------------------------------------------------------------------------------------------------- searches


class Draw(NamedTuple):
    """Samples first .. first + count - 1 of how the model goes on after `prefix`: it ends in `Step k:`, or is
    empty."""

    problem: dict
    prefix: str
    first: int
    count: int

    def keys(self) -> list[tuple[str, int]]:
        name = content_key(self.problem["prompt"], self.problem["answer"], self.prefix)
        return [(name, i) for i in range(self.first, self.first + self.count)]


class Ask(NamedTuple):
    """A judge's opinion on the steps of a solution, which may be unfinished."""

    problem: dict
    steps: list[str]

    def keys(self) -> list[tuple[str, int]]:
        return [(content_key(self.question()), 0)]

    def question(self) -> str:
        reference = self.problem.get("reference")
        return "\n".join([
            "A student works on a problem, step by step. Find the first wrong step.",
            "\n### Problem", self.problem["prompt"],
            f"\n### Reference {'solution' if reference else 'answer'}", reference or self.problem["answer"],
            "\n### The student's steps", *(f"Step {k}:{text}" for k, text in enumerate(self.steps, 1)),
            "\nGo through the steps in order and stop at the first wrong one. A step is `incorrect` if it "
            "miscalculates, claims something false or misreads the problem; `neutral` if it only plans or "
            "restates; else `correct`, also where it goes another way than the reference. Explain briefly. "
            "Then end with a line `Verdict:` and one line for each step you went through, like these:\n"
            "Verdict:\nStep 1: correct\nStep 2: incorrect"])


def first_error(reply: str, steps: int) -> int | None:
    """The first wrong step by a judge's verdict, 0 if none is; None if it is not exactly in the form asked
    for."""
    lines = [re.fullmatch(r"Step (\d+): (correct|neutral|incorrect)\.?", line.strip("* \t"))
             for line in re.split(r"[\n;]+", reply.rpartition("Verdict:")[2].strip("\n ;"))]
    if "Verdict:" not in reply:
        return None
    if not all(lines) or [int(line[1]) for line in lines] != [*range(1, len(lines) + 1)]:
        return None
    wrong = [k for k, line in enumerate(lines, 1) if line[2] == "incorrect"]
    if wrong:
        return wrong[0] if wrong == [len(lines)] and len(lines) <= steps else None
    return 0 if len(lines) == steps else None


class Tools:
    """What the stages share: the model or server that samples, loaded when first needed, and the cost so
    far."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.tokens, self.began = args, 0, time.monotonic()
        self.known: dict = {}  # rows of other files that need not be drawn again

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer
        try:
            return AutoTokenizer.from_pretrained(self.args.model)
        except (OSError, ValueError) as error:
            raise InputError(f"--model {self.args.model}: no tokenizer there ({error})") from None

    @cached_property
    def sampler(self) -> Local | Remote:
        return (Remote if self.args.server else Local)(self.args, self.tokenizer)

    @cached_property
    def sampling(self) -> dict:
        """All that a sample depends on, besides what was asked."""
        names = ("template", "instruction", "temperature", "top_p", "max_new_tokens", "seed", "dtype")
        model = self.args.server_model or model_identity(self.args.model)
        return dict(model=model, **{name: getattr(self.args, name) for name in names})

    def agree(self, path: str) -> dict:
        """What the rows in `path` were made with, as far as known; InputError if with another model or
        template."""
        made_with = made_with_of(path) or {}
        for name in ("model", "template", "instruction"):
            if made_with.get(name, self.sampling[name]) != self.sampling[name]:
                raise InputError(f"{path}: was made with {name} = {made_with[name]!r}, and this is "
                                 f"{self.sampling[name]!r}; all stages need the same")
        return made_with

    def draw(self, requests: list[Draw], ledger: Ledger, seen: Callable[[list[dict]], None]) -> None:
        """Sample what the ledger lacks, grade it and append it, batch by batch."""
        missing = {key: request for request in requests for key in request.keys() if key not in ledger.rows}
        if not missing:
            return
        keys, prompts = list(missing), {key[0]: request for key, request in missing.items()}
        texts = [open_turn(self.tokenizer, request.problem["prompt"], self.args.template,
                           self.args.instruction) + request.prefix for request in prompts.values()]
        ids = dict(zip(prompts, tokenize(self.tokenizer, texts, self.args.template), strict=True))
        for batch in self.sampler.sample([(ids[name], f"{self.args.seed} {name} {i}") for name, i in keys]):
            rows = []
            for i, drawn in batch:
                problem, solution = missing[keys[i]].problem, missing[keys[i]].prefix + drawn.text
                graded = solution.rpartition("\n")[0] if drawn.cut else solution  # no line cut off
                fields = {name: problem.get(name) for name in ("dataset", "prompt", "answer", "reference")}
                rows.append(dict(id=keys[i][0], sample=keys[i][1], **fields, solution=solution,
                                 correct=is_correct(graded, problem["answer"]), cut=drawn.cut,
                                 predicted=extract_answer(graded), tokens=drawn.tokens))
                self.tokens += drawn.tokens
            ledger.append(rows)
            seen(rows)

    def ask(self, requests: list[Ask], ledger: Ledger) -> None:
        """Ask the judge what the ledger lacks, and append each reply as it comes."""
        missing = list({key: r for r in requests for key in r.keys() if key not in ledger.rows}.items())
        bodies = [dict(model=self.args.judge_model, temperature=0, max_tokens=2048, stream=False,
                       messages=[dict(role="user", content=request.question())]) for _, request in missing]
        for i, text in post_all(self.args.judge_url, "chat/completions", bodies, self.args.concurrency,
                                lambda reply: "" + reply["choices"][0]["message"]["content"]):
            (name, sample), request = missing[i]
            ledger.append([dict(id=name, sample=sample, question=request.question(), reply=text)])

    def search(self, searches: dict[str, Generator], out: Ledger, what: str) -> None:
        """Advance many searches together, so that batches are full, and append each one's row to `out` at its
        end.

        A search is a generator. It yields lists of Draw and Ask, is sent their rows (a list for each), and
        returns its own row, with a `status` (`what`, if it was successful). Rollouts and replies go to files
        beside `out`.
        """
        stem = out.path.removesuffix(".jsonl")
        draws, asks = Ledger(f"{stem}.rollouts.jsonl", **self.sampling), None
        draws.rows.update(self.known)
        if self.args.judge_model:
            asks = Ledger(f"{stem}.judge.jsonl", judge_model=self.args.judge_model)
        todo = deque((name, search) for name, search in searches.items() if (name, 0) not in out.rows)
        waiting, ended, good = [], [], sum(row["status"] == what for row in out.rows.values())

        def go_on(name: str, search: Generator, answers: list | None) -> None:
            try:
                waiting.append((name, search, search.send(answers)))
            except StopIteration as end:
                ended.append({**end.value, "id": name, "sample": 0})

        def show(rows: list[dict]) -> None:
            bar.set_postfix_str(f"{good} {what}, {self.rate()}", refresh=False)
            bar.update(0)

        with self.bar(len(searches), len(searches) - len(todo), what) as bar:
            while todo or waiting:
                while todo and len(waiting) < 256:
                    go_on(*todo.popleft(), None)
                requests = [request for _, _, wanted in waiting for request in wanted]
                self.draw([request for request in requests if isinstance(request, Draw)], draws, show)
                if asks is not None:
                    self.ask([request for request in requests if isinstance(request, Ask)], asks)
                ready, waiting[:] = waiting[:], []
                for name, search, wanted in ready:
                    go_on(name, search, [[(draws if isinstance(request, Draw) else asks).rows[key]
                                          for key in request.keys()] for request in wanted])
                if ended:
                    out.append(ended)
                    good += sum(row["status"] == what for row in ended)
                    bar.update(len(ended))
                    ended.clear()
                show([])

    def rate(self) -> str:
        return f"{self.tokens / (time.monotonic() - self.began):.0f} tokens/s"

    @staticmethod
    def bar(total: int, done: int, what: str) -> tqdm:
        return tqdm(total=total, initial=done, desc=what, disable=RANK > 0, mininterval=1, dynamic_ncols=True)


def mine(row: dict) -> bool:
    """Whether this rank works on the row. The ranks share by problem, without a message."""
    return int(content_key(row["prompt"]), 16) % WORLD == RANK


def say(*lines: str) -> None:
    if RANK == 0:
        tqdm.write("\n".join(lines))
        sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------- stages


def solve(args: argparse.Namespace, tools: Tools) -> list[bool]:
    """Problems -> solutions, graded. With --samples 1 --temperature 0 this is the evaluation."""
    prefix = STEP_PREFIX if args.step_prefix else ""
    draws = [Draw(problem, prefix, 0, args.samples) for problem in read_problems(args.problems)]
    ledger = Ledger(args.out, step_prefix=args.step_prefix, **tools.sampling)
    own = [draw for draw in draws if mine(draw.problem)]
    done = [ledger.rows[key] for draw in own for key in draw.keys() if key in ledger.rows]

    def show(rows: list[dict]) -> None:
        done.extend(rows)
        right = sum(row["correct"] for row in done) / len(done)
        bar.set_postfix_str(f"{right:.1%} right, {tools.rate()}", refresh=False)
        bar.update(len(rows))

    with tools.bar(len(own) * args.samples, len(done), "solve") as bar:
        tools.draw(own, ledger, show)
    rows = ledger.wait(key for draw in draws for key in draw.keys())
    right, n = sum(row["correct"] for row in rows), len(rows)
    low, high = wilson(right, n)
    interval = f", 95% interval {low:.1%} to {high:.1%}"
    say(f"accuracy {right / n:.1%} ({right} of {n}"
        f"{interval if args.samples == 1 else f' samples of {len(draws)} problems'}); "
        f"{sum(row['predicted'] is None for row in rows)} without an answer, "
        f"{sum(row['cut'] for row in rows)} cut at {args.max_new_tokens} tokens, "
        f"{sum(find_steps(row['solution']) is None for row in rows)} not in numbered steps")
    return [row["correct"] for row in rows]


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share, by Wilson's formula, which also holds near 0 and 1."""
    share = right / n
    middle, spread = share + z * z / 2 / n, z * (share * (1 - share) / n + z * z / 4 / n / n) ** 0.5
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def passed(row: dict) -> bool:
    return row["correct"] and not row["cut"]


def pass_rate(rows: list[dict]) -> float:
    return sum(map(passed, rows)) / len(rows)


def locate_by_rollouts(row: dict, steps: Steps, args: argparse.Namespace) -> Generator:
    """The first wrong step, as the one after which the model seldom gets the answer right. A search.

    V(j) is the pass rate of rollouts that go on after the first j steps; V(n) = 0, as the n steps end in a
    wrong answer. "Wrong" is not V = 0, because models recover from errors, but at most half of V(0). Binary
    search keeps V(low) > V(0)/2 >= V(high) until high = low + 1. Every V is a guess from few samples, so
    fresh rollouts confirm the drop over that one step. Those from before it that pass begin with a better
    step: they are kept for `rectify`.
    """
    def draw(j: int, first: int, count: int) -> list[Draw]:
        return [Draw(row, row["solution"][:steps[j][1]], first, count)]

    for count in (args.screen, args.rollouts):
        (begun,) = yield draw(0, 0, count)
        if not any(map(passed, begun)):
            return row | dict(status=f"located: none of the first {count} samples of the problem passes")
    start, low, high, found = pass_rate(begun), 0, len(steps), {0: begun}
    if start < args.min_pass_rate:
        return row | dict(status="located: the problem's pass rate is below --min-pass-rate")
    while high - low > 1:
        middle = (low + high) // 2
        (found[middle],) = yield draw(middle, 0, args.rollouts)
        low, high = (middle, high) if pass_rate(found[middle]) > args.good_ratio * start else (low, middle)
    (fresh,) = yield draw(low, args.rollouts, args.confirmations)
    before, after = pass_rate(fresh), 0.0
    if before <= args.good_ratio * start:
        return row | dict(status="confirmed: pass rate already low before the step")
    if high < len(steps):
        (rollouts,) = yield draw(high, args.rollouts, args.confirmations)
        after = pass_rate(rollouts)
    if after > args.bad_ratio * before:
        return row | dict(status="confirmed: pass rate still high after the step")
    drawn = found[low] + fresh
    return row | dict(status="located", step=high, pass_rates=[start, before, after], drawn=len(drawn),
                      passed=[r["solution"] for r in drawn if passed(r)])


def locate_by_judge(row: dict, steps: Steps, args: argparse.Namespace) -> Generator:
    """The first wrong step by a judge's verdict. A search."""
    ((answer,),) = yield [Ask(row, [step_text(row["solution"], steps, k + 1) for k in range(len(steps))])]
    step = first_error(answer["reply"], len(steps))
    if not step:
        return row | dict(status="located: " + ("no wrong step" if step == 0 else "verdict not as asked for"))
    return row | dict(status="located", step=step)


def read_located(path: str) -> list[dict]:
    """Rows that `locate` wrote, checked; where people filled in a step, the status follows."""
    nothing = os.path.exists(path) and os.path.getsize(path) == 0  # no solution was wrong
    rows = []
    for where, row in [] if nothing else read_rows(path):
        n = len(find_steps(row["solution"]) or []) if isinstance(row.get("solution"), str) else 0
        step = row.get("step")
        if not {"status", "prompt", "answer", "solution"} <= row.keys():
            raise InputError(f"{where}: needs status, prompt, answer and solution, as `locate` writes them")
        if step is not None and (type(step) is not int or not 0 <= step <= n):
            raise InputError(f"{where}: step must be 0 (none is wrong) to {n}, or null, not {step!r}")
        status = row["status"] if step is None else "located" if step else "located: no wrong step"
        rows.append(row | dict(status=status))
    return rows


def locate(args: argparse.Namespace, tools: Tools) -> None:
    """Wrong solutions -> the first wrong step of each, or the reason why there is none."""
    rows, wrong, unusable, of_problem = read_rows(args.solutions), {}, {}, Counter()
    for where, row in rows:
        for name, kind in dict(prompt=str, answer=str, solution=str, correct=bool).items():
            if not isinstance(row.get(name), kind):
                raise InputError(f"{where}: needs {name!r} ({kind.__name__}); was this file made by `solve`?")
        if not row["correct"]:
            wrong.setdefault(content_key(row["prompt"], row["answer"], row["solution"]), row)
    for name, row in wrong.items():
        reason = ("cut at --max-new-tokens" if row.get("cut") else
                  "not numbered Step 1: to Step n:" if find_steps(row["solution"]) is None else
                  "more than --per-problem" if of_problem[row["prompt"]] == args.per_problem else None)
        of_problem[row["prompt"]] += reason is None
        if reason:
            unusable[name] = dict(status=f"usable: {reason}")
    if args.by == "human":
        if WORLD > 1:
            raise InputError("--by human needs one process only: run it without torchrun")
        known = {row["id"]: row for row in (read_located(args.out) if os.path.exists(args.out) else [])}
        empty = dict(step=None, status="located: not filled in yet")
        made = [known.get(name, empty | row | unusable.get(name, {}) | dict(id=name, sample=0))
                for name, row in wrong.items()]
        made_with = (made_with_of(args.solutions) or {}) | dict(by="human")
        write_whole(f"{args.out}.meta.json", json.dumps(made_with, indent=1) + "\n")
        write_whole(args.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
        say(f"{args.out}: where step is null, put the number of the first wrong step there (0 if none is); "
            "then run this again to check and count, and `rectify`")
    else:
        method, names = locate_by_judge, ["judge_model"]
        if args.by == "rollouts":
            method = locate_by_rollouts
            names = ["rollouts", "confirmations", "screen", "min_pass_rate", "good_ratio", "bad_ratio"]
        made_with = tools.agree(args.solutions)
        ledger = Ledger(args.out, by=args.by, **tools.sampling, **{name: vars(args)[name] for name in names})
        if tools.sampling.items() <= made_with.items() and args.temperature > 0:
            # What `solve` sampled are rollouts of the problem, drawn in the same way.
            tools.known = {(row["id"], row["sample"]): row for _, row in rows}

        def attempt(name: str, row: dict) -> Generator:
            if name in unusable:
                return row | unusable[name]
            return (yield from method(row, find_steps(row["solution"]), args))

        own = {name: attempt(name, row) for name, row in wrong.items() if mine(row)}
        tools.search(own, ledger, "located")
        made = ledger.wait((name, 0) for name in wrong)
    again = sum(not row["correct"] for _, row in rows) - len(wrong)
    statuses = Counter(row["status"] for row in made) + Counter({"usable: the same as another": again})
    counts = dict(solutions=len(rows), wrong=len(made) + again)
    say(*funnel(counts, statuses, "usable", "located", "confirmed"))


def funnel(counts: dict[str, int], statuses: Counter, *stages: str) -> list[str]:
    """Lines that say how many are left after each stage and, from statuses "stage: reason", why the others
    are not."""
    lines, left = [f"{stage:12}{count:7,}" for stage, count in counts.items()], [*counts.values()][-1]
    for stage in stages:
        why = sorted((text, n) for text, n in statuses.items() if text.startswith(stage + ": "))
        left -= sum(n for _, n in why)
        lines += [f"{stage:12}{left:7,}", *(f"{'':12}{-n:7,}  {text.split(': ', 1)[1]}" for text, n in why)]
    return lines


def simplified(step: str) -> str:
    return " ".join(step.lower().split())


def repair(row: dict, args: argparse.Namespace) -> Generator:
    """Right steps to take the place of the wrong one. A search.

    Candidates are the first steps of continuations that pass, the most frequent first. That the answer is
    right does not make the step right: it must also be as good to go on from as the steps before it, or
    please the judge.
    """
    solution, steps, k = row["solution"], find_steps(row["solution"]), row["step"]
    prefix, rejected = solution[:steps[k - 1][1]], step_text(solution, steps, k)
    drawn, good = row.get("drawn", 0), list(row.get("passed", []))
    if drawn < args.samples:
        (more,) = yield [Draw(row, prefix, drawn, args.samples - drawn)]
        drawn, good = args.samples, good + [r["solution"] for r in more if passed(r)]
    candidates: dict[str, list[tuple]] = {}
    for text in good:
        found = find_steps(text)
        if found and len(found) >= k and found[k - 1][1] == len(prefix):
            candidates.setdefault(simplified(step_text(text, found, k)), []).append((text, found))
    wrong, ratio = simplified(rejected), args.max_length_ratio
    names = [name for name in candidates if name != wrong and 1 / ratio <= len(name) / len(wrong) <= ratio]
    pairs = []
    for name in sorted(names, key=lambda name: -len(candidates[name]))[:args.tries]:
        text, found = candidates[name][0]
        right = True  # if it is the last step: the answer is right
        if args.check == "judge":
            ((answer,),) = yield [Ask(row, [step_text(text, found, j + 1) for j in range(k)])]
            right = first_error(answer["reply"], k) == 0
        elif len(found) > k:
            (after,) = yield [Draw(row, text[:found[k][1]], 0, args.rollouts)]
            right = pass_rate(after) >= len(good) / drawn
        if right:
            pairs.append(dict(dataset=row.get("dataset") or "", prompt=row["prompt"], answer=row["answer"],
                              initial_reason_steps=prefix, rejected=rejected,
                              chosen=step_text(text, found, k), full_chosen=text[len(prefix):].rstrip(),
                              full_rejected=solution[len(prefix):].rstrip()))
        if len(pairs) == args.pairs_per_step:
            break
    reason = ("no continuation passes" if not good else "no other step of similar length" if not names else
              "no chosen step passes --check")
    return dict(status="rectified" if pairs else f"rectified: {reason}", pairs=pairs)


def rectify(args: argparse.Namespace, tools: Tools) -> None:
    """Located errors -> pairs to train on with `stepdpo.py --data`."""
    tools.agree(args.located)
    located = read_located(args.located)
    stem, names = args.out.removesuffix(".jsonl"), (
        "samples", "check", "tries", "rollouts", "pairs_per_step", "max_length_ratio", "judge_model")
    ledger = Ledger(f"{stem}.checked.jsonl", **tools.sampling, **{name: vars(args)[name] for name in names})
    todo = {content_key(row["prompt"], row["solution"], str(row["step"])): row
            for row in located if row.get("step")}
    tools.search({name: repair(row, args) for name, row in todo.items() if mine(row)}, ledger, "rectified")
    checked, pairs, of_step, of_problem = ledger.wait((name, 0) for name in todo), [], Counter(), Counter()
    statuses = Counter(row["status"] for row in [*located, *checked])
    for pair in (pair for row in checked for pair in row["pairs"]):
        step = pair["prompt"], pair["initial_reason_steps"], simplified(pair["rejected"])
        if of_step[step] >= args.pairs_per_step:
            statuses["pairs: the step is already rejected in another pair"] += 1
        elif of_problem[pair["prompt"]] == args.per_problem:
            statuses["pairs: more than --per-problem"] += 1
        else:
            pairs.append(pair)
            of_step[step] += 1
            of_problem[pair["prompt"]] += 1
    if RANK == 0:
        write_whole(args.out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    say(*funnel(dict(wrong=len(located)), statuses, "usable", "located", "confirmed", "rectified", "pairs"),
        f"{len(pairs)} pairs of {len(of_problem)} problems -> {args.out}")


def build(args: argparse.Namespace, tools: Tools) -> None:
    """Problems -> pairs: the three stages, in one folder."""
    files = {name: os.path.join(args.out, f"{name}.jsonl") for name in ("solutions", "located", "pairs")}
    for stage, settings in (
            (solve, dict(out=files["solutions"])),
            (locate, dict(out=files["located"], solutions=files["solutions"])),
            (rectify, dict(out=files["pairs"], located=files["located"], samples=args.rectify_samples))):
        stage(argparse.Namespace(**vars(args) | settings), tools)


# ----------------------------------------------------------------------------------------------- command line

COMMANDS = {"solve": solve, "locate": locate, "rectify": rectify, "build": build}
FLAGS = {  # name: (initials of its commands, default (a tuple: the choices; str: required), help)
    "model": ("slrb", str, "folder or hub name of the model; with --server only its tokenizer is used"),
    "problems": ("sb", str, "problems with answers: .jsonl, .json, .parquet or a hub dataset"),
    "solutions": ("l", str, "the file that `solve` wrote"),
    "located": ("r", str, "the file that `locate` wrote"),
    "out": ("slrb", str, "file to write, or to continue (build: a folder, with the pairs in pairs.jsonl)"),
    "samples": ("sb", 2, "solutions per problem"),
    "step_prefix": ("sb", True, "begin each answer with: " + STEP_PREFIX.replace("\n", " / ")),
    "by": ("lb", ("rollouts", "judge", "human"), "who finds the first wrong step: the pass rates of the "
           "model's own rollouts, a judge, or you: --out is then a file to fill in"),
    "rollouts": ("lrb", 8, "samples for one pass rate"),
    "confirmations": ("lb", 16, "fresh samples before and after a located step, to confirm it"),
    "screen": ("lb", 4, "give a problem up if none of so many samples is right"),
    "min_pass_rate": ("lb", 0.25, "give a problem up if its pass rate V(0) is lower than this"),
    "good_ratio": ("lb", 0.5, "the first j steps count as right if the pass rate V(j) after them is above "
                   "this times V(0)"),
    "bad_ratio": ("lb", 1 / 3, "a step is confirmed as wrong if V after it is at most this times V before"),
    "per_problem": ("lrb", 4, "wrong solutions searched, and pairs made, of one problem at most"),
    "rectify_samples": ("b", 20, "as --samples of rectify"),
    "check": ("rb", ("rollouts", "judge"), "who says that a chosen step is right: a pass rate no lower than "
              "before it, or the judge"),
    "tries": ("rb", 3, "chosen steps checked per located error at most"),
    "pairs_per_step": ("rb", 1, "pairs that reject the same step at most"),
    "max_length_ratio": ("rb", 4.0, "a chosen step is at most so many times longer or shorter than the "
                         "rejected one"),
    "judge_url": ("lrb", "", "OpenAI-compatible server of the judge; its key is read from OPENAI_API_KEY"),
    "judge_model": ("lrb", "", "the judge's name there"),
    "server": ("slrb", "", "OpenAI-compatible server (vLLM, SGLang) to sample on; default: in this process"),
    "server_model": ("slrb", "", "the model's name there"),
    "concurrency": ("slrb", 64, "requests that a server has to answer at the same time"),
    "template": ("slrb", TEMPLATES, "how prompt and answer are put together"),
    "instruction": ("slrb", None, "text added to the problem ('' for none; default: the template's own)"),
    "temperature": ("slrb", 0.8, "0 takes the likeliest token"),
    "top_p": ("slrb", 0.95, "sample among the likeliest tokens that together have this probability"),
    "max_new_tokens": ("slrb", 2048, "cut a continuation off after so many tokens"),
    "seed": ("slrb", 0, "the same seed gives the same samples (in this process)"),
    "dtype": ("slrb", ("", "bfloat16", "float32"), "of the model in this process (default: bfloat16 on CUDA, "
              "else float32)"),
    "batch_tokens": ("slrb", 0, "samples x (prompt + --max-new-tokens) in a batch: sets the memory, not the "
                     "result; 0 is 131072 on CUDA, else 16384"),
}


def hyphens(word: str) -> str:
    """Flags may be written with underscores; values stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def words_of_line(line: str) -> list[str]:
    """A line of an @FILE: words as on the command line, # starts a comment."""
    return list(map(hyphens, shlex.split(line, comments=True)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    shared = dict(allow_abbrev=False, fromfile_prefix_chars="@")
    parser = argparse.ArgumentParser(
        "data.py", **shared, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make step pairs from a model's own samples:\n"
                    "  data.py build --model M --problems P.jsonl --out DIR\n"
                    "or stage by stage (see data.py COMMAND --help). Stopped at any point, the same command\n"
                    "continues. @FILE reads arguments from a file; torchrun data.py ... shares the work.",
        epilog=f"problems may look like\n  {FORMATS}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for command, stage in COMMANDS.items():
        sub = commands.add_parser(command, help=stage.__doc__, description=stage.__doc__, **shared)
        for name, (owners, default, text) in FLAGS.items():
            if command == "rectify" and name == "samples":
                owners, default, text = "r", 20, "continuations of the right steps; what `locate` kept counts"
            if command[0] not in owners:
                continue
            if isinstance(default, tuple):
                options = dict(choices=default, default=default[0])
            elif isinstance(default, bool):
                options = dict(action=argparse.BooleanOptionalAction, default=default)
            else:
                options = dict(type=str if default is None else type(default), default=default)
                options = dict(required=True) if default is str else options
            text += f" (default: {options['default']})" if options.get("default") not in (None, "") else ""
            sub.add_argument(hyphens(f"--{name}"), help=text, **options)
    for each in (parser, *commands.choices.values()):
        each.convert_arg_line_to_args = words_of_line
    args = parser.parse_args(list(map(hyphens, sys.argv[1:] if argv is None else argv)))
    error = commands.choices[args.command].error
    for name, value in vars(args).items():
        if type(value) in (int, float):
            zero = ("seed", "temperature", "min_pass_rate", "good_ratio", "bad_ratio", "batch_tokens")
            low = 0 if name in zero else 1e-9
            if not low <= value <= (1 if name == "top_p" else sys.maxsize):
                error(f"--{name.replace('_', '-')} is out of range: {value}")
    judged = "judge" in (getattr(args, "by", None), getattr(args, "check", None))
    for needed, *names in ((args.server, "server_model"), (args.server_model, "server"),
                           (judged, "judge_url", "judge_model")):
        for name in names:
            if needed and not getattr(args, name):
                error(f"--{name.replace('_', '-')} is needed too")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        tools = Tools(args)
        COMMANDS[args.command](args, tools)
        by = " by rank 0" if WORLD > 1 else ""
        say(f"{tools.tokens:,} tokens sampled{by} in {(time.monotonic() - tools.began) / 60:.1f} minutes")
    except InputError as error:
        sys.exit(f"data.py {args.command}: {error}")
    except KeyboardInterrupt:
        print(f"\nstopped; the same command continues from what is in {args.out}", file=sys.stderr)
        os._exit(130)  # at once: a normal exit would wait for requests in flight


if __name__ == "__main__":
    main()
