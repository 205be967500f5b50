#!/usr/bin/env python3
"""Attention alone over batches of step pairs, forward and backward: ours, and what else could compute it.

    python bench/packed_attention.py                            # Qwen2-7B's heads on a GPU, few on a CPU
    python bench/packed_attention.py --heads 4,2,16 --tokens 256 --repeats 2 --out /tmp/some.json  # seconds

A batch is filled with pairs of random lengths: `short` as in GSM8K (prefixes of 100 to 330 tokens, spans of
13 to 42), `long` as in competition mathematics (300 to 900, and 30 to 120). A prefix stands once and both
spans see it, except in "not shared":

ours         kernels.packed_attention: the keys of each segment gathered, then one call of varlen_attn
             (on a CPU, and in fp32, one call of sdpa per segment)
one by one   the same segments, one call of sdpa each
not shared   ours over prefix + chosen and prefix + rejected, so over more tokens
sdpa, mask   scaled_dot_product_attention with a dense mask of the batch
flex         flex_attention, compiled; beside it the time to make its block mask out of the dense one, which
             is needed once for each batch

ms      median over the repeats of one forward and backward, by the clock; all methods take turns
extra   (10^6 bytes) the most allocated at any moment beyond inputs, output and gradients
error   |output - fp64| / |fp64| (norms), over the whole batch, by kernels.plain_attention in fp64
"""

import argparse
import random
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from common import CUDA, HERE, announced_environment, extra_bytes, seconds, write
from torch import Tensor

import data
import kernels
from kernels import Segments

KINDS = {"short": ((100, 330), (13, 42)), "long": ((300, 900), (30, 120))}  # lengths of prefixes, and spans
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEVICE = "cuda" if CUDA else "cpu"


def make_pairs(kind: str, tokens: int) -> list[data.Pair]:
    """As many pairs as fill a batch of so many tokens."""
    rng, pairs, left = random.Random(0), [], tokens
    while True:
        prefix, chosen, rejected = (rng.randint(*KINDS[kind][i]) for i in (0, 1, 1))
        left -= prefix + chosen + rejected
        if left < 0 and pairs:
            return pairs
        pairs.append(data.Pair([1] * prefix, [2] * chosen, [3] * rejected, "random"))


# Each makes a function (query, key, value) -> output (1, L, H, d), of the segments and their dense mask.


def ours(segments: Segments, mask: Tensor) -> Callable:
    return lambda q, k, v: kernels.packed_attention(q, k, v, segments)


def one_by_one(segments: Segments, mask: Tensor) -> Callable:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # FlashAttention takes values of the head size of keys only, so longer ones go segment by segment.
        longer = F.pad(value, (0, 8))
        return kernels.packed_attention(query, key, longer, segments)[..., :value.shape[-1]]
    return attend


def masked(segments: Segments, mask: Tensor) -> Callable:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def flex(segments: Segments, mask: Tensor) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    block_mask = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, len(mask), len(mask), DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)


METHODS = {"ours": ours, "one by one": one_by_one, "sdpa, mask": masked, "flex": flex}


def inputs_of(length: int, heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    query_heads, key_heads, d = heads
    torch.manual_seed(0)
    return [torch.randn(1, h, length, d, dtype=dtype, device=DEVICE, requires_grad=True)
            for h in (query_heads, key_heads, key_heads)]


def forward_and_backward(attend: Callable, inputs: list[Tensor]) -> Callable:
    upstream = torch.randn_like(inputs[0]).transpose(1, 2)  # (1, L, H, d)

    def run() -> Tensor:
        output = attend(*inputs)
        torch.autograd.grad(output, inputs, upstream)
        return output.detach()
    return run


def measure(kind: str, args: argparse.Namespace) -> dict:
    """{"pairs": how many, "methods": name -> its numbers, or {"missing": why}}"""
    pairs = make_pairs(kind, args.tokens)
    shared, apart = (data.pack(pairs, share).to(DEVICE).segments for share in (True, False))
    settings = {name: (method, shared) for name, method in METHODS.items()} | {"not shared": (ours, apart)}

    results, runs = {}, {}
    for name, (method, segments) in settings.items():
        inputs = inputs_of(sum(segments.query_lengths), args.heads, DTYPES[args.dtype])
        try:
            run = forward_and_backward(method(segments, kernels.visible(segments)), inputs)
            output = run()
        except Exception as failure:  # that something cannot run here is a result
            results[name] = {"missing": f"{type(failure).__name__}: {failure}".splitlines()[0][:160]}
            continue
        truth = kernels.plain_attention(*(x.detach().double() for x in inputs), segments)
        kept = sum(x.nbytes for x in inputs) + output.nbytes
        results[name] = {"tokens": output.shape[1], "extra_bytes": extra_bytes(run) - kept,
                         "error": ((output - truth).norm() / truth.norm()).item()}
        runs[name] = run

    times = {name: [] for name in runs}
    for _ in range(args.repeats + 1):
        for name, run in runs.items():
            times[name].append(seconds(run))
    for name, (_, *timed) in times.items():  # the first turn warms up
        results[name]["seconds"] = median(timed)
    if "flex" in runs:
        mask = kernels.visible(shared)
        results["flex"]["mask_seconds"] = median(seconds(lambda: flex(shared, mask)) for _ in range(3))
    return {"pairs": len(pairs), "methods": results}


def table(kind: str, report: dict) -> list[str]:
    base = report["methods"]["ours"]["seconds"]
    lines = [f"\n{kind}: {report['pairs']} pairs",
             f"{'':12}{'tokens':>8}{'ms':>9}{'x ours':>8}{'extra MB':>10}{'error':>9}"]
    for name, row in report["methods"].items():
        if "missing" in row:
            lines.append(f"{name:12}missing: {row['missing']}")
            continue
        mask = f"   and {row['mask_seconds'] * 1e3:.2f} ms for the mask" if "mask_seconds" in row else ""
        lines.append(f"{name:12}{row['tokens']:8}{row['seconds'] * 1e3:9.2f}{row['seconds'] / base:8.2f}"
                     f"{row['extra_bytes'] / 1e6:10.1f}{row['error']:9.0e}{mask}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="of pairs [short long]")
    add("--heads", default="28,4,128" if CUDA else "4,2,64", help="of queries, of keys, size [%(default)s]")
    add("--tokens", type=int, default=4096 if CUDA else 1024, help="in a batch [%(default)s]")
    add("--dtype", choices=DTYPES, default="bf16" if CUDA else "fp32", help="[%(default)s]")
    add("--repeats", type=int, default=21 if CUDA else 5, help="timed turns [%(default)s]")
    add("--out", help="JSON [bench/results/attention-DEVICE.json]")
    args = parser.parse_args()
    args.heads = tuple(map(int, args.heads.split(",")))

    report = announced_environment() | {"arguments": vars(args), "kinds": {}}
    for kind in args.kinds:
        report["kinds"][kind] = measure(kind, args)
        print(*table(kind, report["kinds"][kind]), sep="\n", flush=True)
    write(args.out or f"{HERE}/results/attention-{report['place']}.json", report)


if __name__ == "__main__":
    main()
