"""Samples of a model, drawn in this process or on a server, and one cache that makes every stage restartable.

The stages ask for samples 0 .. n-1 of how the model goes on after some prefix. What was drawn before is read
from the cache, only the rest is drawn, and every batch is on disk before the next one begins. So a run that
was stopped at any point runs again from the start, and finds all it did.
"""

import glob
import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import (
    InputError,
    content_key,
    model_identity,
    open_turn,
    parse_json,
    print0,
    read_bytes,
    read_tokenizer,
    tokenize,
)

from .grading import extract_answer, is_correct
from .problems import Problem


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn. What they are depends on all but the last five fields."""

    model: str                     # folder or hub name; with a server only its tokenizer is used
    template: str = "chat"
    instruction: str | None = None
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
        """All that a sample depends on, besides what it goes on from."""
        names = ("template", "instruction", "temperature", "top_p", "max_new_tokens", "seed", "dtype")
        model = self.server_model or model_identity(self.model)
        return {"model": model, **{name: getattr(self, name) for name in names}}


class Sample(NamedTuple):
    solution: str           # what it went on from, and the continuation
    predicted: str | None   # its final answer
    correct: bool
    cut: bool               # ended by max_new_tokens, not by the model
    tokens: int             # of the continuation

    @property
    def passes(self) -> bool:
        return self.correct and not self.cut


# -------------------------------------------------------------------------------------------------- the cache


def rank_and_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Cache:
    """A JSONL file of rows, each under a key, that is only ever added to.

    Its first line are the settings that all rows depend on; with others the file is refused. Each rank of
    torchrun adds to a file of its own (FILE.jsonl, FILE.rank1.jsonl, ...), and reads all of them. A last line
    that a kill -9 tore is dropped.
    """

    def __init__(self, path: str, settings: dict[str, Any]):
        self.rows: dict[str, dict] = {}
        self.unshared: list[dict] = []
        self.rank, self.ranks = rank_and_ranks()
        stem = path.removesuffix(".jsonl")
        self.path = path if self.rank == 0 else f"{stem}.rank{self.rank}.jsonl"

        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        for file in (path, *sorted(glob.glob(f"{glob.escape(stem)}.rank*.jsonl"))):
            if os.path.exists(file):
                self._read(file, settings)
        if self.ranks > 1:
            dist.barrier()  # what others add from now on comes by `share`
        self._begin_own_file(settings)

    def _read(self, path: str, settings: dict[str, Any]) -> None:
        lines = _complete(read_bytes(path)).splitlines()
        for number, line in enumerate(lines, 1):
            row = parse_json(f"{path}:{number}", line)
            if number > 1:
                self.rows.setdefault(row["key"], row)
                continue
            known = row.get("settings", {})
            for name, value in settings.items():
                if known.get(name) != value:
                    raise InputError(f"{path}: was made with {name} = {known.get(name)!r}, and this is "
                                     f"{value!r}; use the same setting to continue it, or another --out")

    def _begin_own_file(self, settings: dict[str, Any]) -> None:
        with open(self.path, "a+b") as file:
            file.seek(0)
            complete = _complete(file.read())
            file.truncate(len(complete))
            if not complete:
                file.write(json.dumps({"settings": settings}).encode() + b"\n")

    def add(self, rows: list[dict]) -> None:
        """Rows with their `key`, on disk when this returns."""
        with open(self.path, "ab") as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.unshared += rows
        self.rows.update({row["key"]: row for row in rows})

    def share(self) -> None:
        """Give what was added to the other ranks, and take what they added. Collective."""
        if self.ranks > 1:
            added: list = [None] * self.ranks
            dist.all_gather_object(added, self.unshared)
            for rows in added:
                self.rows.update({row["key"]: row for row in rows})
        self.unshared = []


def _complete(content: bytes) -> bytes:
    """Without a last line that does not end."""
    return content[:content.rfind(b"\n") + 1]


class Samples:
    """Samples of one model, by what they go on from."""

    def __init__(self, path: str, sampling: Sampling, sampler: Any = None, tokenizer: Any = None):
        self.cache, self.sampling = Cache(path, sampling.identity()), sampling
        self.tokenizer = tokenizer or read_tokenizer(sampling.model)
        kind = ServerSampler if sampling.server else LocalSampler
        self.sampler = sampler or kind(sampling, self.tokenizer)
        self.tokens, self.began = 0, time.monotonic()  # of this rank

    def draw(self, prefixes: list[tuple[Problem, str]], count: int, first: int = 0,
             desc: str = "sampling") -> list[list[Sample]]:
        """Samples first .. first + count - 1 of how the model goes on after each prefix of an answer.

        A prefix ends in `Step k:`, or is empty. Equal prefixes have equal samples. Collective: the ranks
        share what has to be drawn, and all return all.
        """
        missing = {}
        for problem, prefix in prefixes:
            name = problem.key(prefix)
            numbers = [n for n in range(first, first + count) if f"{name} {n}" not in self.cache.rows]
            if numbers:
                missing[name] = (problem, prefix, numbers)
        # Shared by prefix, so that a prompt is read on one rank only.
        self._draw_missing(list(missing.items())[self.cache.rank::self.cache.ranks], desc)
        self.cache.share()

        drawn = []
        for problem, prefix in prefixes:
            keys = [f"{problem.key(prefix)} {n}" for n in range(first, first + count)]
            drawn.append([_sample(self.cache.rows[key]) for key in keys])
        return drawn

    def _draw_missing(self, missing: list, desc: str) -> None:
        texts = [open_turn(self.tokenizer, problem.prompt, self.sampling.template, self.sampling.instruction)
                 + prefix for _, (problem, prefix, _) in missing]
        ids = tokenize(self.tokenizer, texts, self.sampling.template)
        origins, wanted = [], []  # of each sample: what it goes on from; its token ids and its name
        for (name, (problem, prefix, numbers)), prompt in zip(missing, ids, strict=True):
            for n in numbers:
                origins.append((f"{name} {n}", problem, prefix))
                wanted.append((prompt, f"{self.sampling.seed} {name} {n}"))
        if not wanted:
            return

        right = done = 0
        with tqdm(total=len(wanted), desc=desc, unit="sample", disable=self.cache.rank > 0, mininterval=1,
                  leave=False) as bar:
            for batch in self.sampler.sample(wanted):
                rows = [_graded_row(*origins[i], continuation) for i, continuation in batch]
                self.cache.add(rows)
                self.tokens += sum(row["tokens"] for row in rows)
                right += sum(row["correct"] for row in rows)
                done += len(rows)
                bar.set_postfix_str(f"{right / done:.1%} right, {self.rate():.0f} tokens/s", refresh=False)
                bar.update(len(rows))

    def rate(self) -> float:
        """Tokens per second that this rank has sampled so far."""
        return self.tokens / (time.monotonic() - self.began)


class Continuation(NamedTuple):
    """What a sampler draws."""

    text: str
    tokens: int
    cut: bool


def _graded_row(key: str, problem: Problem, prefix: str, drawn: Continuation) -> dict:
    solution = prefix + drawn.text
    graded = solution.rpartition("\n")[0] if drawn.cut else solution  # a line that was cut off is no answer
    return {"key": key, "prompt": problem.prompt, "answer": problem.answer, "solution": solution,
            "predicted": extract_answer(graded), "correct": is_correct(graded, problem.answer),
            "cut": drawn.cut, "tokens": drawn.tokens}


def _sample(row: dict) -> Sample:
    return Sample(*(row[name] for name in Sample._fields))


# ----------------------------------------------------------------------------------- sampling in this process
# A sampler has one method: sample(wanted) takes pairs of prompt ids and the name of the sample, and yields
# lists of (index in wanted, Continuation) as they are made. Equal names give equal samples.


class LocalSampler:
    """A model in this process, loaded when first needed.

    Each sample draws from random numbers of its own, by its name; so it depends neither on the rest of the
    batch nor on stops in between (up to rounding). Equal prompts are read once, and what has ended leaves the
    batch.
    """

    def __init__(self, sampling: Sampling, tokenizer: Any):
        cuda = torch.cuda.is_available()
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
        self.sampling, self.tokenizer = sampling, tokenizer
        self.budget = sampling.batch_tokens or (131072 if cuda else 16384)

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModelForCausalLM
        dtype = self.sampling.dtype or ("bfloat16" if self.device != "cpu" else "float32")
        model = AutoModelForCausalLM.from_pretrained(self.sampling.model, dtype=getattr(torch, dtype))
        return model.to(self.device).eval()

    @cached_property
    def end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def sample(self, wanted: list[tuple[list[int], str]]) -> Iterator[list[tuple[int, Continuation]]]:
        """Batches of prompts of similar length, as large as the budget allows, halved if memory runs out."""
        order = sorted(range(len(wanted)), key=lambda i: (len(wanted[i][0]), wanted[i]))
        while order:
            size = 1  # of the sorted prompts the last is the longest, and all are padded to it
            while size < len(order) and (size + 1) * self._room(wanted[order[size]]) <= self.budget:
                size += 1
            batch = order[:size]

            continuations = self._draw_or_none([wanted[i] for i in batch])
            if continuations is None:
                self.budget = size * self._room(wanted[batch[-1]]) // 2
                print0("out of memory: batches are halved (a smaller --batch-tokens avoids this)")
                continue
            yield list(zip(batch, continuations, strict=True))
            order = order[size:]

    def _room(self, item: tuple[list[int], str]) -> int:
        return len(item[0]) + self.sampling.max_new_tokens

    def _draw_or_none(self, wanted: list[tuple[list[int], str]]) -> list[Continuation] | None:
        """None if memory runs out. Returns before it is tried again, as the exception holds on to memory."""
        try:
            return self._draw(wanted)
        except RuntimeError as error:  # for CPU memory there is no exception of its own
            if len(wanted) == 1 or not re.search("out of memory|can't allocate memory", str(error)):
                raise
        torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def _draw(self, wanted: list[tuple[list[int], str]]) -> list[Continuation]:
        prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(tuple(ids) for ids, _ in wanted))}
        mask, logits, kv_cache = self._read_prompts(list(prompts))
        rows = torch.tensor([prompts[tuple(ids)] for ids, _ in wanted], device=self.device)
        kv_cache.batch_select_indices(rows)  # from one row a prompt to one row a sample
        mask, logits = mask[rows], logits[rows]

        new_tokens: list[list[int]] = [[] for _ in wanted]
        random_numbers = [random.Random(name) for _, name in wanted]
        alive = list(range(len(wanted)))
        while True:
            token = self._choose(logits, [random_numbers[i].random() for i in alive])
            for i, chosen in zip(alive, token.tolist(), strict=True):
                new_tokens[i].append(chosen)

            stay = [j for j, i in enumerate(alive) if not self._has_ended(new_tokens[i])]
            if not stay:
                return [self._continuation(ids, new)
                        for (ids, _), new in zip(wanted, new_tokens, strict=True)]
            if len(stay) < len(alive):  # what has ended costs nothing from here on
                alive = [alive[j] for j in stay]
                index = torch.tensor(stay, device=self.device)
                kv_cache.batch_select_indices(index)
                mask, token = mask[index], token[index]

            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            position = mask.sum(1, keepdim=True) - 1
            logits = self.model(token[:, None], attention_mask=mask, position_ids=position, use_cache=True,
                                past_key_values=kv_cache).logits[:, -1]

    def _read_prompts(self, prompts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Any]:
        """(attention mask (N, width), next-token logits (N, V), key-value cache) of N left-padded prompts."""
        width = max(len(prompt) for prompt in prompts)
        ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt):] = torch.tensor(prompt)
            mask[row, width - len(prompt):] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)

        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        return mask, out.logits[:, -1], out.past_key_values

    def _has_ended(self, new: list[int]) -> bool:
        return new[-1] in self.end_tokens or len(new) >= self.sampling.max_new_tokens

    def _choose(self, logits: Tensor, numbers: list[float]) -> Tensor:
        """(N,) tokens of (N, V) logits: the likeliest, or of the top-p nucleus, by a uniform number a row."""
        top_p = self.sampling.top_p
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        probabilities = (logits.float() / self.sampling.temperature).softmax(-1)

        size = 64  # the nucleus is nearly always small, so the whole vocabulary need not be sorted
        while True:
            best, tokens = probabilities.topk(min(size, probabilities.shape[1]))
            before = best.cumsum(-1) - best  # mass of all likelier tokens; the first is always in
            if size >= probabilities.shape[1] or before[:, -1].min() >= top_p:
                break
            size *= 16
        # One number per row picks the token whose interval of the nucleus' mass it falls into.
        mass = (best * (before < top_p)).cumsum(-1)
        point = torch.tensor(numbers, device=mass.device)[:, None] * mass[:, -1:]
        drawn = torch.searchsorted(mass, point, right=True).clamp(max=mass.shape[1] - 1)
        return tokens.gather(1, drawn)[:, 0]

    def _continuation(self, ids: list[int], new: list[int]) -> Continuation:
        # Decoded behind its prompt, because some tokenizers drop the space at the beginning of a text.
        before = self.tokenizer.decode(ids, skip_special_tokens=True)
        whole = self.tokenizer.decode(ids + new, skip_special_tokens=True)
        return Continuation(whole[len(before):], len(new), new[-1] not in self.end_tokens)


# --------------------------------------------------------------------------------------- sampling on a server


class ServerSampler:
    """An OpenAI-compatible server. Prompts go as token ids: exactly what is trained on."""

    def __init__(self, sampling: Sampling, tokenizer: Any):
        self.sampling = sampling

    def sample(self, wanted: list[tuple[list[int], str]]) -> Iterator[list[tuple[int, Continuation]]]:
        # All sampling fields are sent, because an absent one takes the server's own default.
        settings = {"model": self.sampling.server_model, "max_tokens": self.sampling.max_new_tokens,
                    "temperature": self.sampling.temperature, "top_p": self.sampling.top_p,
                    "n": 1, "stream": False}
        bodies = [{**settings, "prompt": ids, "seed": int(content_key(name)[:7], 16)} for ids, name in wanted]
        replies = post_all(self.sampling.server, "completions", bodies, self.sampling.concurrency,
                           self._continuation)
        for i, continuation in replies:
            yield [(i, continuation)]

    @staticmethod
    def _continuation(reply: dict) -> Continuation:
        choice = reply["choices"][0]
        return Continuation("" + choice["text"], reply["usage"]["completion_tokens"],
                            choice["finish_reason"] == "length")


TRIES = 6        # of a request
PAUSE = 1.0      # seconds before the second try; then twice as long each time
TIMEOUT = 600.0  # seconds for one try


def post(url: str, body: dict) -> dict:
    """POST JSON and return the JSON reply.

    Connection errors, broken replies, 408, 409, 429 and 5xx are tried again after a growing, jittered pause
    (or what Retry-After says); any other status is an InputError at once.
    """
    key = os.environ.get("OPENAI_API_KEY", "")  # never printed: servers repeat it in their errors
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"

    for attempt in range(TRIES):
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
            retry_after = error.headers.get("Retry-After", "")
            if re.fullmatch(r"\d+(\.\d+)?", retry_after):
                pause = min(float(retry_after), 120)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not all JSON
            problem = f"{type(error).__name__}: {error}"
        if attempt < TRIES - 1:
            time.sleep(pause)
    raise InputError(f"{url}: gave up after {TRIES} tries, the last: {problem}; the same command continues")


def post_all(server: str, path: str, bodies: list[dict], concurrency: int,
             take: Callable[[dict], Any]) -> Iterator[tuple[int, Any]]:
    """Post all bodies to /v1/`path`, so many at a time; yields (index, take(reply)) as they come."""
    url = f"{server.rstrip('/').removesuffix('/v1')}/v1/{path}"

    def post_one(body: dict) -> Any:
        reply = post(url, body)
        try:
            return take(reply)
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{url}: not the reply of an OpenAI-compatible server ({type(error).__name__}: "
                             f"{error}): {json.dumps(reply)[:300]}") from None

    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = {pool.submit(post_one, body): i for i, body in enumerate(bodies)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
