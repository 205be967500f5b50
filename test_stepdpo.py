"""The specification of stepdpo.py, kernels.py and data.py, in the order of their code. It runs on a CPU.

The loss; log-probabilities without logits; attention without masks; from text to token ids; which pairs go
into which batch, and how they are packed; the policy; training, and what it must equal. Each test names the
rule it protects. Tests that need a GPU skip visibly without one, and those that take long run by `pytest -m
slow`. What a run needs around the method has its tests in runtime/tests/.
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
import transformers
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import data
import kernels
import stepdpo
from bench.naive import naive_training
from conftest import (
    CHATML,
    CUDA,
    ENVIRONMENT,
    FAMILIES,
    HERE,
    launch,
    losses_of,
    make_config,
    make_flags,
    make_model,
    make_pairs,
    make_policy,
    make_rows,
    needs_cuda,
    read_metrics,
    run_in_processes,
    separate_logps,
    train_by_flags,
    weights_of,
)
from kernels import packed_attention, plain_attention, plain_logps
from runtime import startup
from runtime.live_bytes import LiveBytes
from runtime.messages import InputError
from runtime.rows import read_rows
from runtime.templates import read_tokenizer

# --------------------------------------------------------------------------------------------------- the loss


def test_loss_by_hand():
    tensor = torch.tensor
    losses, chosen, rejected = stepdpo.step_dpo_loss(
        tensor([-10.0, -3.0]), tensor([-12.0, -4.0]), tensor([-11.0, -3.0]), tensor([-11.0, -2.0]), beta=0.5)
    assert chosen.tolist() == [0.5, 0.0] and rejected.tolist() == [-0.5, -1.0]
    # margins 1.0 and 1.0: both losses are log(1 + e^-1)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1.0))] * 2, abs=1e-7)


def test_loss_is_ln_2_where_policy_is_reference_and_survives_large_margins():
    same = torch.tensor([-200.0, 0.0])
    losses = stepdpo.step_dpo_loss(same, same - 3, same, same - 3, 0.4)[0]
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    far = torch.tensor([1e4])
    assert stepdpo.step_dpo_loss(-far, far, far * 0, far * 0, 1.0)[0].item() == pytest.approx(2e4)


def test_loss_gradient_is_beta_times_sigmoid_of_minus_margin_and_rewards_are_detached():
    logps = [torch.tensor([x], requires_grad=True) for x in (-5.0, -6.0)]
    losses, chosen, rejected = stepdpo.step_dpo_loss(*logps, torch.tensor([-5.5]), torch.tensor([-5.0]), 0.4)
    losses.sum().backward()
    expected = 0.4 / (1 + math.exp(0.4 * 1.5))
    assert [x.grad.item() for x in logps] == pytest.approx([-expected, expected])
    assert not chosen.requires_grad and not rejected.requires_grad


def test_loss_refuses_bad_arguments():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="one shape"):
        stepdpo.step_dpo_loss(one, one, one, two, 0.4)
    with pytest.raises(ValueError, match="beta"):
        stepdpo.step_dpo_loss(one, one, one, one, 0.0)


def test_what_is_minimized_has_every_term_and_is_logged_as_loss():
    logps = torch.tensor([[-6.0, -8.0], [-7.0, -9.0]], requires_grad=True)  # chosen, rejected
    reference, tokens = torch.tensor([[-7.0, -8.0], [-6.0, -9.0]]), torch.tensor([[3, 4], [5, 6]])
    dpo = stepdpo.step_dpo_loss(*logps.detach(), *reference, 0.4)[0]
    for weight in (0.0, 0.5):
        config = argparse.Namespace(beta=0.4, nll_weight=weight)
        losses, metrics = stepdpo.losses_and_metrics(logps, reference, tokens, config)
        assert metrics["nll_loss"].tolist() == [2.0, 2.0]  # of each token of the chosen step
        torch.testing.assert_close(losses.detach(), dpo + weight * 2.0)
        assert torch.equal(metrics["loss"], losses) and not any(x.requires_grad for x in metrics.values())


# --------------------------------------------------------------------------- log-probabilities without logits


REAL_BLOCKS = {name: getattr(kernels, name) for name in ("BLOCK", "BLOCK_CPU", "_CHUNK")}


@pytest.fixture(params=[
    "torch",
    pytest.param("interpreter", marks=pytest.mark.skipif(CUDA, reason="on a GPU Triton compiles")),
    pytest.param("cuda", marks=needs_cuda),
])
def op(request, monkeypatch):
    """(linear_logps, device) of each way to run it, with several blocks and chunks at test sizes."""
    monkeypatch.setattr(kernels, "_INTERPRETED", request.param == "interpreter")
    for name, value in dict(BLOCK=64, BLOCK_CPU=64, _CHUNK=32).items():
        monkeypatch.setattr(kernels, name, value)
    return kernels.linear_logps, "cuda" if request.param == "cuda" else "cpu"


def values_and_gradients(function, hidden, weight, targets, upstream, dtype):
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    logps = function(hidden, weight, targets)
    logps.backward(upstream.to(logps.dtype))
    return logps.detach(), hidden.grad, weight.grad


def check_against_fp64(function, hidden, weight, targets, upstream):
    """Values and gradients are those of fp64, to the rounding of the inputs' dtype."""
    inputs, dtype = (hidden, weight, targets, upstream), hidden.dtype
    truth = values_and_gradients(
        lambda h, w, t: (h @ w.T).log_softmax(-1).gather(1, t[:, None])[:, 0], *inputs, torch.float64)
    plain = values_and_gradients(plain_logps, *inputs, dtype)
    ours = values_and_gradients(function, *inputs, dtype)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype

    largest = max((hidden.double() @ weight.double().T).abs().max(), truth[0].abs().max())
    rounding = 4 * torch.finfo(torch.float32).eps * largest  # of a logit, or of a log-probability
    names = "logps", "dhidden", "dweight"
    for name, exact, torch_result, result in zip(names, truth, plain, ours, strict=True):
        error, allowed = ((x.double() - exact).abs().max() for x in (result, torch_result))
        tolerance = rounding if name == "logps" else (rounding + torch.finfo(dtype).eps) * exact.abs().max()
        if name == "logps" and dtype != torch.float32:
            allowed = 0.0  # plain logits are rounded to 16 bits before they are widened; ours must not be
        assert error <= allowed + tolerance, (
            f"{name}: error {error:.3g}, torch {allowed:.3g} + {tolerance:.3g}")


