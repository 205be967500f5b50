"""The sampler in this process: what is read once, what stays in its place, and that samples stay the same."""

import random

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import pairs.local
from conftest import needs_cuda
from pairs import batch as batches
from pairs.keyvalues import KeyValues, common, nearest
from pairs.local import LocalSampler, of_similar_size
from pairs.settings import Settings

ENDS = set(range(0, 400, 16))  # many, so that samples end at different times and leave the batch


def local(tiny, tokenizer, **options) -> LocalSampler:
    sampler = LocalSampler(Settings(tiny, **dict(max_new_tokens=24) | options), tokenizer)
    sampler.end_tokens = ENDS
    return sampler


def draw(sampler, wanted) -> list:
    drawn = [pair for batch in sampler.sample(wanted) for pair in batch]
    return [continuation for _, continuation in sorted(drawn)]


def one_by_one(sampler, wanted) -> list:
    """The definition: each sample alone, all of its text read again for each token."""
    drawn = []
    for ids, name in wanted:
        numbers, new = random.Random(name), []
        while not new or not sampler._has_ended(ids, new):
            with torch.inference_mode():
                logits = sampler.model(torch.tensor([ids + new]), use_cache=False).logits[:, -1]
                new.append(int(sampler._choose(logits, [numbers.random()])))
        drawn.append(sampler._continuation(ids, new))
    return drawn


def texts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(5, 300) for _ in range(length)] for _ in range(count)]


def rollouts(seed: int = 0) -> list[list[int]]:
    """Prompts that begin each other, prompts that part at some point, and one that is like no other."""
    problem, first, second, other = texts(4, 30, seed)
    solution = problem + first
    return [problem, solution, solution[:37], solution[:58], problem + second[:20], problem + second,
            other[:9]]


def named(prompts, samples: int = 2) -> list[tuple[list[int], str]]:
    return [(ids, f"{i} {n}") for i, ids in enumerate(prompts) for n in range(samples)]


class Counted:
    """How many tokens a model reads at a time, padding included."""

    def __init__(self, sampler, monkeypatch):
        self.read: list[int] = []
        forward = sampler.model.forward

        def count(ids, **kwargs):
            if ids.shape[1] > 1 or kwargs.get("logits_to_keep"):  # of a prompt, not of what is written
                self.read.append(ids.numel())
            return forward(ids, **kwargs)

        monkeypatch.setattr(sampler.model, "forward", count)
        sampler.is_checked = True


# A batch of 84 tokens has one sample of the longest prompts.
@pytest.mark.parametrize("batch_tokens", [84, 400, 16384])
def test_samples_are_those_of_reading_each_text_alone(tiny, tokenizer, batch_tokens):
    sampler = local(tiny, tokenizer, batch_tokens=batch_tokens)
    wanted = named(rollouts())
    drawn = draw(sampler, wanted)
    assert drawn == one_by_one(sampler, wanted)
    assert {continuation.cut for continuation in drawn} == {True, False}
    later = named(rollouts()[:3] + rollouts(1)[:4], 1)  # some are known by now
    assert draw(sampler, later) == one_by_one(sampler, later)


def test_what_prompts_have_in_common_is_read_once(tiny, tokenizer, monkeypatch):
    sampler = local(tiny, tokenizer)
    counted = Counted(sampler, monkeypatch)
    problem, first, second = texts(3, 60)
    draw(sampler, named([problem + first, problem + second, problem + first[:30], problem], 4))
    # The first in full, the rest of the second, and the last token of those that begin the first.
    assert sorted(counted.read) == [2, 60, 120]

    counted.read.clear()
    draw(sampler, named([problem + first[:30] + second[:10]]))  # in a later batch
    assert counted.read == [10]


def test_nothing_is_padded_by_much_more_than_half(tiny, tokenizer, monkeypatch):
    sampler = local(tiny, tokenizer)
    counted = Counted(sampler, monkeypatch)
    draw(sampler, named(texts(1, 100) + texts(1, 90, 1) + texts(3, 5, 2)))
    assert sorted(counted.read) == [15, 200]
    sizes = [[rest[0] for rest in group] for group in of_similar_size([(n, (), None) for n in range(1, 200)])]
    assert all(max(group) <= 1.5 * min(group) + 8 for group in sizes) and len(sizes) < 12


def test_no_more_is_kept_than_half_a_batch_and_the_latest(tiny, tokenizer, monkeypatch):
    sampler, beside_batch = local(tiny, tokenizer, batch_tokens=400), []

    def weigh(*args):
        beside_batch.append(sum(map(len, sampler.known)))
        return batches.Batch(*args)

    monkeypatch.setattr(pairs.local, "Batch", weigh)
    prompts = texts(12, 40)
    for ids in prompts:
        draw(sampler, [(prompts[0] + ids[:5], "first"), (ids, "n")])
    kept = set(sampler.known)
    assert 100 <= sum(map(len, kept)) <= 200 and 100 <= max(beside_batch) <= 200
    assert tuple(prompts[-1]) in kept and tuple(prompts[1]) not in kept


def test_when_memory_runs_out_what_is_kept_goes_before_batches_are_halved(tiny, tokenizer, monkeypatch,
                                                                          capsys):
    sampler, sizes = local(tiny, tokenizer, batch_tokens=400), []
    (known, wanted), begin = texts(2, 20), sampler._begin
    draw(sampler, [(known, "n")])

    def fail_while_full(prompts, most):
        sizes.append(len(prompts))
        if sampler.known:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return begin(prompts, most)

    monkeypatch.setattr(sampler, "_begin", fail_while_full)
    for samples in (3, 1):
        sizes.clear()
        assert len(draw(sampler, named([wanted], samples))) == samples
        assert sizes == [samples] * 2 and sampler.budget == 400
        said = capsys.readouterr().err
        assert said.count("what was read before is dropped") == 1 and "halved" not in said
    assert sampler.budget * sampler.known_share == 50  # of 200, so that less is kept

    monkeypatch.setattr(sampler, "_begin", lambda *_: exec("raise RuntimeError('out of memory')"))
    sampler.known.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        draw(sampler, [(wanted, "n")])


