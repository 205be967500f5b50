"""Step pairs: what they are, how they become tokens, and how a batch shares their prefixes.

One row, in the format of Math-Step-DPO-10K (`chosen` and `rejected` are single reasoning steps):

    {"dataset": "gsm8k", "prompt": "Tom has 3 boxes of 4 pens and gives 5 pens away. How many pens are left?",
     "initial_reason_steps": "Let's think step by step.\\nStep 1: 3 boxes hold 3 * 4 = 12 pens.\\nStep 2:",
     "chosen": " After giving 5 away, 12 - 5 = 7 pens are left.", "rejected": " 12 + 5 = 17 pens are left.",
     "full_chosen": "... and everything after it", "full_rejected": "...", "answer": "7"}

Words, here and in the other files:

    row          one line of data
    pair         a prefix and two spans, chosen and rejected, as token ids (`Pair`)
    prefix       all that both spans go on from: the problem in its template, and the right steps so far
    span         what is trained on: one reasoning step, or with --span solution the rest of the solution
    micro-batch  what goes through the model at once (`Batch`): pairs, in one sequence without padding
    global batch the pairs of one optimizer step: the micro-batches of all ranks
    segment      a part of the sequence that attends by itself: a prefix, or a span to its prefix and itself
    place        an index in the sequence; the position of a token, which the model is told, begins anew
                 with each pair
    step         in names an optimizer step; those of a solution are called reasoning steps

One pair in the sequence. Chosen and rejected share all that comes before them, so that is laid out once:

    token      <user> Tom has ... <assistant> Let's ... Step 2 : | After giving ... left . | 12 + 5 ... left .
    segment    --------------------- prefix -------------------- | ------- chosen -------- | ---- rejected ---
    position   0 1 2 ...                                     P-1 | P P+1 ...               | P P+1 ...

What a token attends to, for a prefix of three tokens and spans of two (one line for each query):

                 keys:   prefix   chosen   rejected
    prefix               x . .    . .      . .
                         x x .    . .      . .
                         x x x    . .      . .
    chosen               x x x    x .      . .
                         x x x    x x      . .
    rejected             x x x    . .      x .
                         x x x    . .      x x

So each span sees exactly what it would see alone, and the last prefix token predicts the first token of both.
Pairs do not see each other. kernels.py computes this without a mask.

In reading order: from text to token ids; which pairs go into which micro-batch; how they are packed. Files
are read, and bad rows refused, in runtime/rows.py.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kernels import Segments
from runtime.flags import TEMPLATES
from runtime.messages import InputError, progress
from runtime.templates import chat_turn, end_of_answer, refuse_lost_text

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
# By --span, the fields that are trained on.
SPAN_FIELDS = {"step": ("chosen", "rejected"), "solution": ("full_chosen", "full_rejected")}

# ------------------------------------------------------------------------------------- from text to token ids


class Pair(NamedTuple):
    """Token ids of one pair. The prefix has at least one token, and so has each span."""

    prefix: list[int]
    chosen: list[int]
    rejected: list[int]
    where: str  # file and line of the row it came from

    def tokens(self, share_prefix: bool) -> int:
        """Tokens it takes up in a micro-batch."""
        prefixes = 1 if share_prefix else 2
        return prefixes * len(self.prefix) + len(self.chosen) + len(self.rejected)


def open_turn(tokenizer: Any, prompt: str, template: str, instruction: str | None = None,
              template_args: dict[str, Any] | None = None) -> str:
    """The text before the model's answer, up to its first reasoning step.

    `instruction` stands behind the problem; None is the template's own.
    """
    if instruction is None:
        instruction = "" if template == "alpaca" else INSTRUCTION
    user = f"{prompt}\n{instruction}" if instruction else prompt

    if template == "chat":
        return chat_turn(tokenizer, user, template_args)  # the assistant's turn is left open for its steps
    if template == "alpaca":
        return ("Below is an instruction that describes a task. "
                "Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{user}\n\n### Response:\n")
    if template == "deepseek-math":
        return f"User: {user}\n\nAssistant: "
    raise InputError(f"--template must be one of {', '.join(TEMPLATES)}, got {template!r}")


def tokenize(tokenizer: Any, texts: Sequence[str], template: str, sources: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with BOS exactly where the model has it and never an EOS.

    A chat template writes BOS itself, so nothing is added to its text. Otherwise BOS is put in front if and
    only if that is what this tokenizer does with any text. Messages name the texts by their `sources`.
    """
    if not texts:
        return []
    # Without special tokens: the tokenizer would add an EOS, or a second BOS.
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    refuse_lost_text(tokenizer, texts, ids, sources)
    bos = tokenizer.bos_token_id
    if template != "chat" and bos is not None and tokenizer("a").input_ids[0] == bos:
        return [[bos, *text] for text in ids]
    return ids


