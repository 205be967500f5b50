"""Samples of a model in this process.

What prompts begin with is read once: their keys and values are kept, for the prompts of this batch and of
later ones. Rollouts of a solution share its problem and nearly all of its steps.
"""

import math
import os
import random
import re
import sys
from bisect import insort
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

from runtime.messages import InputError, in_one_line, refuse_model
from runtime.weights import FLOATS, reading

from .batch import Batch, left_padded
from .keyvalues import KeyValues, TextKeyValues, nearest
from .settings import Continuation, Settings

Prompt = tuple[int, ...]  # of token ids


class LocalSampler:
    """A model in this process, loaded when first needed.

    Each sample draws from random numbers of its own, by its name; so it depends neither on the rest of the
    batch nor on stops in between (up to rounding). What has ended leaves the batch.
    """

    def __init__(self, settings: Settings, tokenizer: Any):
        self.device = local_device()
        if self.device != "cpu":
            torch.cuda.set_device(self.device)  # graphs are captured on the current one
        self.settings, self.tokenizer = settings, tokenizer
        self.budget = settings.batch_tokens or (16384 if self.device == "cpu" else 131072)
        self.is_checked = False  # that batches do not change what the model says
        self.known: dict[Prompt, TextKeyValues] = {}  # what was read, the latest last
        self.known_share = 0.5  # of the budget, that `known` may take

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModelForCausalLM  # here, as --help need not wait for it
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

        Recurrent layers have no keys and values to go on from, and padding is text to some models. Texts
        made of the prompt are read as `_draw` reads prompts, and as plain sequences. Graphs and ready masks
        are only for speed; where answers change with them, they are not used.
        """
        problem = self._problem_of_batching(prompt)
        if problem and self.uses_graphs:
            self._give_up_graphs(problem)
            problem = self._problem_of_batching(prompt)
        if problem and self.ready_masks:
            self.ready_masks = False
            problem = self._problem_of_batching(prompt)
        if problem:
            folder = self.settings.model
            refuse_model(type(self.model).__name__, (
                f"this process samples in padded batches with a key-value cache, and {folder} {problem}; "
                f"start a server for it, as `vllm serve {folder}`, and pass --server and --server-model"))

    def _problem_of_batching(self, prompt: Sequence[int]) -> str | None:
        try:
            difference = self._change_by_batching(prompt)
        except Exception as error:  # whatever a model does with a cache that is not its own
            if ran_out_of_memory(error):
                raise
            return f"fails there ({in_one_line(error)})"
        # In bf16 rounding moves probabilities by some percent, and more where it chooses experts.
        allowed = 1e-3 if self.model.dtype == torch.float32 else 0.25
        if difference > allowed:
            return f"says something else there than alone (by {difference:.2g} of all probability)"
        return None

    def _change_by_batching(self, prompt: Sequence[int]) -> float:
        """The part of the next token's probability that is moved. Not of numbers that are not finite, which
        `_choose` refuses."""
        length = int(min(len(prompt), 40, self.limit - 2))
        if length < 1:
            return 0.0
        whole, half = tuple(prompt[:length]), tuple(prompt[:length // 2])
        # One begins another, one goes on otherwise after a half, and one has nothing in common with them.
        texts = [whole, whole[:length // 3 + 1], half + whole[::-1][:length // 4 + 1], whole[::-1]]
        texts += [texts[1]]  # a prompt may have several samples
        try:
            batch, logits = self._begin(texts, 3)
        finally:
            self.known.clear()

        most = 0.0
        for new_tokens in range(3):
            if new_tokens > 0:
                token = logits.argmax(-1)
                texts = [(*ids, new) for ids, new in zip(texts, token.tolist(), strict=True)]
                logits = self._read_token(token, batch)
            if not logits.isfinite().all():
                return 0.0
            for ids, in_batch in zip(texts, logits.float().softmax(-1), strict=True):
                alone = self.model(torch.tensor([ids], device=self.device), use_cache=False).logits[0, -1]
                moved = (alone.float().softmax(-1) - in_batch).abs().sum().item() / 2
                most = max(most, moved)
        return most

    def _draw_or_none(self, wanted: list[tuple[list[int], str]]) -> list[Continuation] | None:
        """The continuations of a batch, or None if memory runs out though nothing is kept beside it."""
        can_free = len(self.known) > 0
        try:
            return self._draw(wanted)
        except RuntimeError as error:
            if not ran_out_of_memory(error) or (len(wanted) == 1 and not can_free):
                raise
        # Outside of `except`, because the exception keeps the failed batch alive.
        self.known.clear()
        torch.cuda.empty_cache()
        if can_free:
            self.known_share /= 2  # or it would run out again, batch after batch
            tqdm.write("out of memory: what was read before is dropped, less of it is kept from now on, and "
                       "the batch is drawn again (a smaller --batch-tokens avoids this)", sys.stderr)
            return self._draw_or_none(wanted)
        tqdm.write("out of memory: batches are halved (a smaller --batch-tokens avoids this)", sys.stderr)
        return None

    @torch.inference_mode()
    def _draw(self, wanted: list[tuple[list[int], str]]) -> list[Continuation]:
        """The continuations of one batch."""
        prompts = [tuple(ids) for ids, _ in wanted]
        most = max(self._most_new(prompt) for prompt in prompts)
        batch, logits = self._begin(prompts, most)
        self._forget()

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
                order, token = batch.drop_all_but(stay, token)
                alive = [alive[j] for j in order]
            logits = self._read_token(token, batch)

        return [self._continuation(ids, new) for (ids, _), new in zip(wanted, new_tokens, strict=True)]

    def _begin(self, prompts: list[Prompt], most: int) -> tuple[Batch, Tensor]:
        """A batch of these prompts, with room for `most` more tokens, and the next-token logits (N, V)."""
        different = list(dict.fromkeys(prompts))
        logits = self._read_prompts(different)
        self._forget(set(different))  # before the batch takes its memory
        place = {prompt: i for i, prompt in enumerate(different)}
        of_sample = torch.tensor([place[prompt] for prompt in prompts], device=self.device)

        width = max(map(len, prompts))
        kv_cache = KeyValues(len(prompts), width + most)
        kv_cache.begin([self.known[prompt] for prompt in different], [len(prompt) for prompt in different],
                       width, of_sample)
        batch = Batch(self.model, kv_cache, [len(prompt) for prompt in prompts], most, self.ready_masks)
        return batch, logits.index_select(0, of_sample)

    def _read_prompts(self, prompts: list[Prompt]) -> Tensor:
        """Next-token logits (N, V) of different prompts, whose keys and values are in `known` from then on.

        What one of them has in common with another is read with the one and not with the other, which has
        to wait for it. The last token is always read, as the logits are not kept.
        """
        logits = {}
        waiting = sorted(prompts, key=len, reverse=True)
        while waiting:
            read = sorted(self.known)
            now, rests, later = [], [], []
            for prompt in waiting:
                text, shared = nearest(prompt, read)
                if nearest(prompt, now)[1] > shared + 16:  # for less than that nobody waits
                    later.append(prompt)
                else:
                    insort(now, prompt)
                    rests.append((len(prompt) - min(shared, len(prompt) - 1), prompt, text))
            for group in of_similar_size(rests):
                logits.update(self._read_rests(group))
            waiting = later
        return torch.stack([logits[prompt] for prompt in prompts])

    def _read_rests(self, group: list[tuple[int, Prompt, Prompt | None]]) -> dict[Prompt, Tensor]:
        """Next-token logits (V,) of each prompt, given with its rest and the known text that it begins like.

        As many tokens of each are read as the longest rest has, so that there is padding at the left only.
        """
        prompts = [prompt for _, prompt, _ in group]
        width, rest = max(map(len, prompts)), max(rest for rest, _, _ in group)
        kv_cache = KeyValues(len(group), width)
        if width > rest:
            texts = [self.known.get(text) for _, _, text in group]
            kv_cache.begin(texts, [max(len(prompt) - rest, 0) for prompt in prompts], width - rest,
                           torch.arange(len(group), device=self.device))

        ids = torch.zeros(len(group), rest, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[-len(prompt):] = torch.tensor(prompt[-rest:])
        mask = left_padded([len(prompt) for prompt in prompts], width)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -rest:]
        out = self.model(ids.to(self.device), attention_mask=mask.to(self.device),
                         position_ids=positions.to(self.device), past_key_values=kv_cache, use_cache=True,
                         logits_to_keep=1)

        for row, (_, prompt, text) in enumerate(group):
            if text in self.known:  # is used, so that it is forgotten later
                self.known[text] = self.known.pop(text)
            self.known[prompt] = kv_cache.copy_of(row, len(prompt))
        return dict(zip(prompts, out.logits[:, -1], strict=True))

    def _forget(self, needed: Collection[Prompt] = ()) -> None:
        """Drop what was not used for longest and is not needed, until the rest has no more tokens than half
        a batch, or less where memory has run out."""
        tokens = sum(map(len, self.known))
        for text in list(self.known):
            if tokens <= self.budget * self.known_share:
                break
            if text not in needed:
                del self.known[text]
                tokens -= len(text)

    def _read_token(self, token: Tensor, batch: Batch) -> Tensor:
        """Next-token logits (N, V) after one more token (N,) of each row."""
        if self.uses_graphs:
            try:
                return batch.read_by_graph(token)
            except RuntimeError as error:
                if ran_out_of_memory(error):
                    raise
                self._give_up_graphs(f"failed ({in_one_line(error)})")
        return batch.read(token)

    def _give_up_graphs(self, problem: str) -> None:
        self.uses_graphs = False
        tqdm.write(f"captured graphs: {problem}; this process goes on without them", sys.stderr)

    @cached_property
    def ready_masks(self) -> bool:
        """Whether one mask is right for all layers, so that the model need not make them for each token."""
        cache = DynamicCache(config=self.model.config)
        same = all(type(layer) is DynamicLayer for layer in cache.layers)  # no windows, for example
        return same and self.model.config._attn_implementation == "sdpa"

    @cached_property
    def uses_graphs(self) -> bool:
        return self.settings.cuda_graphs and self.device != "cpu" and self.ready_masks

    def _most_new(self, prompt: Sequence[int]) -> int:
        return int(min(self.settings.max_new_tokens, self.limit - len(prompt)))

    def _has_ended(self, ids: Sequence[int], new: list[int]) -> bool:
        return new[-1] in self.end_tokens or len(new) >= self._most_new(ids)

    def _choose(self, logits: Tensor, numbers: list[float]) -> Tensor:
        """(N,) tokens by (N, V) logits: the likeliest, or by a uniform number each one of the nucleus."""
        top_p = self.settings.top_p
        low, high = logits.aminmax()  # NaN if any is
        if not low.isfinite().logical_and(high.isfinite()):
            raise InputError(f"{self.settings.model}: its logits are not finite, so nothing can be sampled")
        if self.settings.temperature == 0:
            return logits.argmax(-1)
        probabilities = (logits.float() / self.settings.temperature).softmax(-1)

        # The nucleus is nearly always small, so the whole vocabulary need not be sorted. A GPU looks at more
        # at once, because to ask whether that was enough is to wait for it.
        size = 128 if logits.is_cuda else 16
        while True:
            best, tokens = probabilities.topk(min(size, probabilities.shape[1]))
            before = best.cumsum(-1) - best  # mass of all likelier tokens; the first is always in
            if size >= probabilities.shape[1] or before[:, -1].min() >= top_p:
                break
            size *= 8
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


def local_device() -> str:
    """The GPU that is this process's under torchrun, the first one without it, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def of_similar_size(rests: list[tuple[int, Prompt, Prompt | None]]) -> list[list]:
    """Groups of which none is padded by much more than half."""
    groups: list[list] = []
    for rest in sorted(rests, key=lambda rest: rest[0]):
        if not groups or rest[0] > 1.5 * groups[-1][0][0] + 8:
            groups.append([])
        groups[-1].append(rest)
    return groups


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