def test_rows_that_stay_are_not_copied(tiny, tokenizer, monkeypatch):
    kv_cache = KeyValues(5, 8)
    numbers = torch.arange(5.0)[:, None, None, None].expand(5, 2, 3, 4)
    kv_cache.update(numbers, -numbers, 0)
    memory = kv_cache.layers[0].keys.data_ptr()
    order = kv_cache.drop_all_but([0, 3, 4])
    assert sorted(order) == [0, 3, 4] and order[0] == 0
    keys, values = kv_cache.update(torch.full((3, 2, 1, 4), 9.0), torch.full((3, 2, 1, 4), 9.0), 0)
    assert keys.shape == (3, 2, 4, 4) and keys.data_ptr() == memory
    assert keys[:, 0, 0, 0].tolist() == order and (keys[:, :, 3] == 9).all() and (values[:, :, 3] == 9).all()
    assert (keys[:, :, :3] == -values[:, :, :3]).all()
    assert kv_cache.drop_all_but([0, 1]) == [0, 1]  # nothing moves
    assert kv_cache.update(keys[:2, :, :1], keys[:2, :, :1], 0)[0][:, 0, 0, 0].tolist() == order[:2]


def test_the_nearest_text_is_the_one_with_most_in_common():
    numbers = random.Random(0)
    made = sorted({tuple(numbers.randrange(2) for _ in range(numbers.randrange(1, 9))) for _ in range(60)})
    for _ in range(200):
        ids = tuple(numbers.randrange(2) for _ in range(numbers.randrange(1, 9)))
        few = sorted(numbers.sample(made, 12))
        text, most = nearest(ids, few)
        assert most == max(common(ids, other) for other in few) == (common(ids, text) if text else 0)
    assert nearest((1, 2), []) == (None, 0)


def test_a_model_that_needs_masks_of_its_own_makes_them(tiny, tokenizer, monkeypatch):
    """One mask for all layers is given up if answers change with it, and not the model."""
    sampler = local(tiny, tokenizer)
    wanted = named(rollouts())
    drawn = draw(sampler, wanted)
    assert sampler.ready_masks

    other = local(tiny, tokenizer)
    forward = other.model.forward

    def only_plain_masks(*args, attention_mask=None, **kwargs):
        assert attention_mask is None or attention_mask.ndim == 2
        return forward(*args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(other.model, "forward", only_plain_masks)
    assert draw(other, wanted) == drawn and not other.ready_masks


# ----------------------------------------------------------------------------------------------------- graphs
# Captured on a GPU only. Here torch.fx records the operations, which then run on the very same tensors too.


def test_the_gpu_of_a_process_is_its_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(pairs.local, "local_device", lambda: "cuda:3")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert LocalSampler(Settings("-"), None).device == "cuda:3" and current == ["cuda:3"]


def record(forward):
    graph = make_fx(forward)()
    result = graph()
    return lambda: result.copy_(graph()), result


def with_graphs(tiny, tokenizer, monkeypatch, recorder) -> LocalSampler:
    monkeypatch.setattr(batches, "record", recorder)
    monkeypatch.setattr(batches, "COLUMNS", 32)
    sampler = local(tiny, tokenizer, cuda_graphs=True)
    sampler.uses_graphs = True
    return sampler


def test_a_graph_that_repeats_the_same_operations_makes_the_same_samples(tiny, tokenizer, monkeypatch):
    captures = []

    def counted(forward):
        captures.append(forward)
        return record(forward)

    sampler = with_graphs(tiny, tokenizer, monkeypatch, counted)
    wanted = named(rollouts(), 3)
    assert draw(sampler, wanted) == draw(local(tiny, tokenizer), wanted)
    assert sampler.uses_graphs and 4 <= len(captures) <= 10


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_without_a_graph_it_goes_on_and_says_so(tiny, tokenizer, monkeypatch, capsys, when):
    def fail(forward):
        raise RuntimeError("operation not permitted when stream is capturing")

    sampler = with_graphs(tiny, tokenizer, monkeypatch, fail)
    sampler.is_checked = when == "later"
    wanted = named(rollouts())
    assert draw(sampler, wanted) == draw(local(tiny, tokenizer), wanted)
    said = capsys.readouterr().err
    assert said.count("captured graphs: failed (RuntimeError: operation not permitted") == 1
    assert "goes on without them" in said and not sampler.uses_graphs


def test_a_graph_that_says_something_else_is_not_used(tiny, tokenizer, monkeypatch, capsys):
    def stale(forward):
        return (lambda: None), forward()  # the logits of the first token for ever

    sampler = with_graphs(tiny, tokenizer, monkeypatch, stale)
    wanted = named(rollouts())
    assert draw(sampler, wanted) == draw(local(tiny, tokenizer), wanted)
    assert "captured graphs: says something else there than alone" in capsys.readouterr().err
    assert not sampler.uses_graphs


@needs_cuda
def test_captured_on_cuda_the_samples_are_the_same(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(pairs.local, "local_device", lambda: "cuda:0")  # in place of the CPU, see conftest.py
    wanted = named(rollouts(), 3)
    sampler = local(tiny, tokenizer, cuda_graphs=True, dtype="float32")
    assert draw(sampler, wanted) == draw(local(tiny, tokenizer, dtype="float32"), wanted)
    assert sampler.uses_graphs
