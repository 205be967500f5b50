"""Samples of a model, drawn in this process or by a server, each of them only once.

The stages ask for samples 0 .. n-1 of how the model goes on after some prefix of an answer. What was drawn
before is read from the cache, only the rest is drawn, and every batch is on disk before the next one begins.
So a run that was stopped at any point runs again from its start, and finds all it did.
"""

import dataclasses
import math
import os
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data import open_turn, tokenize
from runtime.files import content_key
from runtime.messages import InputError, in_one_line, progress, refuse_model
from runtime.templates import control_token_in, control_tokens, read_tokenizer, with_date
from runtime.weights import FLOATS, check_config, model_identity, reading

from .cache import Cache, recorded_args
from .grading import extract_answer, is_correct
from .problems import Problem
from .server import post_all, served_model


@dataclass(frozen=True)
class Settings:
    """How samples are drawn."""

    model: str                     # folder or hub name; with a server only its tokenizer is used
    template: str = "chat"
    instruction: str | None = None
    template_args: dict[str, Any] | None = None  # variables of the chat template
    temperature: float = 0.8       # 0 takes the likeliest token
    top_p: float = 0.95
    max_new_tokens: int = 2048
    seed: int = 0
    dtype: str | None = None       # of the model in this process; None: bfloat16 on CUDA, else float32
    batch_tokens: int = 0          # samples x (prompt + new tokens) per batch; 0: 131072 on CUDA, else 16384
    server: str | None = None      # address of an OpenAI-compatible server; None: this process
    server_model: str | None = None
    concurrency: int = 64          # requests that a server has to answer at the same time

    def identity(self) -> dict[str, Any]:
        """All that a sample depends on, besides its prefix."""
        names = ("template", "instruction", "template_args", "temperature", "top_p", "max_new_tokens", "seed",
                 "dtype")
        if self.server:
            model = served_model(self.server, self.server_model)
        else:
            model = model_identity(self.model)
        return {"model": model, **{name: getattr(self, name) for name in names}}


class Sample(NamedTuple):
    solution: str           # the prefix and its continuation
    predicted: str | None   # its final answer
    correct: bool
    cut: bool               # ended by max_new_tokens or for lack of positions, not by the model
    tokens: int             # of the continuation

    @classmethod
    def of(cls, row: dict) -> "Sample":
        """The sample that a row of the cache holds, among other fields."""
        return cls(*[row[name] for name in cls._fields])

    @property
    def passes(self) -> bool:
        return self.correct and not self.cut


# ------------------------------------------------------------------------------------------------ the samples