def random_inputs(device, dtype, T, D, V, scale):
    rng = torch.Generator().manual_seed(T * V)
    hidden = torch.randn(T, D, generator=rng).to(device, dtype)
    weight = (torch.randn(V, D, generator=rng) * scale / D**0.5).to(device, dtype)
    targets = torch.randint(V, (T,), generator=rng).to(device)
    targets[0], targets[-1] = 0, V - 1
    return hidden, weight, targets, torch.randn(T, generator=rng).to(device)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 32, 256), (7, 19, 201), (1, 16, 63), (33, 24, 65)], ids=str)
@pytest.mark.parametrize("scale", [0.2, 30.0], ids=["flat", "peaked"])
def test_kernel_is_no_less_accurate_than_plain_torch(op, dtype, shape, scale):
    function, device = op
    check_against_fp64(function, *random_inputs(device, dtype, *shape, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trap", ["large offset", "far below zero", "one huge logit", "all alike"])
def test_kernel_is_right_for_logits_that_overflow_a_careless_softmax(op, dtype, trap):
    function, device = op
    hidden, weight, targets, upstream = random_inputs(device, dtype, 9, 16, 130, 1.0)
    hidden[:, 0] = 8
    if trap == "one huge logit":
        weight[70, 0] = 500
        targets[:4] = 70
    elif trap == "all alike":
        weight[:] = weight[0]
    else:  # of 4,000, which all logits have in common
        weight[:, 0] = 500 if trap == "large offset" else -500
    check_against_fp64(function, hidden, weight, targets, upstream)


@pytest.mark.slow
@pytest.mark.parametrize("V", [129_920, 262_144])  # 129,920 is no multiple of either block
def test_kernel_at_vocabularies_of_real_models(op, monkeypatch, V):
    function, device = op
    for name, value in REAL_BLOCKS.items():
        monkeypatch.setattr(kernels, name, value)
    check_against_fp64(function, *random_inputs(device, torch.bfloat16, 2, 16, V, 4.0))


def test_kernel_adds_its_gradient_to_that_of_a_tied_embedding(op):
    function, device = op
    ids, targets = torch.tensor([3, 69, 3, 0], device=device), torch.tensor([69, 3, 5, 0], device=device)
    start = torch.randn(70, 16, device=device)
    gradients = []
    for logps in (function, plain_logps):
        weight = start.clone().requires_grad_()
        logps(weight[ids].tanh(), weight, targets).sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(CUDA, reason="on a GPU Triton compiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_writes_the_gradient_of_a_tile_in_half_precision(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "_INTERPRETED", True)
    monkeypatch.setattr(kernels, "_CHUNK", 32)
    tile, targets, dlogps = torch.randn(5, 70) * 4, torch.tensor([103, 100, 169, 99, 170]), torch.randn(5)
    maximum = tile.amax(1) + 0.2  # this tile is not all of the vocabulary
    total = (tile - maximum[:, None]).exp().sum(1) + 0.5
    inside = torch.zeros(5, 70).index_put((torch.arange(3), targets[:3] - 100), torch.ones(3))
    expected = dlogps[:, None] * (inside - (tile - maximum[:, None]).exp() / total[:, None])
    dtile = kernels._dtile(tile, targets, maximum, total, dlogps, 100, dtype)
    assert dtile.dtype == dtype
    assert (dtile.float() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max() + 1e-6


def test_kernel_computes_only_the_gradients_asked_for(op):
    function, device = op
    targets, products = torch.tensor([1, 2, 69], device=device), {}
    for asked in itertools.product((False, True), repeat=2):
        hidden, weight = torch.randn(3, 8, device=device), torch.randn(70, 8, device=device)
        hidden.requires_grad_(asked[0]), weight.requires_grad_(asked[1])
        logps = function(hidden, weight, targets)
        assert logps.requires_grad == any(asked)
        if any(asked):
            with CountedCalls("mm", "addmm") as counted:
                logps.sum().backward()
            products[asked] = counted.calls
        assert (hidden.grad is not None, weight.grad is not None) == asked
    # Of each of two blocks the logits, and then one product for each gradient.
    assert products == {(True, False): 4, (False, True): 4, (True, True): 6}


class CountedCalls(TorchDispatchMode):
    """Counts the calls inside it of the operators with these names, in place or not."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.calls = names, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.__name__.split(".")[0].rstrip("_") in self.names
        return function(*args, **(kwargs or {}))


def test_kernel_without_tokens_gives_zero_gradients(op):
    function, device = op
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.randn(70, 8, device=device, requires_grad=True)
    logps = function(hidden, weight, torch.zeros(0, dtype=torch.long, device=device))
    logps.sum().backward()
    assert logps.shape == (0,) and hidden.grad.shape == (0, 8) and weight.grad.abs().sum() == 0


def test_kernel_takes_strided_inputs_and_small_integers(op):
    function, device = op
    hidden, weight = torch.randn(8, 6, device=device).T, torch.randn(140, 16, device=device)[::2, ::2]
    targets = torch.tensor([0, 9, 3, 9, 69, 9], dtype=torch.int32, device=device)[::2]
    logps = function(hidden[::2], weight, targets)
    assert torch.allclose(logps, plain_logps(hidden[::2], weight, targets.long()), atol=1e-5)


@pytest.mark.parametrize("bad, message", [
    (dict(hidden=torch.zeros(3, 7)), r"hidden must be \(T, D\)"),
    (dict(hidden=torch.zeros(3)), r"hidden must be \(T, D\)"),
    (dict(weight=torch.zeros(0, 8)), "must not be empty"),
    (dict(targets=torch.zeros(4, dtype=torch.long)), r"targets must be \(T,\)"),
    (dict(targets=torch.zeros(3)), "targets must be integers"),
    (dict(targets=torch.tensor([0, 1, 10])), r"targets must be in \[0, V\) = \[0, 10\), got 0 to 10"),
    (dict(targets=torch.tensor([0, 1, -100])), r"got -100 to 1"),
    (dict(hidden=torch.zeros(3, 8, dtype=torch.bfloat16)), "both be fp32, bf16 or fp16"),
    (dict(hidden=torch.zeros(3, 8, device="meta")), "one device"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_kernel_refuses_bad_arguments(op, bad, message):
    function, device = op
    good = dict(hidden=torch.zeros(3, 8), weight=torch.zeros(10, 8), targets=torch.tensor([0, 1, 9]))
    arguments = good | bad
    with pytest.raises(ValueError, match=message):
        function(*(x if x.is_meta else x.to(device) for x in arguments.values()))


def test_kernel_names_a_sharded_weight():
    startup.start_processes()
    weight = DTensor.from_local(torch.randn(70, 8), init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"weight must be a plain tensor, got a DTensor: .*full_tensor"):
        kernels.linear_logps(torch.randn(3, 8), weight, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_memory_keeps_to_its_formula_whatever_the_vocabulary(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "BLOCK_CPU", 256)
    T, D, peaks = 96, 32, []
    for V in (1024, 8192):
        with LiveBytes() as memory:
            hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
            weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
            kernels.linear_logps(hidden, weight, torch.arange(T)).sum().backward()
        peaks.append(memory.peak["device"] - 2 * (T * D + V * D) * dtype.itemsize)  # they and their gradients
    formula = T * 256 * 4 + 2 * (T + 256) * D * 4
    assert peaks[1] <= peaks[0] + 1024 and peaks[1] <= formula + 16 * 1024, (peaks, formula)


COPIED = """
import sys
sys.modules.update(dict.fromkeys(("transformers", "numpy", "tqdm", "safetensors")))
import torch
from kernels import Segments, linear_logps, packed_attention, plain_attention, plain_logps
h, w, t = torch.randn(5, 8, requires_grad=True), torch.randn(99, 8), torch.arange(5)
linear_logps(h, w, t).sum().backward()
q = torch.randn(1, 2, 5, 8, requires_grad=True)
segments = Segments([2, 2, 1], [2, 4, 3], torch.tensor([0, 1, 0, 1, 2, 3, 0, 1, 4]),
                    torch.tensor([0, 2, 4, 5]), torch.tensor([0, 2, 6, 9]))
packed_attention(q, q, q, segments).sum().backward()
print((linear_logps(h, w, t) - plain_logps(h, w, t)).abs().max() < 1e-5,
      (packed_attention(q, q, q, segments) - plain_attention(q, q, q, segments)).abs().max() < 1e-5,
      h.grad.shape, q.grad.shape)
"""


def test_the_file_works_copied_alone_into_an_empty_folder(tmp_path):
    shutil.copy(HERE / "kernels.py", tmp_path)
    result = subprocess.run([sys.executable, "-c", COPIED], cwd=tmp_path, capture_output=True, text=True,
                            env=ENVIRONMENT)
    said = "tensor(True) tensor(True) torch.Size([5, 8]) torch.Size([1, 2, 5, 8])\n"
    assert result.stdout == said, result.stderr


AHEAD_OF_TIME = """
import re, subprocess, sys, tempfile, triton, kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
numbers = dict(start="i32", width="i32", CHUNK="constexpr")
fold = dict(tile="*fp32", targets="*i64", maximum="*fp32", total="*fp32", target_logit="*fp32", **numbers)
dtile = [dict(tile="*fp32", targets="*i64", maximum="*fp32", total="*fp32", dlogps="*fp32", dtile="*" + t,
              **numbers) for t in ("fp32", "bf16", "fp16")]
for kernel, signatures in ((kernels._fold_kernel, [fold]), (kernels._dtile_kernel, dtile)):
    for signature in signatures:
        for capability in (80, 90, 100):
            source = ASTSource(kernel, signature, {"CHUNK": kernels._CHUNK})
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"]); file.flush()
                tool = triton.knobs.nvidia.cuobjdump.path
                usage = subprocess.run([tool, "-res-usage", file.name],
                                       capture_output=True, text=True, check=True).stdout
            stack, local = (int(re.search(name + r":(\\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
            print(kernel.__name__, capability, "STACK", stack, "LOCAL", local)
"""


@pytest.mark.slow
def test_kernels_compile_ahead_of_time_for_a100_h100_b200_without_spills():
    result = subprocess.run([sys.executable, "-c", AHEAD_OF_TIME], cwd=HERE, capture_output=True, text=True,
                            env=ENVIRONMENT)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert len(lines) == 12 and all(line.endswith("STACK 0 LOCAL 0") for line in lines), result.stdout


@needs_cuda
@pytest.mark.parametrize("T, D, V", [(1024, 8192, 152064), (2048, 3584, 152064)])
def test_kernel_on_cuda_at_real_shapes(T, D, V):
    hidden = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, D, device="cuda", dtype=torch.bfloat16) * D**-0.5).requires_grad_()
    targets = torch.randint(V, (T,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logps = kernels.linear_logps(hidden, weight, targets)
    logps.sum().backward()
    transient = torch.cuda.max_memory_allocated() - before - (T + V) * D * 2
    sample = slice(0, 16)
    truth = plain_logps(hidden[sample].double(), weight.double(), targets[sample])
    assert (logps[sample] - truth).abs().max() < 1e-3
    assert transient <= T * kernels.BLOCK * 6 + T * D * 4 + 2**20


# ------------------------------------------------------------------------------------ attention without masks


def drawing() -> torch.Tensor:
    """What data.py's docstring draws: an x where a query (a line) attends to a key (a column)."""
    lines = re.findall(r"^ *(?:prefix|chosen|rejected)?((?: +[x.])+)$", data.__doc__.split("keys:")[1], re.M)
    return torch.tensor([[mark == "x" for mark in line.split()] for line in lines])


def test_attention_is_as_drawn_in_each_pair_and_never_across_pairs():
    drawn, pair = drawing(), data.Pair([1, 2, 3], [10, 11], [20, 21], "")
    assert drawn.shape == (7, 7)
    assert torch.equal(kernels.visible(data.pack([pair, pair]).segments), torch.block_diag(drawn, drawn))


@pytest.mark.parametrize("window", [None, 1, 3, 20, 500])
@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
def test_a_token_sees_itself_and_what_is_before_it_in_its_own_sequence(tokenizer, window, share_prefix):
    pairs = make_pairs(tokenizer, 4)
    owner, branch, position = [], [], []  # of each token; the branch of a shared prefix is 0
    for i, pair in enumerate(pairs):
        for number, span in ((1, pair.chosen), (2, pair.rejected)):
            if number == 1 or not share_prefix:
                branch += [0 if share_prefix else number] * len(pair.prefix)
                position += range(len(pair.prefix))
            branch += [number] * len(span)
            position += range(len(pair.prefix), len(pair.prefix) + len(span))
        owner += [i] * (len(branch) - len(owner))

    (owner_q, owner_k), (branch_q, branch_k), (place_q, place_k) = (
        np.meshgrid(x, x, indexing="ij") for x in (owner, branch, position))
    same_sequence = (owner_q == owner_k) & ((branch_k == 0) | (branch_k == branch_q))
    expected = same_sequence & (place_k <= place_q) & (place_q - place_k < (window or math.inf))
    batch = data.pack(pairs, share_prefix)
    assert batch.position_ids.tolist() == [position]
    assert (kernels.visible(batch.segments, window).numpy() == expected).all()


@pytest.mark.parametrize("window", [None, 1, 3, 20, 500])
@pytest.mark.parametrize("pairs, share_prefix", [(4, True), (4, False), (0, True)],
                         ids=["shared", "separate", "empty"])
@pytest.mark.parametrize("heads, key_heads, sizes", [(4, 4, (8, 8)), (4, 2, (8, 8)), (3, 1, (8, 6))],
                         ids=["own keys", "shared keys", "one key and other values"])
def test_packed_attention_and_its_gradients_are_those_of_the_definition_in_masks(
        tokenizer, window, pairs, share_prefix, heads, key_heads, sizes):
    segments = data.pack(make_pairs(tokenizer, pairs), share_prefix).segments
    length, (size, value_size) = sum(segments.query_lengths), sizes
    inputs = [torch.randn(1, heads, length, size), torch.randn(1, key_heads, length, size),
              torch.randn(1, key_heads, length, value_size)]
    upstream, results = torch.randn(1, length, heads, value_size), []
    for attention in (packed_attention, plain_attention):
        own = [x.clone().requires_grad_() for x in inputs]
        output = attention(*own, segments, 0.3, window)
        output.backward(upstream)
        results.append([output.detach(), *(x.grad for x in own)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_attention_scales_by_the_size_of_a_head_unless_told_otherwise(tokenizer):
    segments = data.pack(make_pairs(tokenizer, 1)).segments
    query, key, value = (torch.randn(1, 2, sum(segments.query_lengths), 16) for _ in range(3))
    for attention in (packed_attention, plain_attention):
        assert torch.allclose(attention(query, key, value, segments),
                              attention(query, key, value, segments, scale=0.25), atol=1e-6)


def test_attention_refuses_lengths_that_differ():
    segments, six, seven = data.pack([]).segments, torch.randn(1, 1, 6, 8), torch.randn(1, 1, 7, 8)
    for inputs in ((six, six, six), (six[:, :, :1], seven, six)):
        with pytest.raises(ValueError, match=r"must have one length L, got \[1, 6"):
            packed_attention(*inputs, segments)


def plain_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
                      window_size=(-1, -1), enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn in plain torch. As in FlashAttention, a query sees `left` keys
    before its own place and `right` after it, -1 for all, and the last query's place is the last key's."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and enable_gqa
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
    outputs = []
    for s in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[s]:cu_seq_q[s + 1]]
        k, v = (x[cu_seq_k[s]:cu_seq_k[s + 1]].repeat_interleave(q.shape[1] // key.shape[1], 1)
                for x in (key, value))
        assert len(q) <= max_q and len(k) <= max_k
        behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))  # keys before a query
        left, right = window_size
        allowed = (behind >= -right) & ((behind <= left) | (left < 0))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.where(allowed, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 3, 20, 500])
def test_one_call_of_varlen_attn_computes_what_the_segments_do_one_by_one(tokenizer, monkeypatch, window):
    """What CUDA runs, but for the kernel itself, in whose place its definition stands."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", plain_varlen_attn)
    segments = data.pack(make_pairs(tokenizer, 4)).segments
    query, key, value = (torch.randn(1, heads, sum(segments.query_lengths), 8) for heads in (4, 2, 2))
    one_by_one = packed_attention(query, key, value, segments, 0.3, window)
    gathered = (x.index_select(2, segments.key_index) for x in (key, value))
    at_once = kernels._flash_attention(query, *gathered, segments, 0.3, window)
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-5, atol=1e-5)


@needs_cuda
@pytest.mark.parametrize("window", [None, 1, 20])
def test_varlen_attention_on_cuda_equals_the_segments_one_by_one(tokenizer, window):
    segments = data.pack(make_pairs(tokenizer, 4)).to("cuda").segments
    length = sum(segments.query_lengths)
    exact = [torch.randn(1, heads, length, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    results = [packed_attention(*x, segments, window=window) for x in (exact, rounded)]
    upstream = torch.randn_like(results[0])
    results[0].backward(upstream), results[1].backward(upstream.bfloat16())
    for ours, truth in zip([results[1], *(x.grad for x in rounded)], [results[0], *(x.grad for x in exact)],
                           strict=True):
        # With a window of one token the gradient of the query is zero, but for rounding.
        assert (ours.float() - truth).norm() <= 0.02 * truth.norm() + 1e-3


# ------------------------------------------------------------------------------------- from text to token ids


@pytest.mark.parametrize("steps", [  # as they stand in Math-Step-DPO-10K, and none
    "Let's think step by step.\nStep 1: 1 + 1 = 2. \nStep 2:", "Let's think. Step 1: 1 + 1 = 2. Step 2:",
    "Let's think step by step.\nStep 16:", ""])
def test_the_reasoning_steps_before_are_taken_as_they_are(tokenizer, steps):
    row = make_rows(1)[0] | {"initial_reason_steps": steps}
    (pair,) = data.encode([("f:1", row)], tokenizer, "chat", None, "step")
    opened = data.open_turn(tokenizer, row["prompt"], "chat")
    assert data.marked_text(pair, tokenizer) == (
        f"{opened}{steps}[[chosen>{row['chosen']}<]][[rejected>{row['rejected']}<]]")


def test_a_prompt_may_be_a_list_of_one_message(tokenizer):
    row = make_rows(1)[0]
    as_list = row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
    encoded = [data.encode([("f:1", r)], tokenizer, "chat", None, "step") for r in (row, as_list)]
    assert encoded[0] == encoded[1]


def test_a_reasoning_step_has_no_end_of_sequence_and_a_solution_has_one(tokenizer):
    row = make_rows(1)[0]
    (step,), (solution,) = make_pairs(tokenizer, 1), make_pairs(tokenizer, 1, "solution")
    assert tokenizer.decode(step.chosen) == row["chosen"]
    assert tokenizer.decode(step.rejected) == row["rejected"]
    assert tokenizer.decode(solution.chosen) == row["full_chosen"] + tokenizer.eos_token
    eos = tokenizer.eos_token_id
    assert solution.chosen.count(eos) == solution.rejected.count(eos) == 1


def test_full_solutions_may_repeat_the_reasoning_steps_before(tokenizer):
    row = make_rows(3)[2]
    whole = row | {k: row["initial_reason_steps"] + row[k] for k in ("full_chosen", "full_rejected")}
    pairs = [data.encode([("f:1", r)], tokenizer, "chat", None, "solution") for r in (row, whole)]
    assert pairs[0] == pairs[1]


def test_templates_put_the_reasoning_steps_into_the_open_answer(tokenizer):
    row = make_rows(1)[0]
    text = {t: data.open_turn(tokenizer, "Q?", t) for t in data.TEMPLATES}
    assert text["chat"] == f"<|im_start|>user\nQ?\n{data.INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    assert text["alpaca"].endswith("### Instruction:\nQ?\n\n### Response:\n")
    assert text["deepseek-math"] == f"User: Q?\n{data.INSTRUCTION}\n\nAssistant: "
    assert data.open_turn(tokenizer, "Q?", "chat", "").startswith("<|im_start|>user\nQ?<|im_end|>")
    for template in data.TEMPLATES:
        (pair,) = make_pairs(tokenizer, 1, template=template)
        expected = data.open_turn(tokenizer, row["prompt"], template) + row["initial_reason_steps"]
        assert tokenizer.decode(pair.prefix) == expected
        assert tokenizer.eos_token_id not in pair.chosen + pair.rejected
    assert "[[chosen> So 0 + 0 = 0<]][[rejected> Thus we get 1.<]]" in data.marked_text(pair, tokenizer)


def test_a_tokenizer_without_chat_template_is_told_what_to_pass(tokenizer):
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="--template alpaca"):
        data.open_turn(bare, "Q?", "chat")


def test_bos_stands_once_where_the_tokenizer_has_it_and_nowhere_else(tokenizer):
    from tokenizers.processors import TemplateProcessing
    with_bos = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>", eos_token="<|im_end|>", chat_template="<s>" + CHATML)
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)])
    for template in data.TEMPLATES:
        (pair,) = make_pairs(with_bos, 1, template=template)
        assert pair.prefix[0] == bos and (pair.prefix + pair.chosen + pair.rejected).count(bos) == 1
        (pair,) = make_pairs(tokenizer, 1, template=template)
        assert bos not in pair.prefix + pair.chosen + pair.rejected


def test_no_merge_across_the_boundary_of_prefix_and_span_is_invented_or_lost(tokenizer):
    row = make_rows(1)[0]
    row |= {"initial_reason_steps": "Let's think\nStep 1: ", "chosen": "the token", "rejected": "ten"}
    (pair,) = data.encode([("f:1", row)], tokenizer, "chat", None, "step")
    text = data.open_turn(tokenizer, row["prompt"], "chat") + row["initial_reason_steps"]
    for span, ids in ((row["chosen"], pair.chosen), (row["rejected"], pair.rejected)):
        assert pair.prefix + ids == tokenizer(text + span).input_ids
    assert tokenizer.decode(pair.chosen) == " the token"  # the space merged with the word: not in the prefix
    assert tokenizer.decode(pair.prefix).endswith("Step 1:")


# ---------------------------------------------------------------------------- which pairs go into which batch


def plan_of(pairs: int, batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    steps = epochs * data.steps_per_epoch(pairs, batch_size)
    return [data.indices_of_step(step, pairs, batch_size, seed) for step in range(steps)]


def test_every_pair_is_used_once_per_epoch_in_a_new_order_that_the_seed_decides():
    plan = plan_of(103, 10, 3, seed=1)
    assert len(plan) == 30 and {len(batch) for batch in plan} == {10, 11}
    epochs = [list(np.concatenate(plan[e * 10:(e + 1) * 10])) for e in range(3)]
    assert all(sorted(epoch) == list(range(103)) for epoch in epochs) and epochs[0] != epochs[1]
    same, other = plan_of(103, 10, 3, seed=1), plan_of(103, 10, 3, seed=2)
    assert all((a == b).all() for a, b in zip(plan, same, strict=True))
    assert (plan[0][:10] != other[0][:10]).any()
    paper = plan_of(10795, 128, 8, 0)
    assert len(paper) == 672 and {len(batch) for batch in paper} == {128, 129}
    assert len(plan_of(3, 128, 1, 0)) == 1


@pytest.mark.parametrize("ranks, budget", [(1, 100), (2, 100), (8, 300), (16, 1000)])
def test_micro_batches_are_balanced_within_budget_and_as_many_on_each_rank(ranks, budget):
    lengths = np.random.default_rng(0).integers(5, 90, 64).tolist()
    plan = data.plan_micro_batches(lengths, ranks, budget)
    assert all(len(micro) == ranks for micro in plan)
    assert sorted(itertools.chain(*itertools.chain(*plan))) == list(range(64))
    loads = np.array([[sum(lengths[i] for i in items) for items in micro] for micro in plan])
    assert loads.max() <= budget and len(plan) <= math.ceil(1.2 * sum(lengths) / (budget * ranks)) + 1
    assert (loads.max(1) - loads.min(1)).max() <= 90  # no rank waits for more than one pair's worth of tokens


def test_a_small_batch_on_many_ranks_leaves_some_without_pairs_and_a_giant_pair_is_refused():
    assert sorted(map(len, data.plan_micro_batches([5, 7, 6], 8, 100)[0])) == [0] * 5 + [1] * 3
    with pytest.raises(ValueError, match="<= budget 10, got 11"):
        data.plan_micro_batches([3, 11], 2, 10)


def test_packing_lays_the_prefix_out_once():
    pairs = [data.Pair([1, 2, 3], [10, 11], [20], "a"), data.Pair([4], [12], [21, 22], "b")]
    batch = data.pack(pairs)
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 20, 4, 12, 21, 22]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    assert batch.segments.query_lengths == [3, 2, 1, 1, 1, 2]
    assert batch.segments.query_offsets.tolist() == [0, 3, 5, 6, 7, 8, 10]
    assert batch.predict_at.tolist() == [2, 3, 2, 6, 6, 8]  # the last prefix token predicts both first tokens
    assert batch.targets.tolist() == [10, 11, 20, 12, 21, 22]
    assert batch.span_of.tolist() == [0, 0, 2, 1, 3, 3]  # chosen 0, 1, rejected 2, 3
    assert batch.span_lengths.tolist() == [[2, 1], [1, 2]]

    alone = data.pack(pairs[:1], share_prefix=False)
    assert alone.input_ids.tolist() == [[1, 2, 3, 10, 11, 1, 2, 3, 20]]
    assert alone.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert alone.segments.query_lengths == alone.segments.key_lengths == [5, 4]
    assert alone.predict_at.tolist() == [2, 3, 7]


def test_no_pairs_give_a_batch_that_nothing_is_trained_on():
    empty = data.pack([])
    assert empty.input_ids.shape == (1, 1)
    assert empty.targets.shape == (0,) and empty.span_lengths.shape == (2, 0)
    assert empty.targets.dtype == empty.predict_at.dtype == empty.span_lengths.dtype == torch.int64


# ------------------------------------------------------------------------------------------------- the policy


# Of each kind of attention and of head one; all families are in runtime/tests/test_architectures.py.
GROUPS = ["qwen2-tied", "qwen2-windows", "phi-bias", "granite-scale"]


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("family", [
    family if family in GROUPS else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES])
def test_packed_logps_and_gradients_equal_those_of_separate_sequences(tokenizer, family, share_prefix):
    pairs, results = make_pairs(tokenizer, 5), []
    for is_packed in (True, False):
        model = make_model(family)
        if is_packed:
            logps = make_policy(model)(data.pack(pairs, share_prefix))
        else:
            logps = separate_logps(model, pairs)
        stepdpo.step_dpo_loss(*logps, *torch.full((2, 5), -60.0), 0.1)[0].sum().backward()
        results.append((logps.detach(), {name: x.grad for name, x in model.named_parameters()}))
    (ours, gradients), (truth, true_gradients) = results
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-4)
    for name, gradient in true_gradients.items():
        size = gradient.abs().max()
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * size + 1e-6, name


def test_plain_logps_are_those_of_the_models_own_forward(tokenizer):
    model, (pair,) = make_model("phi-bias"), make_pairs(tokenizer, 1)
    truth = separate_logps(model, [pair])
    policy = make_policy(model)
    spans = torch.stack([policy.library_logp(pair.prefix, span) for span in (pair.chosen, pair.rejected)])
    torch.testing.assert_close(spans, truth[:, 0], rtol=1e-5, atol=1e-4)
    assert model.config._attn_implementation == "segments"  # as it was before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_batches_may_go_forward_before_one_goes_backward(workplace, tokenizer, checkpointing):
    """A layer that runs again in backward attends as in its own forward, not as the batch after it did."""
    one, other = make_pairs(tokenizer, 2)
    cut = len(one.prefix) - 3
    # As many tokens, but other segments: to attend by the wrong ones would go unnoticed.
    shifted = data.Pair(one.prefix[:cut], one.prefix[cut:] + one.chosen, one.rejected, "")
    batches = [data.pack([one]), data.pack([shifted]), data.pack([other])]
    startup.start_processes()
    config = make_config(workplace, "unused", activation_checkpointing=checkpointing)

    gradients = []
    for at_once in (True, False):
        policy = stepdpo.build(config.model, config)
        if at_once:
            losses = [policy(batch).sum() for batch in batches]
            sum(losses).backward()
        else:
            for batch in batches:
                policy(batch).sum().backward()
        gradients.append({name: x.grad.full_tensor() for name, x in policy.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_batches_of_other_lengths_and_segments_are_not_compiled_anew(tokenizer):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, pairs = make_model("qwen2"), make_pairs(tokenizer, 14)
    policy = make_policy(model)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
    for count in range(3, 15):
        policy(data.pack(pairs[:count]))
        if count == 6:
            settled = len(graphs)
    assert len(graphs) == settled > 0
    torch.testing.assert_close(policy(data.pack(pairs[:3])), separate_logps(make_model("qwen2"), pairs[:3]),
                               rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------------------------------------- training


def test_training_equals_a_naive_trainer_step_by_step(workplace, run):
    naive, _ = naive_training(make_config(workplace, run))
    assert naive[0] == pytest.approx(math.log(2), abs=1e-6) and naive[-1] < 0.6  # it does learn
    assert losses_of(run) == pytest.approx(naive, abs=1e-5)


@pytest.mark.parametrize("changes", [
    dict(span="solution"),
    dict(tokens_per_micro_batch=400, activation_checkpointing=True),
    dict(share_prefix=False, model="mistral-window"),
    dict(reference="qwen2", model="qwen2-tied", max_steps=2),
], ids=str)
def test_training_equals_a_naive_trainer_whatever_the_options(workplace, tmp_path, changes):
    folders = {name: workplace / changes[name] for name in ("model", "reference") if name in changes}
    config = make_config(workplace, tmp_path / "out", epochs=1, **changes | folders)
    stepdpo.train(config)
    assert losses_of(tmp_path / "out") == pytest.approx(naive_training(config)[0], abs=1e-5)


def test_the_added_term_is_trained_on_logged_and_measured_on_held_out_pairs(workplace, tokenizer, tmp_path):
    held_out = workplace / "eval.jsonl"
    config = make_config(workplace, tmp_path, epochs=1, nll_weight=0.7, eval_data=held_out)
    stepdpo.train(config)
    naive, trained = naive_training(config)
    assert losses_of(tmp_path) == pytest.approx(naive, abs=1e-5)
    assert naive[0] > 1.5  # far above ln 2

    pairs = data.encode(read_rows(str(held_out)), tokenizer, "chat", None, "step")
    with torch.no_grad():
        before, after = (separate_logps(model, pairs) for model in (make_model("qwen2"), trained))
    of_pairs, _, _ = stepdpo.step_dpo_loss(*after, *before, config.beta)
    of_pairs += 0.7 * -after[0] / torch.tensor([len(pair.chosen) for pair in pairs])
    logged = [line["eval/loss"] for line in read_metrics(tmp_path) if "eval/loss" in line]
    assert logged[-1] == pytest.approx(of_pairs.mean().item(), abs=1e-5)


def test_metrics_have_their_names_and_say_what_happened(workplace, run):
    lines = read_metrics(run)
    steps, evals = [x for x in lines if "loss" in x], [x for x in lines if "eval/loss" in x]
    assert [x["step"] for x in steps] == list(range(6)) and [x["step"] for x in evals] == [0, 3, 6]
    both = {"loss", "nll_loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
            "logps/chosen", "logps/rejected"}
    assert set(steps[0]) == {"step", "grad_norm", "lr", "tokens_per_second", "pairs_per_second", *both}
    assert set(evals[0]) == {"step", *(f"eval/{name}" for name in both)}
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(steps[0]["rewards/margins"]) < 1e-4 and steps[-1]["rewards/margins"] > 0.05
    assert evals[-1]["eval/loss"] < evals[0]["eval/loss"]
    for x in steps:
        assert x["rewards/margins"] == pytest.approx(x["rewards/chosen"] - x["rewards/rejected"], abs=1e-6)
    assert [x["lr"] for x in steps][:2] == pytest.approx([1e-4, 2e-4])  # the rate that this very step used
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["beta"] == 0.4 and record["versions"]["torch"] == torch.__version__


def test_gradients_are_clipped_and_the_norm_before_it_is_logged(workplace, tmp_path, monkeypatch):
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def clip_twice(parameters, limit):
        parameters = list(parameters)
        norm = clip(parameters, limit)
        norms.append(clip(parameters, limit).full_tensor().item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_twice)
    stepdpo.train(make_config(workplace, tmp_path, max_steps=1, max_grad_norm=1e-3))
    assert read_metrics(tmp_path)[0]["grad_norm"] > 0.1 and norms == [pytest.approx(1e-3, rel=1e-2)]


def test_another_reference_model_moves_the_first_loss(workplace, tmp_path):
    stepdpo.train(make_config(workplace, tmp_path, max_steps=1, reference=workplace / "qwen2-tied"))
    assert abs(losses_of(tmp_path)[0] - math.log(2)) > 0.1


def test_a_loss_that_is_not_finite_stops_before_the_update(workplace, tmp_path):
    with pytest.raises(InputError, match="step 1: loss nan.* nothing was updated.*pairs.jsonl:"):
        stepdpo.train(make_config(workplace, tmp_path / "out", learning_rate=1e30))
    assert len(losses_of(tmp_path / "out")) == 1 and not (tmp_path / "out/model").exists()


def test_the_exported_model_is_an_ordinary_folder_with_the_trained_weights(workplace, run):
    before = transformers.AutoModelForCausalLM.from_pretrained(workplace / "qwen2", dtype=torch.float32)
    after, info = transformers.AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert after.dtype == torch.float32
    moved = [(a - b).abs().max() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 0.05
    tokenizer = read_tokenizer(str(run / "model"))
    pairs = data.encode(read_rows(str(workplace / "eval.jsonl")), tokenizer, "chat", None, "step")
    logged = [x for x in read_metrics(run) if "eval/loss" in x][-1]
    with torch.no_grad():
        chosen, _ = separate_logps(after, pairs)
    assert chosen.mean().item() == pytest.approx(logged["eval/logps/chosen"], abs=1e-3)
    prompt = torch.tensor([pairs[0].prefix])
    assert after.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.shape[1]


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_losses(workplace, run, tmp_path, processes):
    out, options = tmp_path / "out", dict(eval_data=workplace / "eval.jsonl", eval_every=3, save_every=6)
    run_in_processes(processes, tmp_path, train_by_flags, make_flags(workplace, out, **options))
    for ours, theirs in zip(read_metrics(out), read_metrics(run), strict=True):
        for key in ours.keys() - {"tokens_per_second", "pairs_per_second"}:
            if key.endswith("accuracies") and ours["step"] == 0:
                continue  # margins of 0, so rounding decides
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-5), key
    trained, expected = (load_file(folder / "model/model.safetensors") for folder in (out, run))
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, atol=2e-5, rtol=0)

    # And one process can go on from what several have saved.
    exported = weights_of(out / "model")
    shutil.rmtree(out / "model")
    stepdpo.train(make_config(workplace, out, resume=True, **options))
    assert weights_of(out / "model") == exported


def test_layers_are_compiled_inside_their_checkpoint(workplace, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda forward: lambda *a, **k: calls.append(1) or forward(*a, **k))
    for name, checkpointing in (("kept", False), ("again", True)):
        stepdpo.train(make_config(workplace, tmp_path / name, compile=True, max_steps=1,
                                  activation_checkpointing=checkpointing))
        calls.append(None)
    kept, again = calls.index(None), len(calls) - calls.index(None) - 2
    assert 0 < kept < again  # with checkpointing every layer runs once more in the backward pass
    assert losses_of(tmp_path / "kept") == losses_of(tmp_path / "again")


@needs_cuda
def test_training_on_cuda_with_varlen_attention_in_bf16(workplace, tmp_path):
    child = launch(make_flags(workplace, tmp_path, dtype="bfloat16"), dict(os.environ))
    output, _ = child.communicate(timeout=300)
    assert child.returncode == 0, output
    losses = losses_of(tmp_path)
    assert losses[0] == pytest.approx(math.log(2), abs=5e-3) and losses[-1] < losses[0]