def encode(
    rows: list[tuple[str, dict]],  # (file and line, the row's fields)
    tokenizer: Any,
    template: str,
    instruction: str | None,
    span: str,  # "step": one reasoning step after the shared ones; "solution": all that follows (plain DPO)
    template_args: dict[str, Any] | None = None,  # variables of the chat template
) -> list[Pair]:
    """The pair of each row.

    A reasoning step is *not* followed by an end-of-sequence token, not even the last: nothing teaches the
    model to stop early. A whole solution ends as the model's answers do.

    What comes before and the step are tokenized as one text, as a model writes them. Where the tokenizer
    merges across the boundary, the merged token belongs to the span: the prefix is what both results, and
    what comes before tokenized alone, begin with.
    """
    end_text, end = "", []
    if span == "solution":
        end_text, end_id = end_of_answer(tokenizer, template, template_args)
        end = [end_id]

    texts, sources = [], []  # of each row three: what comes before, that + chosen, that + rejected
    for where, row in progress(rows, f"template {template}"):
        right_so_far = row["initial_reason_steps"]
        before = open_turn(tokenizer, prompt_of(row), template, instruction, template_args) + right_so_far
        texts.append(before)
        for name in SPAN_FIELDS[span]:
            after = row[name]
            if span == "solution":  # which may repeat the steps it goes on from, and end as an answer does
                after = without_end(after.removeprefix(right_so_far), end_text)
            texts.append(before + after)
        sources += [where] * 3
    # In one call, because fast tokenizers then use all cores.
    ids = tokenize(tokenizer, texts, template, sources)

    pairs = []
    for i, (where, _) in enumerate(rows):
        before, with_chosen, with_rejected = ids[3 * i:3 * i + 3]
        shared = _common_length(before, with_chosen, with_rejected)
        pairs.append(Pair(before[:shared], with_chosen[shared:] + end, with_rejected[shared:] + end, where))
    return pairs


def without_end(text: str, end: str) -> str:
    """The text without the control token that ends an answer, if it has it."""
    return text.rstrip().removesuffix(end) if text.rstrip().endswith(end) else text


def prompt_of(row: dict) -> str:
    """The problem: `prompt` is its text, or a list of one message of the user."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def _common_length(*sequences: list[int]) -> int:
    """Length of the longest prefix that all sequences have in common."""
    for i, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return i
    return min(map(len, sequences))


def marked_text(pair: Pair, tokenizer: Any) -> str:
    """The pair as text, exactly as it is trained on, with the two spans marked."""
    prefix, chosen, rejected = map(tokenizer.decode, pair[:3])
    return f"{prefix}[[chosen>{chosen}<]][[rejected>{rejected}<]]"


# ---------------------------------------------------------------------- which pairs go into which micro-batch


def steps_per_epoch(pair_count: int, batch_size: int) -> int:
    """Optimizer steps of an epoch, so many that no step is a small leftover: the paper's 10,795 pairs at
    batch size 128 give 84 steps of 128 or 129 pairs."""
    return max(1, round(pair_count / batch_size))


def indices_of_step(step: int, pair_count: int, batch_size: int, seed: int) -> np.ndarray:
    """The pairs of an optimizer step: every pair exactly once per epoch, in a new order each epoch."""
    steps = steps_per_epoch(pair_count, batch_size)
    epoch, step_of_epoch = divmod(step, steps)
    # Seeded by epoch, so that a run that resumes need not replay the random numbers before it.
    order = np.random.default_rng((seed, epoch)).permutation(pair_count)
    return np.array_split(order, steps)[step_of_epoch]


def plan_micro_batches(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
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


# ---------------------------------------------------------------------------------------- how they are packed


class Batch(NamedTuple):
    """B pairs in one sequence of L tokens, with T trained tokens."""

    input_ids: Tensor     # (1, L) int64
    position_ids: Tensor  # (1, L) int64
    segments: Segments    # what attends to what: the drawing above, as `packed_attention` takes it
    predict_at: Tensor    # (T,) int64: the place whose hidden state predicts the token
    targets: Tensor       # (T,) int64: the token
    span_of: Tensor       # (T,) int64: the span it belongs to: i the chosen of pair i, B + i its rejected
    span_lengths: Tensor  # (2, B) int64: how many tokens each chosen and each rejected span has

    def to(self, device: torch.device) -> "Batch":
        return pytree.tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), self)


def pack(pairs: Sequence[Pair], share_prefix: bool = True) -> Batch:
    """Lay pairs out in one sequence.

    With `share_prefix` a pair is three segments: prefix, chosen, rejected. Without, it is two plain
    sequences, prefix + chosen and prefix + rejected. No pairs give one token that nothing is trained on,
    because under FSDP every rank must run the layers whenever one does.
    """
    ids, positions, key_index, query_lengths, key_lengths = [], [], [], [], []
    predict_at, targets, span_of = [], [], []

    def add_segment(tokens: list[int], position: int, prefix: range) -> range:
        """Append tokens that see the prefix and, causally, each other. Returns their places."""
        own = range(len(ids), len(ids) + len(tokens))
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        key_index.extend([*prefix, *own])  # its keys: the places of its prefix, then its own
        query_lengths.append(len(own))
        key_lengths.append(len(prefix) + len(own))
        return own

    for i, pair in enumerate(pairs):
        begin = len(pair.prefix)  # the position of both spans
        shared = add_segment(pair.prefix, 0, range(0)) if share_prefix else None

        for number, span in ((i, pair.chosen), (len(pairs) + i, pair.rejected)):
            if share_prefix:
                prefix, own = shared, add_segment(span, begin, shared)
            else:
                whole = add_segment(pair.prefix + span, 0, range(0))
                prefix, own = whole[:begin], whole[begin:]
            predict_at += [prefix[-1], *own[:-1]]  # the token before it predicts a token
            targets += span
            span_of += [number] * len(span)

    if not pairs:
        add_segment([0], 0, range(0))

    segments = Segments(query_lengths, key_lengths, torch.tensor(key_index),
                        _offsets(query_lengths), _offsets(key_lengths))
    lengths = [[len(pair.chosen) for pair in pairs], [len(pair.rejected) for pair in pairs]]
    sequence = torch.tensor([ids, positions])
    trained = torch.tensor([predict_at, targets, span_of]).long()  # empty lists would be float
    return Batch(sequence[:1], sequence[1:], segments, *trained, torch.tensor(lengths).long())


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