class Samples:
    """Samples of one model, by their prefix."""

    def __init__(self, path: str, settings: Settings, sampler: Any = None, tokenizer: Any = None):
        if not settings.server:  # for which the folder need only hold a tokenizer
            check_config(settings.model)
        self.tokenizer = tokenizer or read_tokenizer(settings.model)
        self.control_tokens = control_tokens(self.tokenizer)
        args = with_date(settings.template_args, self.tokenizer, settings.template, recorded_args(path))
        self.settings = settings = dataclasses.replace(settings, template_args=args)
        self.cache = Cache(path, settings.identity(), Sample.__annotations__)
        kind = ServerSampler if settings.server else LocalSampler
        self.sampler = sampler or kind(settings, self.tokenizer)
        self.tokens = 0  # that this rank has sampled

    def draw(self, prefixes: list[tuple[Problem, str]], count: int, first: list[int] | None = None,
             label: str = "sampling") -> list[list[Sample]]:
        """`count` samples of each prefix of an answer to a problem, from its own number `first` on, or 0.

        A prefix ends in `Step k:`, or is empty. Equal prefixes have equal samples. Collective: the ranks
        share what has to be drawn, and all return all.
        """
        wanted = []  # for each prefix the keys of its samples
        missing: dict[tuple[Problem, str], list[str]] = {}
        for (problem, prefix), start in zip(prefixes, first or [0] * len(prefixes), strict=True):
            name = problem.key(prefix)
            keys = [f"{name} {n}" for n in range(start, start + count)]
            wanted.append(keys)
            for key in keys:
                absent = missing.setdefault((problem, prefix), [])
                if key not in self.cache.rows and key not in absent:
                    absent.append(key)
        # Shared out by prefix, so that a prompt is read on one rank only.
        to_draw = [(start, absent) for start, absent in missing.items() if absent]
        own = to_draw[self.cache.rank::self.cache.ranks]
        if own:
            self._draw_missing(own, label)
        self.cache.share()

        drawn = []
        for keys in wanted:
            rows = [self.cache.rows[key] for key in keys]
            drawn.append([Sample.of(row) for row in rows])
        return drawn

    def _draw_missing(self, missing: list[tuple[tuple[Problem, str], list[str]]], label: str) -> None:
        """Draw the samples with these keys of each problem and prefix, into the cache, batch by batch."""
        prompts = self._prompts([start for start, _ in missing])
        wanted = []   # what a sampler takes: the prompt's ids and the sample's name
        origins = []  # of each of them its key, problem and prefix
        for ((problem, prefix), keys), prompt in zip(missing, prompts, strict=True):
            for key in keys:
                wanted.append((prompt, f"{self.settings.seed} {key}"))
                origins.append((key, problem, prefix))

        right = done = tokens = 0
        began = time.monotonic()
        with progress(None, label, total=len(wanted), unit="sample", mininterval=1) as bar:
            for batch in self.sampler.sample(wanted):
                rows = [graded_row(*origins[i], continuation) for i, continuation in batch]
                self.cache.add(rows)
                right += sum(row["correct"] for row in rows)
                tokens += sum(row["tokens"] for row in rows)
                done += len(rows)
                speed = tokens / (time.monotonic() - began)
                bar.set_postfix_str(f"{right / done:.1%} right, {speed:.0f} tokens/s", refresh=False)
                bar.update(len(rows))
        self.tokens += tokens

    def _prompts(self, starts: list[tuple[Problem, str]]) -> list[list[int]]:
        """The token ids of each problem in its template, with the beginning of its answer."""
        settings = self.settings
        texts, where = [], []
        for problem, prefix in starts:
            token = control_token_in(problem.prompt, self.control_tokens)
            if token:
                raise InputError(f"the problem {problem.prompt[:60]!r} holds the control token {token!r}; "
                                 "remove it there, or the problem")
            opened = open_turn(self.tokenizer, problem.prompt, settings.template, settings.instruction,
                               settings.template_args)
            texts.append(opened + prefix)
            where.append(f"the problem {problem.prompt[:60]!r}")
        return tokenize(self.tokenizer, texts, settings.template, where)


class Continuation(NamedTuple):
    """What a model has written after a prompt, as a sampler draws it."""

    text: str
    tokens: int
    cut: bool  # ended by max_new_tokens or for lack of positions, not by the model


def graded_row(key: str, problem: Problem, prefix: str, drawn: Continuation) -> dict:
    """A row of the cache: the continuation with its prefix, and whether its answer is right."""
    solution = prefix + drawn.text
    graded = solution.rpartition("\n")[0] if drawn.cut else solution  # a line that was cut off is no answer
    return {"key": key, "prompt": problem.prompt, "answer": problem.answer, "solution": solution,
            "predicted": extract_answer(graded), "correct": is_correct(graded, problem.answer),
            "cut": drawn.cut, "tokens": drawn.tokens}


# ----------------------------------------------------------------------------------------------- the samplers
# A sampler has one method: sample(wanted) takes pairs of prompt ids and the name of the sample, and yields
# lists of (index in wanted, Continuation) as they are made. Equal names give equal samples.


