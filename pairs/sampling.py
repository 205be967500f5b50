"""Samples of a model, drawn in this process or by a server, each of them only once.

The stages ask for samples 0 .. n-1 of how the model goes on after some prefix of an answer. What was drawn
before is read from the cache, only the rest is drawn, and every batch is on disk before the next one begins.
So a run that was stopped at any point runs again from its start, and finds all it did.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from data import open_turn, tokenize
from runtime.files import content_key
from runtime.messages import InputError, progress
from runtime.templates import control_token_in, control_tokens, read_tokenizer, with_date
from runtime.weights import check_config

from .cache import Cache, recorded_args
from .grading import extract_answer, is_correct
from .local import LocalSampler
from .problems import Problem
from .server import post_all
from .settings import Continuation, Settings


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


def graded_row(key: str, problem: Problem, prefix: str, drawn: Continuation) -> dict:
    """A row of the cache: the continuation with its prefix, and whether its answer is right."""
    solution = prefix + drawn.text
    graded = solution.rpartition("\n")[0] if drawn.cut else solution  # a line that was cut off is no answer
    return {"key": key, "prompt": problem.prompt, "answer": problem.answer, "solution": solution,
            "predicted": extract_answer(graded), "correct": is_correct(graded, problem.answer),
            "cut": drawn.cut, "tokens": drawn.tokens}


# ----------------------------------------------------------------------------------------------- the samplers
# A sampler has one method: sample(wanted) takes pairs of prompt ids and the name of the sample, and yields
# lists of (index in wanted, Continuation) as they are made. Equal names give equal samples. The other one,
# LocalSampler, is in local.py.


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