class ServerSampler:
    """An OpenAI-compatible server. Prompts go as token ids: exactly what is trained on."""

    # An absent field takes the server's default, which vLLM has from the model's generation_config.json.
    neutral = {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0, "presence_penalty": 0.0,
               "frequency_penalty": 0.0}

    def __init__(self, settings: Settings, tokenizer: Any):
        self.settings, self.tokenizer = settings, tokenizer

    def sample(self, wanted: list[tuple[list[int], str]]) -> Iterator[list[tuple[int, Continuation]]]:
        settings = self.settings
        common = {"model": settings.server_model, "max_tokens": settings.max_new_tokens, "n": 1,
                  "temperature": settings.temperature, "top_p": settings.top_p, **self.neutral,
                  "stream": False}
        bodies = [{**common, "prompt": ids, "seed": int(content_key(name)[:7], 16)} for ids, name in wanted]

        for i, (text, tokens, cut) in post_all(settings.server, "completions", bodies, settings.concurrency,
                                               self._read):
            # Not every server counts, or rightly. Not in `_read`, because tokenizers dislike threads.
            if type(tokens) is not int or not 0 <= tokens <= settings.max_new_tokens:
                tokens = len(self.tokenizer(text, add_special_tokens=False).input_ids)
            yield [(i, Continuation(text, tokens, cut))]

    def _read(self, reply: dict) -> tuple[str, Any, bool]:
        """(text, tokens if the server says how many, whether it was cut) or whatever an odd reply raises."""
        choice, usage = reply["choices"][0], reply.get("usage")
        text, ended_by = choice["text"], choice["finish_reason"]
        if ended_by not in ("stop", "length"):  # as "abort" or "error", of which the text is only a part
            raise ValueError(f"finish_reason is {ended_by!r}")
        if len(text.encode()) > 1000 * self.settings.max_new_tokens:  # encode: no half characters either
            raise ValueError(f"text of {len(text)} characters, more than max_tokens can be")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return text, tokens, ended_by == "length"


class LocalSampler:
    """A model in this process, loaded when first needed.

    Each sample draws from random numbers of its own, by its name; so it depends neither on the rest of the
    batch nor on stops in between (up to rounding). Equal prompts are read once, and what has ended leaves the
    batch.
    """

    def __init__(self, settings: Settings, tokenizer: Any):
        cuda = torch.cuda.is_available()
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
        self.settings, self.tokenizer = settings, tokenizer
        self.budget = settings.batch_tokens or (131072 if cuda else 16384)
        self.is_checked = False  # that batches do not change what the model says

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModelForCausalLM
        folder = self.settings.model
        dtype = self.settings.dtype or ("bfloat16" if self.device != "cpu" else "float32")
        with reading(folder):
            model, found = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True,
                use_safetensors=True, ignore_mismatched_sizes=True)  # they are in `found` then, by name
            model = model.to(self.device).eval()
        refuse_other_tensors(folder, model, found)
        return model

    @cached_property
    def end_tokens(self) -> set[int]:
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        with reading(self.settings.model):
            return {int(end) for end in ends if end is not None}

    @cached_property
    def limit(self) -> float:
        """Tokens of prompt and continuation together at most."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    def sample(self, wanted: list[tuple[list[int], str]]) -> Iterator[list[tuple[int, Continuation]]]:
        """Batches of prompts of similar length, as large as the budget allows, halved if memory runs out."""
        def room(i: int) -> int:
            return min(len(wanted[i][0]) + self.settings.max_new_tokens, self.limit)

        for ids, _ in wanted:
            self._refuse_unreadable(ids)
        if wanted and not self.is_checked:
            self._self_check(max((ids for ids, _ in wanted), key=len))
            self.is_checked = True
        order = sorted(range(len(wanted)), key=lambda i: (len(wanted[i][0]), wanted[i]))
        while order:
            size = 1  # of the sorted prompts the last is the longest, and all are padded to it
            while size < len(order) and (size + 1) * room(order[size]) <= self.budget:
                size += 1
            batch = order[:size]

            continuations = self._draw_or_none([wanted[i] for i in batch])
            if continuations is None:
                self.budget = size * room(batch[-1]) // 2
                continue
            yield list(zip(batch, continuations, strict=True))
            order = order[size:]

    def _refuse_unreadable(self, ids: list[int]) -> None:
        folder, embeddings = self.settings.model, len(self.model.get_input_embeddings().weight)
        if max(ids) >= embeddings:
            raise InputError(f"{folder}: its tokenizer gives token {max(ids)}, but its model knows only "
                             f"{embeddings}; use the tokenizer that belongs to the model")
        if len(ids) >= self.limit:
            begin = self.tokenizer.decode(ids, skip_special_tokens=True)[:200]
            raise InputError(f"{folder}: takes {self.limit} tokens at most (max_position_embeddings), and a "
                             f"prompt has {len(ids)}; remove its problem: {begin!r}...")

    @torch.inference_mode()
    def _self_check(self, prompt: Sequence[int]) -> None:
        """Raise InputError if the model answers otherwise in a batch than alone.

        Recurrent layers have no keys and values to go on from, and padding is text to some models. The
        prompt, cut short in two ways, is read as `_draw` reads prompts, and as plain sequences.
        """
        try:
            difference = self._change_by_batching(prompt)
        except Exception as error:  # whatever a model does with a cache that is not its own
            if ran_out_of_memory(error):
                raise
            problem = f"fails there ({in_one_line(error)})"
        else:
            # In bf16 rounding moves probabilities by some percent, and more where it chooses experts.
            allowed = 1e-3 if self.model.dtype == torch.float32 else 0.25
            if difference <= allowed:
                return
            problem = f"says something else there than alone (by {difference:.2g} of all probability)"
        folder = self.settings.model
        refuse_model(type(self.model).__name__, (
            f"this process samples in padded batches with a key-value cache, and {folder} {problem}; "
            f"start a server for it, as `vllm serve {folder}`, and pass --server and --server-model"))

    def _change_by_batching(self, prompt: Sequence[int]) -> float:
        """The part of the next token's probability that is moved. Not of numbers that are not finite, which
        `_choose` refuses."""
        length = int(min(len(prompt), 40, self.limit - 2))
        if length < 1:
            return 0.0
        sequences = [list(prompt[:length]), list(prompt[:length // 3 + 1])]
        mask, logits, kv_cache = self._read_prompts(sequences)
        order = torch.tensor([1, 0, 1], device=self.device)  # a prompt may have several samples
        kv_cache.batch_select_indices(order)
        mask, logits = mask[order], logits[order]
        sequences = [list(sequences[i]) for i in order.tolist()]

        most = 0.0
        for new_tokens in range(3):
            if new_tokens > 0:
                token = logits.argmax(-1)
                for ids, new in zip(sequences, token.tolist(), strict=True):
                    ids.append(new)
                mask, logits = self._read_token(token, mask, kv_cache)
            if not logits.isfinite().all():
                return 0.0
            for ids, in_batch in zip(sequences, logits.float().softmax(-1), strict=True):
                alone = self.model(torch.tensor([ids], device=self.device), use_cache=False).logits[0, -1]
                moved = (alone.float().softmax(-1) - in_batch).abs().sum().item() / 2
                most = max(most, moved)
        return most

    def _draw_or_none(self, wanted: list[tuple[list[int], str]]) -> list[Continuation] | None:
        """The continuations of a batch, or None if memory runs out."""
        try:
            return self._draw(wanted)
        except RuntimeError as error:
            if len(wanted) == 1 or not ran_out_of_memory(error):
                raise
        # Outside of `except`, because the exception keeps the failed batch alive.
        torch.cuda.empty_cache()
        tqdm.write("out of memory: batches are halved (a smaller --batch-tokens avoids this)", sys.stderr)
        return None

    @torch.inference_mode()
    def _draw(self, wanted: list[tuple[list[int], str]]) -> list[Continuation]:
        """The continuations of one batch."""
        prompts = [tuple(ids) for ids, _ in wanted]
        different = list(dict.fromkeys(prompts))  # equal prompts are read once
        place = {prompt: i for i, prompt in enumerate(different)}
        of_sample = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
        mask, logits, kv_cache = self._read_prompts(different)
        kv_cache.batch_select_indices(of_sample)  # from one sequence a prompt to one a sample
        mask, logits = mask[of_sample], logits[of_sample]

        new_tokens: list[list[int]] = [[] for _ in wanted]
        random_numbers = [random.Random(name) for _, name in wanted]
        alive = list(range(len(wanted)))  # the samples that have not ended: what is in the batch
        while True:
            token = self._choose(logits, [random_numbers[i].random() for i in alive])
            for i, chosen in zip(alive, token.tolist(), strict=True):
                new_tokens[i].append(chosen)

            stay = [j for j, i in enumerate(alive) if not self._has_ended(prompts[i], new_tokens[i])]
            if not stay:
                break
            if len(stay) < len(alive):  # what has ended costs nothing from here on
                alive = [alive[j] for j in stay]
                index = torch.tensor(stay, device=self.device)
                kv_cache.batch_select_indices(index)
                mask, token = mask[index], token[index]
            mask, logits = self._read_token(token, mask, kv_cache)

        return [self._continuation(ids, new) for (ids, _), new in zip(wanted, new_tokens, strict=True)]

    def _read_prompts(self, prompts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Any]:
        """(attention mask (N, width), next-token logits (N, V), key-value cache) of N left-padded prompts."""
        width = max(len(prompt) for prompt in prompts)
        ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt):] = torch.tensor(prompt)
            mask[i, width - len(prompt):] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)

        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        return mask, out.logits[:, -1], out.past_key_values

    def _read_token(self, token: Tensor, mask: Tensor, kv_cache: Any) -> tuple[Tensor, Tensor]:
        """(attention mask, next-token logits) after one more token (N,) of each sequence."""
        mask = torch.cat([mask, mask.new_ones(len(token), 1)], 1)
        position = mask.sum(1, keepdim=True) - 1
        out = self.model(token[:, None], attention_mask=mask, position_ids=position, use_cache=True,
                         past_key_values=kv_cache)
        return mask, out.logits[:, -1]

    def _has_ended(self, ids: Sequence[int], new: list[int]) -> bool:
        most = min(self.settings.max_new_tokens, self.limit - len(ids))
        return new[-1] in self.end_tokens or len(new) >= most

    def _choose(self, logits: Tensor, numbers: list[float]) -> Tensor:
        """(N,) tokens by (N, V) logits: the likeliest, or by a uniform number each one of the nucleus."""
        top_p = self.settings.top_p
        if not logits.isfinite().all():
            raise InputError(f"{self.settings.model}: its logits are not finite, so nothing can be sampled")
        if self.settings.temperature == 0:
            return logits.argmax(-1)
        probabilities = (logits.float() / self.settings.temperature).softmax(-1)

        size = 64  # the nucleus is nearly always small, so the whole vocabulary need not be sorted
        while True:
            best, tokens = probabilities.topk(min(size, probabilities.shape[1]))
            before = best.cumsum(-1) - best  # mass of all likelier tokens; the first is always in
            if size >= probabilities.shape[1] or before[:, -1].min() >= top_p:
                break
            size *= 16
        # A number picks the token whose interval of the nucleus' mass it falls into.
        mass = (best * (before < top_p)).cumsum(-1)
        point = torch.tensor(numbers, device=mass.device)[:, None] * mass[:, -1:]
        drawn = torch.searchsorted(mass, point, right=True).clamp(max=mass.shape[1] - 1)
        return tokens.gather(1, drawn)[:, 0]

    def _continuation(self, ids: list[int], new: list[int]) -> Continuation:
        # Decoded behind its prompt, because some tokenizers drop the space at the beginning of a text.
        before = self.tokenizer.decode(ids, skip_special_tokens=True)
        whole = self.tokenizer.decode(ids + new, skip_special_tokens=True)
        return Continuation(whole[len(before):], len(new), new[-1] not in self.end_tokens)


def ran_out_of_memory(error: Exception) -> bool:
    # For CPU memory there is no exception of its own.
    return bool(re.search("out of memory|can't allocate memory", str(error)))


def refuse_other_tensors(folder: str, model: Any, found: dict[str, Any]) -> None:
    """Raise InputError if a number of the model is not finite, or not from its folder: it is random then."""
    mismatched = [name for name, *_ in found["mismatched_keys"]]
    left_over = [name for name in found["unexpected_keys"] if not name.endswith("inv_freq")]  # recomputed
    for kind, names in (("missing", found["missing_keys"]), ("of another shape", mismatched),
                        ("left over", left_over)):
        if names:
            raise InputError(f"{folder}: its tensors are not those of {type(model).__name__} with its "
                             f"config.json: {kind}: {', '.join(sorted(names)[:3])} ({len(names)} in all)")
    for name, tensor in model.named_parameters():
        if tensor.dtype in FLOATS.values() and not tensor.isfinite().all():
            raise InputError(f"{folder}: {name} holds numbers that are not finite: the file is damaged, "
                             "or the model is")
