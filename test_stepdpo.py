"""The specification of stepdpo.py, kernels.py, data.py and runtime/: runs on a CPU.

In the order of the code: the loss, the kernel, the data, the packed policy, training, the command line. Tests
that need a GPU skip visibly without one. Each test names the rule it protects.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.varlen
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import data
import kernels
import stepdpo
from conftest import (
    CHATML,
    CUDA,
    ENVIRONMENT,
    HERE,
    TORCHRUN,
    free_port,
    make_rows,
    rows_of,
    start_ranks,
    write_jsonl,
)
from kernels import plain_logps
from runtime import architectures, checkpoints, offload, outputs, startup
from runtime import weights as storage
from runtime.messages import InputError
from runtime.rows import hold_out, pairs_of, read_rows

needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")

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


# ------------------------------------------------------------------------------------------------- the kernel


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
@pytest.mark.parametrize("shape", [(64, 32, 256), (7, 19, 201), (1, 16, 63), (33, 24, 65)], ids=str)
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


def test_kernel_names_a_sharded_weight():
    startup.start_processes()
    weight = DTensor.from_local(torch.randn(70, 8), init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"weight must be a plain tensor, got a DTensor: .*full_tensor"):
        kernels.linear_logps(torch.randn(3, 8), weight, torch.tensor([0, 1, 2]))


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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive at the same time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves
        known = {x.untyped_storage()._cdata for x in leaves((args, kwargs)) if torch.is_tensor(x)}
        result = function(*args, **(kwargs or {}))
        for x in leaves(result):
            if torch.is_tensor(x) and x.untyped_storage()._cdata not in known | self.seen:
                storage = x.untyped_storage()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                self.seen.add(storage._cdata)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key, size):
        self.live -= size
        self.seen.discard(key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_memory_keeps_to_its_formula_whatever_the_vocabulary(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "BLOCK_CPU", 256)
    T, D, peaks = 96, 32, []
    for V in (1024, 8192):
        hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
        weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
        with LiveBytes() as memory:
            kernels.linear_logps(hidden, weight, torch.arange(T)).sum().backward()
        peaks.append(memory.peak - (T * D + V * D) * dtype.itemsize)
    formula = T * 256 * 4 + 2 * (T + 256) * D * 4
    assert peaks[1] <= peaks[0] + 1024 and peaks[1] <= formula + 16 * 1024, (peaks, formula)


def test_kernel_file_works_copied_alone_into_an_empty_folder(tmp_path):
    shutil.copy(HERE / "kernels.py", tmp_path)
    code = ("import sys; "
            "sys.modules.update(dict.fromkeys(('transformers', 'numpy', 'tqdm', 'safetensors')))\n"
            "import torch, kernels\n"
            "h = torch.randn(5, 8, requires_grad=True); "
            "kernels.linear_logps(h, torch.randn(99, 8), torch.arange(5)).sum().backward(); "
            "print('gradient', h.grad.shape)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                            env=ENVIRONMENT)
    assert "gradient torch.Size([5, 8])" in result.stdout, result.stderr


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


# --------------------------------------------------------------------------------------------------- the data


def make_pairs(tokenizer, count: int, span: str = "step", template: str = "chat") -> list[data.Pair]:
    rows = [(f"row {i}", row) for i, row in enumerate(make_rows(count))]
    return data.encode(rows, tokenizer, template, None, span)


def options(**changes) -> argparse.Namespace:
    """The flags that reading rows depends on."""
    flags = dict(template="chat", instruction=None, span="step", max_length=1024)
    return argparse.Namespace(**flags | changes)


def test_rows_are_read_alike_from_jsonl_json_and_parquet(tmp_path):
    rows = make_rows(5)
    files = [write_jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "a.json")]
    Path(files[1]).write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    try:
        import datasets
        files.append(str(tmp_path / "a.parquet"))
        datasets.Dataset.from_list(rows).to_parquet(files[2])
    except ImportError:
        with pytest.raises(InputError, match="pip install datasets"):
            read_rows("a.parquet")
    for file in files:
        assert [row for _, row in read_rows(file)] == rows
    assert read_rows(files[0])[3][0] == f"{files[0]}:4"


@pytest.mark.parametrize("content, message", [
    (b'{"a": 1}\n{"a": \n', r":2: not valid JSON"),
    (b'{"a": 1}\n\n[1]\n', r":3: must be a JSON object, got list"),
    (b'{"a": 1}\n{"a": "\xff"}\n', r":2: not UTF-8 \(byte 7\)"),
    (b"\n", "holds no rows"),
    (b'{"a": ' + b"9" * 5000 + b"}\n", ":1: not a row: "),
    (b"[" * 100_000 + b"\n", ":1: not a row: "),
])
def test_unreadable_rows_name_file_and_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    message = message if message[0] == ":" else ": " + message
    with pytest.raises(InputError, match="bad.jsonl" + message):
        read_rows(str(tmp_path / "bad.jsonl"))


def test_unreadable_files_are_named(tmp_path):
    for name, message in (("none.jsonl", "No such file"), ("x.csv", "must be a .jsonl")):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            read_rows(str(tmp_path / name))
    (tmp_path / "one.json").write_text('{"a":\n 1,}')
    with pytest.raises(InputError, match="one.json:2: not valid JSON"):
        read_rows(str(tmp_path / "one.json"))
    (tmp_path / "one.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="one.json: must be one JSON list"):
        read_rows(str(tmp_path / "one.json"))


@pytest.mark.parametrize("change, message", [
    ({"chosen": None}, "'chosen' must be text, got NoneType"),
    ({"chosen": " half a \ud83d"}, "'chosen' has half a character"),
    ({"prompt": ["x"]}, "'prompt' must be text, or a list of one message of the user"),
    ({"prompt": " "}, "'prompt' is empty"),
    ("initial_reason_steps", "no field 'initial_reason_steps'"),
])
def test_bad_rows_are_refused_with_their_place(tokenizer, change, message):
    row = make_rows(1)[0]
    row = row | change if isinstance(change, dict) else {k: v for k, v in row.items() if k != change}
    with pytest.raises(InputError, match=f"1 of 2 rows cannot be trained on:\n  f:7: .*{message}"):
        pairs_of([("f:6", make_rows(2)[1]), ("f:7", row)], "training", tokenizer, options())


@pytest.mark.parametrize("change, reason", [
    ({"rejected": " \n"}, "'rejected' is empty"),
    ({"rejected": " So 0 + 0 = 0  "}, "'chosen' equals 'rejected', so there is nothing to prefer"),
])
def test_rows_that_cannot_teach_are_dropped_and_counted_and_refused_above_a_fifth(tokenizer, capsys, change,
                                                                                  reason):
    rows = [(f"f:{i}", row) for i, row in enumerate(make_rows(5), 1)]
    bad = "f:9", make_rows(1)[0] | change
    assert len(pairs_of([*rows, bad], "training", tokenizer, options())) == 5
    assert f"dropped 1: {reason} (first: f:9)" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"2 of 7 rows cannot be .* a fifth: 2 {reason} .first: f:9"):
        pairs_of([*rows, bad, bad], "training", tokenizer, options())


@pytest.mark.parametrize("steps", [  # as they stand in Math-Step-DPO-10K, and none
    "Let's think step by step.\nStep 1: 1 + 1 = 2. \nStep 2:", "Let's think. Step 1: 1 + 1 = 2. Step 2:",
    "Let's think step by step.\nStep 16:", ""])
def test_the_steps_before_are_taken_as_they_are(tokenizer, steps):
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


def test_a_share_of_the_problems_is_held_out_whatever_the_order():
    rows = [(f"f:{i}", {"prompt": f"problem {i % 100}"}) for i in range(300)]
    rest, held_out = hold_out(rows, 0.2)
    problems = {row["prompt"] for _, row in held_out}
    assert 10 <= len(problems) <= 30 and not problems & {row["prompt"] for _, row in rest}
    assert hold_out(rows[::-1], 0.2)[1] == held_out[::-1]
    with pytest.raises(InputError, match="leaves 300 of 300 pairs"):
        hold_out(rows, 1e-9)


def test_a_step_has_no_end_of_sequence_and_a_solution_has_one(tokenizer):
    row = make_rows(1)[0]
    (step,), (solution,) = make_pairs(tokenizer, 1), make_pairs(tokenizer, 1, "solution")
    assert tokenizer.decode(step.chosen) == row["chosen"]
    assert tokenizer.decode(step.rejected) == row["rejected"]
    assert tokenizer.decode(solution.chosen) == row["full_chosen"] + tokenizer.eos_token
    eos = tokenizer.eos_token_id
    assert solution.chosen.count(eos) == solution.rejected.count(eos) == 1


def test_full_solutions_may_repeat_the_shared_steps(tokenizer):
    row = make_rows(3)[2]
    whole = row | {k: row["initial_reason_steps"] + row[k] for k in ("full_chosen", "full_rejected")}
    pairs = [data.encode([("f:1", r)], tokenizer, "chat", None, "solution") for r in (row, whole)]
    assert pairs[0] == pairs[1]


def test_templates_put_the_steps_into_the_open_answer(tokenizer):
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


def test_no_merge_across_the_step_boundary_is_invented_or_lost(tokenizer):
    row = make_rows(1)[0]
    row |= {"initial_reason_steps": "Let's think\nStep 1: ", "chosen": "the token", "rejected": "ten"}
    (pair,) = data.encode([("f:1", row)], tokenizer, "chat", None, "step")
    text = data.open_turn(tokenizer, row["prompt"], "chat") + row["initial_reason_steps"]
    for step, ids in ((row["chosen"], pair.chosen), (row["rejected"], pair.rejected)):
        assert pair.prefix + ids == tokenizer(text + step).input_ids
    assert tokenizer.decode(pair.chosen) == " the token"  # the space merged with the word: not in the prefix
    assert tokenizer.decode(pair.prefix).endswith("Step 1:")


def test_too_long_pairs_are_dropped_and_counted_never_cut(tokenizer, capsys):
    rows = [(f"f:{i}", row) for i, row in enumerate(make_rows(20), 1)]
    every = pairs_of(rows, "training", tokenizer, options())
    assert len(every) == 20
    lengths = [len(pair.prefix) + max(len(pair.chosen), len(pair.rejected)) for pair in every]
    limit = sorted(lengths)[9]
    kept = pairs_of(rows, "training", tokenizer, options(max_length=limit))
    assert kept == [pair for pair, length in zip(every, lengths, strict=True) if length <= limit]
    said = f"training    {len(kept)} pairs, {20 - len(kept)} dropped as longer than --max-length {limit}\n"
    assert said in capsys.readouterr().out
    with pytest.raises(InputError, match="no pair of 20 is left: 20 longer than --max-length 5"):
        pairs_of(rows, "training", tokenizer, options(max_length=5))


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
    plan = data.split(lengths, ranks, budget)
    assert all(len(micro) == ranks for micro in plan)
    assert sorted(itertools.chain(*itertools.chain(*plan))) == list(range(64))
    loads = np.array([[sum(lengths[i] for i in items) for items in micro] for micro in plan])
    assert loads.max() <= budget and len(plan) <= math.ceil(1.2 * sum(lengths) / (budget * ranks)) + 1
    assert (loads.max(1) - loads.min(1)).max() <= 90  # no rank waits for more than one pair's worth of tokens


def test_a_small_batch_on_many_ranks_leaves_some_without_pairs_and_a_giant_pair_is_refused():
    assert sorted(map(len, data.split([5, 7, 6], 8, 100)[0])) == [0] * 5 + [1] * 3
    with pytest.raises(ValueError, match="<= budget 10, got 11"):
        data.split([3, 11], 2, 10)


def test_packing_lays_the_prefix_out_once():
    pairs = [data.Pair([1, 2, 3], [10, 11], [20], "a"), data.Pair([4], [12], [21, 22], "b")]
    batch = data.pack(pairs)
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 20, 4, 12, 21, 22]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    assert batch.segments.query_lengths == [3, 2, 1, 1, 1, 2]
    assert batch.segments.query_offsets.tolist() == [0, 3, 5, 6, 7, 8, 10]
    assert batch.predict_at.tolist() == [2, 3, 2, 6, 6, 8]  # the last prefix token predicts both first tokens
    assert batch.targets.tolist() == [10, 11, 20, 12, 21, 22]
    assert batch.span.tolist() == [0, 0, 2, 1, 3, 3]  # chosen 0, 1, rejected 2, 3
    assert batch.tokens.tolist() == [[2, 1], [1, 2]]

    alone = data.pack(pairs[:1], share_prefix=False)
    assert alone.input_ids.tolist() == [[1, 2, 3, 10, 11, 1, 2, 3, 20]]
    assert alone.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert alone.segments.query_lengths == alone.segments.key_lengths == [5, 4]
    assert alone.predict_at.tolist() == [2, 3, 7]


def test_no_pairs_give_a_row_that_nothing_is_trained_on():
    empty = data.pack([])
    assert empty.input_ids.shape == (1, 1) and empty.targets.shape == (0,) and empty.tokens.shape == (2, 0)
    assert empty.targets.dtype == empty.predict_at.dtype == empty.tokens.dtype == torch.int64


def visible(segments: data.Segments) -> list[list[int]]:
    """Query by key, what the segments let a row's tokens see: the drawing in data.py's docstring."""
    seen = torch.zeros(sum(segments.query_lengths), sum(segments.query_lengths), dtype=torch.int)
    q, k = segments.query_offsets.tolist(), segments.key_offsets.tolist()
    for s in range(len(segments.query_lengths)):
        keys = segments.key_index[k[s]:k[s + 1]]
        for n, query in enumerate(range(q[s], q[s + 1])):
            seen[query, keys[:len(keys) - (q[s + 1] - q[s]) + n + 1]] = 1
    return seen.tolist()


def test_attention_rule_by_hand():
    batch = data.pack([data.Pair([1, 2], [10, 11], [20], "a"), data.Pair([4], [12], [21], "b")])
    assert visible(batch.segments) == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],   # rejected: the prefix and itself, not chosen
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 1]]


def test_a_model_is_known_by_its_numbers_its_tokenizer_and_its_template(tiny, tmp_path):
    def identity(change=None):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(tiny, tmp_path / "m")
        if change:
            change(tmp_path / "m")
        return storage.model_identity(str(tmp_path / "m"))

    def change_one_number(folder):
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] += 1e-3
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def change_template(folder):
        (folder / "chat_template.jinja").write_text("{{ messages }}")

    same = identity()
    assert same == identity(lambda folder: (folder / "notes.md").write_text("mine"))
    assert len({same, identity(change_one_number), identity(change_template)}) == 3
    assert storage.model_identity("owner/name") == "owner/name"


# ------------------------------------------------------------------------------------------------- the policy

FAMILIES = {
    "qwen2-tied": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=False)),
    "qwen2-windows": (transformers.Qwen2Config,
                      dict(use_sliding_window=True, sliding_window=20, max_window_layers=1)),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=16)),
    "llama": (transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralConfig, dict(sliding_window=None)),
    "mistral-window": (transformers.MistralConfig, dict(sliding_window=20)),  # shorter than the pairs
    "mistral-wide-window": (transformers.MistralConfig, dict(sliding_window=200)),
    "llama3-rope": (transformers.LlamaConfig, dict(max_position_embeddings=256, rope_parameters=dict(
        rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64))),
    "yarn-rope": (transformers.Qwen2Config, dict(max_position_embeddings=256, rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64))),
    "gemma3-window": (transformers.Gemma3TextConfig, dict(head_dim=16, sliding_window=20, layer_types=[
        "sliding_attention", "full_attention"])),
    "gemma3-wide-window": (transformers.Gemma3TextConfig, dict(head_dim=16, sliding_window=200)),
    "cohere-scale": (transformers.CohereConfig, dict(logit_scale=0.25)),
    "granite-scale": (transformers.GraniteConfig, dict(logits_scaling=8.0)),
    "phi-bias": (transformers.PhiConfig, {}),
    # Of three experts, so that two ranks have unequal shares; each token asks two.
    "qwen2-moe": (transformers.Qwen2MoeConfig, dict(
        num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40)),
    "qwen3-moe": (transformers.Qwen3MoeConfig, dict(
        num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16)),
    "mixtral": (transformers.MixtralConfig, dict(num_local_experts=3, num_experts_per_tok=2)),
}


def make_model(family: str, **changes):
    """A tiny random model with weights large enough that a wrong mask changes everything."""
    kind, options = FAMILIES[family]
    config = kind(**dict(vocab_size=400, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
                         eos_token_id=1) | options | changes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def separate_logps(model, pairs) -> torch.Tensor:
    """(2, B) with a plain forward over each sequence alone: the truth."""
    sums = []
    for pair, step in ((p, s) for k in (1, 2) for p, s in ((p, p[k]) for p in pairs)):
        ids = torch.tensor([pair.prefix + step])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(logps[len(pair.prefix) - 1:].sum())
    return torch.stack(sums).view(2, -1)


def packed_logps(model, pairs, share_prefix: bool = True) -> torch.Tensor:
    """(2, B) by the policy."""
    architectures.register_attention()
    model.set_attn_implementation("segments")
    return stepdpo.Policy(model)(data.pack(pairs, share_prefix))


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logps_and_gradients_equal_those_of_separate_sequences(tokenizer, family, share_prefix):
    pairs, results = make_pairs(tokenizer, 5), []
    for packed in (True, False):
        model = make_model(family)
        logps = packed_logps(model, pairs, share_prefix) if packed else separate_logps(model, pairs)
        stepdpo.step_dpo_loss(*logps, *torch.full((2, 5), -60.0), 0.1)[0].sum().backward()
        results.append((logps.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (ours, gradients), (truth, true_gradients) = results
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-4)
    for name, gradient in true_gradients.items():
        size = gradient.abs().max()
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * size + 1e-6, name


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
    one_by_one = kernels.packed_attention(query, key, value, segments, 0.3, window)
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
    results = [kernels.packed_attention(*x, segments, window=window) for x in (exact, rounded)]
    upstream = torch.randn_like(results[0])
    results[0].backward(upstream), results[1].backward(upstream.bfloat16())
    for ours, truth in zip([results[1], *(x.grad for x in rounded)], [results[0], *(x.grad for x in exact)],
                           strict=True):
        # With a window of one token the gradient of the query is zero, but for rounding.
        assert (ours.float() - truth).norm() <= 0.02 * truth.norm() + 1e-3


@pytest.mark.parametrize("beyond", ["softcap", "s_aux", "position_bias", "attention_mask"])
def test_attention_beyond_causal_and_windows_is_refused_by_name(beyond):
    query = torch.randn(1, 2, 1, 8)
    refused = pytest.raises(InputError, match=f"Model is not supported: Module attends with {beyond}")
    with refused, architectures.attending_to("Model", data.pack([]).segments):
        architectures.segment_attention(torch.nn.Module(), query, query, query, **{beyond: 30.0})


SMALL = dict(vocab_size=400, hidden_size=64, num_attention_heads=4, num_hidden_layers=2)


def test_models_that_pass_no_keyword_arguments_to_their_attention_are_exact_too(tokenizer):
    config = transformers.StableLmConfig(**SMALL, intermediate_size=48, num_key_value_heads=2,
                                         initializer_range=0.2)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    pairs = make_pairs(tokenizer, 3)
    truth = separate_logps(model, pairs)
    torch.testing.assert_close(packed_logps(model, pairs), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("config, message", [
    (transformers.BloomConfig(vocab_size=400, hidden_size=64, n_head=4, n_layer=2),
     "BloomForCausalLM is not supported: it does not take its attention from transformers' interface"),
    (transformers.GPTJConfig(vocab_size=400, n_embd=64, n_head=4, n_layer=2, rotary_dim=8),
     "GPTJForCausalLM is not supported: it does not take its attention from transformers' interface"),
    (transformers.Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=16,
                               final_logit_softcapping=None),
     "Gemma2ForCausalLM is not supported: Gemma2Attention attends with softcap"),
    (transformers.BartConfig(vocab_size=400, d_model=64, decoder_layers=1, decoder_attention_heads=4,
                             decoder_ffn_dim=48),
     "BartForCausalLM is not supported: it counts positions itself"),
    (transformers.Lfm2Config(**SMALL, intermediate_size=48, num_key_value_heads=2,
                             layer_types=["conv", "full_attention"]),
     r"Lfm2ForCausalLM is not supported: its layers \(conv\) connect tokens in other ways"),
    (transformers.HrmTextConfig(**SMALL, intermediate_size=48),
     "HrmTextForCausalLM is not supported: transformers cuts or joins the tensors in its files"),
], ids=lambda x: getattr(x, "model_type", ""))
def test_models_whose_attention_cannot_be_ours_are_refused_by_name(workplace, tokenizer, tmp_path, config,
                                                                  message):
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        stepdpo.train(make_config(workplace, tmp_path / "out", model=tmp_path / "m"))


def test_models_that_cap_their_logits_are_refused_by_name():
    with pytest.raises(InputError, match="is not supported: it caps its .*final_logit_softcapping = 3"):
        stepdpo.Policy(make_model("llama", final_logit_softcapping=30.0))


def test_models_that_carry_state_along_a_row_are_refused():
    model = make_model("llama")
    model._is_stateful = True
    with pytest.raises(InputError, match=r"its layers \(recurrent\) connect tokens in other ways"):
        stepdpo.Policy(model)


def test_heads_that_are_more_than_one_linear_layer_are_refused():
    model = make_model("llama")
    model.transform = torch.nn.Linear(64, 64)
    with pytest.raises(InputError, match="its logits are not those of its base model and one linear"):
        stepdpo.Policy(model)


# --------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="session")
def workplace(tokenizer, tmp_path_factory):
    """A folder with model folders named like FAMILIES, pairs.jsonl (20 rows) and eval.jsonl (7 others)."""
    folder = tmp_path_factory.mktemp("work")
    for family in ("qwen2", "qwen2-tied", "mistral-window"):
        make_model(family).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    rows = make_rows(27)
    write_jsonl(folder / "pairs.jsonl", rows[:20]), write_jsonl(folder / "eval.jsonl", rows[20:])
    os.environ["STEPDPO_CACHE"] = str(folder / "cache")
    return folder


def make_flags(workplace, out, **changes) -> list[str]:
    """The flags of a short run; `changes` by their names with underscores, None takes one away."""
    flags = dict(model=workplace / "qwen2", data=str(workplace / "pairs.jsonl"), output_dir=out, batch_size=7,
                 epochs=2, learning_rate=2e-4, tokens_per_micro_batch=600, dtype="float32") | changes
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def make_config(workplace, out, **changes) -> stepdpo.Config:
    return stepdpo.parse(make_flags(workplace, out, **changes))


def read_metrics(out) -> list[dict]:
    return rows_of(Path(out) / "metrics.jsonl")


def losses_of(out) -> list[float]:
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


if CUDA:  # the trainer is tested on the CPU there too, and on the GPU in a child process
    def start_on_cpu(minutes: float = 30) -> None:
        if not dist.is_initialized():
            alone = dict(store=dist.HashStore(), rank=0, world_size=1)
            dist.init_process_group("gloo", **({} if "RANK" in os.environ else alone))
    startup.start_processes, startup.local_device = start_on_cpu, lambda: torch.device("cpu")


def launch(flags: list[str], environment: dict = ENVIRONMENT) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "stepdpo.py", *flags], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=environment | {"STEPDPO_CACHE": os.environ["STEPDPO_CACHE"]})


def _train(flags: list[str]) -> None:
    sys.argv = ["stepdpo.py", *flags]
    stepdpo.main()


def run_in_processes(processes: int, folder: Path, function: Callable, *arguments) -> list[str]:
    """A function in processes as torchrun starts them, without its start. Returns what each said."""
    ranks = start_ranks(processes, folder, function, *arguments)
    for rank in ranks:
        rank.join(200)
    said = [(folder / f"said-{rank}").read_text() for rank in range(processes)]
    assert [rank.exitcode for rank in ranks] == [0] * processes, "".join(said)
    return said


def plan_of(pairs: int, batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    steps = epochs * data.steps_per_epoch(pairs, batch_size)
    return [data.indices_of_step(step, pairs, batch_size, seed) for step in range(steps)]


def naive_training(config: stepdpo.Config) -> list[float]:
    """The same optimizer steps as plainly as can be: whole logits, one sequence at a time, two models."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, reference = (load(config.model, dtype=torch.float32).eval() for _ in range(2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    pairs = data.encode(read_rows(config.data[0]), tokenizer, "chat", None, config.span)
    plan = plan_of(len(pairs), config.batch_size, config.epochs, config.seed)
    optimizer, losses = torch.optim.AdamW(policy.parameters(), weight_decay=0.0), []
    warmup = math.ceil(0.1 * len(plan))
    for step, indices in enumerate(plan):
        batch = [pairs[i] for i in indices]
        chosen, rejected = separate_logps(policy, batch)
        ref_chosen, ref_rejected = separate_logps(reference, batch).detach()
        margin = config.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = -torch.log(torch.sigmoid(margin)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if step < warmup:
            shape = (step + 1) / (warmup + 1)
        else:
            shape = (1 + math.cos(math.pi * (step - warmup) / (len(plan) - warmup))) / 2
        optimizer.param_groups[0]["lr"] = config.learning_rate * shape
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="session")
def run(workplace):
    """One whole run in this process, which other runs are compared with."""
    out = workplace / "run"
    stepdpo.train(make_config(workplace, out, eval_data=str(workplace / "eval.jsonl"), eval_every=3))
    return out


def test_training_equals_a_naive_trainer_step_by_step(workplace, run):
    naive = naive_training(make_config(workplace, run))
    assert naive[0] == pytest.approx(math.log(2), abs=1e-6) and naive[-1] < 0.6  # it does learn
    assert losses_of(run) == pytest.approx(naive, abs=1e-5)


@pytest.mark.parametrize("changes", [
    dict(span="solution"),
    dict(tokens_per_micro_batch=400),
    dict(share_prefix=False),
    dict(activation_checkpointing=False, model="qwen2-tied"),
    dict(model="mistral-window"),
], ids=str)
def test_training_equals_a_naive_trainer_whatever_the_options(workplace, tmp_path, changes):
    changes = changes | {"model": str(workplace / changes.get("model", "qwen2"))}
    config = make_config(workplace, tmp_path / "out", epochs=1, **changes)
    stepdpo.train(config)
    assert losses_of(tmp_path / "out") == pytest.approx(naive_training(config), abs=1e-5)


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


def test_the_record_of_a_run_names_the_budget_that_was_chosen(workplace, tmp_path):
    stepdpo.train(make_config(workplace, tmp_path / "out", max_steps=1, tokens_per_micro_batch=None))
    assert json.loads((tmp_path / "out/run.json").read_text())["config"]["tokens_per_micro_batch"] == 1024


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


def test_the_exported_model_is_an_ordinary_folder_with_the_trained_weights(workplace, run):
    before = transformers.AutoModelForCausalLM.from_pretrained(workplace / "qwen2", dtype=torch.float32)
    after, info = transformers.AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert after.dtype == torch.float32
    moved = [(a - b).abs().max() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 0.05
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    rows = read_rows(str(workplace / "eval.jsonl"))
    pairs = data.encode(rows, tokenizer, "chat", None, "step")
    logged = [x for x in read_metrics(run) if "eval/loss" in x][-1]
    with torch.no_grad():
        chosen, _ = separate_logps(after, pairs)
    assert chosen.mean().item() == pytest.approx(logged["eval/logps/chosen"], abs=1e-3)
    prompt = torch.tensor([pairs[0].prefix])
    assert after.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.shape[1]


def test_export_keeps_the_files_names_and_dtypes_of_the_source(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 1000)  # most tensors are several
    source = tmp_path / "source"
    model = make_model("qwen2-tied").bfloat16()
    model.save_pretrained(source, max_shard_size="20KB")
    startup.start_processes()
    config = make_config(workplace, tmp_path)
    policy = stepdpo.build(str(source), config)
    storage.export(policy, str(source), str(tmp_path / "out"))
    parts = sorted(path.name for path in source.glob("model-*-of-*.safetensors"))
    assert len(parts) > 2
    for name in parts:  # nothing was trained, and bf16 survives fp32
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    for (name, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


class StoredTensor:
    """As safetensors gives it, but it counts what is read."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.reads, self.get_shape = tensor, [], lambda: [*tensor.shape]
        self.get_dtype = lambda: "F32"

    def __getitem__(self, index):
        self.reads.append(self.tensor[index].numel())
        return self.tensor[index]


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_each_rank_reads_its_own_rows_or_experts_and_no_more_than_a_block_at_once(monkeypatch, shards):
    monkeypatch.setattr(storage, "BLOCK", 9)
    whole = torch.arange(5 * 6 * 4.0).view(5, 6, 4)  # 5 rows or experts; gate and up of (3, 4)
    in_one = {storage.Place("x"): StoredTensor(whole)}
    apart = {storage.Place("x", expert, part, 2): StoredTensor(whole[expert, 3 * part:3 * part + 3])
             for expert in range(5) for part in range(2)}
    for stored in (in_one, apart):
        for shard in range(shards):
            start, stop = storage.rows_of_shard(5, shard, shards)
            rows = torch.full_like(whole[start:stop], -1)
            monkeypatch.setattr(storage, "shard_of", lambda _, shard=shard: (shard, shards))
            monkeypatch.setattr(storage, "local_of", lambda _, rows=rows: rows)
            for place, tensor in stored.items():
                tensor.reads.clear()
                storage.fill(whole, place, tensor, "", is_full=False)
                at_most = 24 if place.expert is None else 9  # a row is the least
                assert max(tensor.reads, default=0) <= at_most
                if place.expert is not None and not start <= place.expert < stop:
                    assert not tensor.reads
            assert torch.equal(rows, whole[start:stop])
            assert sum(sum(tensor.reads) for tensor in stored.values()) == rows.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_that_no_checkpoint_holds_come_out_right(workplace, tmp_path, family):
    make_model(family).save_pretrained(tmp_path)
    startup.start_processes()
    ours = stepdpo.build(str(tmp_path), make_config(workplace, "unused")).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, a), (other, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other and torch.equal(a, b)


def test_buffers_that_cannot_be_computed_are_an_error_and_never_garbage(workplace, monkeypatch):
    monkeypatch.setattr(transformers.Qwen2PreTrainedModel, "_init_weights", lambda self, module: None)
    startup.start_processes()
    config = make_config(workplace, "unused")
    with pytest.raises(InputError, match=r"its buffer model\.rotary_emb\.inv_freq is in no checkpoint"):
        stepdpo.build(config.model, config)


def test_tensors_may_have_older_names_and_no_dimension(workplace, tmp_path):
    """Pythia's head is embed_out in its files, and they hold masks; Apertus has buffers of no dimension."""
    small = dict(SMALL, intermediate_size=48)
    for config in (transformers.GPTNeoXConfig(**small),
                   transformers.ApertusConfig(**small, num_key_value_heads=2)):
        source, out = tmp_path / config.model_type, tmp_path / f"{config.model_type}-out"
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
        weights = load_file(source / "model.safetensors")
        if config.model_type == "gpt_neox":
            weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})

        startup.start_processes()
        policy = stepdpo.build(str(source), make_config(workplace, tmp_path))
        storage.export(policy, str(source), str(out))
        exported = load_file(out / "model.safetensors")
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[name], weights[name]) for name in weights)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe", "mixtral"])
def test_mixtures_train_like_a_naive_trainer_and_their_experts_are_exported_one_by_one(
        workplace, tokenizer, tmp_path, monkeypatch, family):
    source, export, trained = tmp_path / "source", storage.export, {}
    make_model(family).save_pretrained(source, max_shard_size="60KB")
    tokenizer.save_pretrained(source)

    def remember_and_export(policy, *folders):
        trained.update({name: x.full_tensor() for name, x in policy.model.state_dict().items()})
        export(policy, *folders)

    monkeypatch.setattr(storage, "export", remember_and_export)
    config = make_config(workplace, tmp_path / "one", model=source, epochs=1)
    stepdpo.train(config)
    assert losses_of(tmp_path / "one") == pytest.approx(naive_training(config), abs=1e-5)
    run_in_processes(2, tmp_path, _train, make_flags(workplace, tmp_path / "two", model=source, epochs=1))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)

    before, of_one, of_two = (tensors_of(x) for x in (source, tmp_path / "one/model", tmp_path / "two/model"))
    assert sum(".experts." in name for name in before) == 2 * 3 * 3  # layers, experts, gate and up and down
    assert before.keys() == of_one.keys() == of_two.keys()
    for name, x in of_one.items():
        assert not torch.equal(x, before[name]), name
        torch.testing.assert_close(of_two[name], x, atol=5e-5, rtol=0)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one/model").state_dict()
    assert trained.keys() == again.keys()
    assert all(torch.equal(trained[name], again[name]) for name in again)


def test_experts_too_many_too_few_and_of_other_sizes_are_named(workplace, tmp_path):
    make_model("qwen3-moe").save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.experts.2.up_proj.weight"
    weights, config = load_file(path), make_config(workplace, "unused", model=tmp_path)
    expert = weights.pop(name)
    changes = [
        ({}, r"missing: \['model.layers.1.mlp.experts.gate_up_proj\[2\]'\], left over: \[\]"),
        ({name: expert, name.replace("s.2.", "s.3."): expert.clone()},
         r"missing: \[\], left over: \['model.layers.1.mlp.experts.3.up_proj.weight'\]"),
        ({name: expert[:-1].clone()}, r"experts.2.up_proj.weight must be \[24, 64\], got \[23, 64\]"),
        ({name: expert / 0}, "experts.2.up_proj.weight holds numbers that are not finite"),
    ]
    startup.start_processes()
    for change, message in changes:
        save_file(weights | change, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            stepdpo.build(str(tmp_path), config)


def test_experts_may_be_joined_in_the_files_too(workplace, tmp_path):
    model = make_model("qwen3-moe")
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    startup.start_processes()
    policy = stepdpo.build(str(tmp_path), make_config(workplace, "unused"))
    for name, x in policy.model.state_dict().items():
        assert torch.equal(x.full_tensor(), model.state_dict()[name]), name


def test_only_joins_of_experts_are_taken_for_such():
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter
    stack, join = MergeModulelist(dim=0), Concatenate(dim=1)
    one, two, target = ["experts.*.a"], ["experts.*.a", "experts.*.b"], ["experts.c"]
    several = Concatenate(dim=1, num_shards_attribute="shards")
    for sources, operations, expected in [
            (one, [stack], True), (two, [stack, join], True),
            (one, [stack, several], False), (two, [stack], False), (["a"], [Transpose(0, 1)], False)]:
        change = WeightConverter(sources, target, operations=operations)
        assert storage.joins_experts(change) is expected, operations


def test_files_of_a_model_may_stand_in_folders_but_not_outside_theirs(workplace, tmp_path):
    weights = load_file(workplace / "qwen2" / "model.safetensors")
    shutil.copytree(workplace / "qwen2", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    where = {name: f"{'ab'[i % 2]}/model.safetensors" for i, name in enumerate(sorted(weights))}
    for folder in "ab":
        (tmp_path / "m" / folder).mkdir()
        part = {name: weights[name] for name in where if where[name][0] == folder}
        save_file(part, tmp_path / "m" / folder / "model.safetensors", metadata={"format": "pt"})
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))

    startup.start_processes()
    config = make_config(workplace, "unused")
    policy = stepdpo.build(str(tmp_path / "m"), config)
    storage.export(policy, str(tmp_path / "m"), str(tmp_path / "out"))
    for folder in "ab":
        again = load_file(tmp_path / "out" / folder / "model.safetensors")
        assert again and all(torch.equal(again[name], weights[name]) for name in again)

    for outside in ("../m2/model.safetensors", "/etc/model.safetensors"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, outside)}))
        with pytest.raises(InputError, match="index.json: '.*' must be a file inside that folder"):
            stepdpo.build(str(tmp_path / "m"), config)


def test_any_number_of_processes_gives_the_same_losses(workplace, run, tmp_path):
    for processes in (2, 3, 4):
        out = tmp_path / str(processes)
        options = dict(eval_data=str(workplace / "eval.jsonl"), eval_every=3, save_every=6)
        run_in_processes(processes, tmp_path, _train, make_flags(workplace, out, **options))
        for ours, theirs in zip(read_metrics(out), read_metrics(run), strict=True):
            for key in ours.keys() - {"tokens_per_second", "pairs_per_second"}:
                if key.endswith("accuracies") and ours["step"] == 0:
                    continue  # margins of 0, so rounding decides
                assert ours[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-5), (processes, key)
        with (safe_open(out / "model" / "model.safetensors", "pt") as a,
              safe_open(run / "model" / "model.safetensors", "pt") as b):
            for name in b.keys():
                torch.testing.assert_close(a.get_tensor(name), b.get_tensor(name), atol=2e-5, rtol=0)

        # And one process can go on from what several have saved.
        exported = weights_of(out / "model")
        shutil.rmtree(out / "model")
        stepdpo.train(make_config(workplace, out, resume=True, **options))
        assert weights_of(out / "model") == exported


@pytest.mark.parametrize("length, before, after", [(10, 4, 3), (3, 8, 2), (7, 2, 8), (1, 3, 5), (16, 4, 4)])
def test_rows_find_their_way_from_any_number_of_shards_to_any_other(length, before, after):
    whole = torch.arange(length)
    old_places = [storage.rows_of_shard(length, shard, before) for shard in range(before)]
    new_places = [storage.rows_of_shard(length, shard, after) for shard in range(after)]
    stored = [whole[start:stop] for start, stop in old_places]
    assert torch.equal(torch.cat(stored), whole)
    assert [len(x) for x in stored if len(x)] == [len(x) for x in whole.chunk(before)]  # as FSDP does it
    for start, stop in new_places:
        rows = torch.full((stop - start,), -1)
        for old, place in zip(stored, old_places, strict=True):
            checkpoints.copy_common_rows(rows, (start, stop), old, place)
        assert torch.equal(rows, whole[start:stop])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_preempted_run_saves_and_resumes_to_the_same_losses(workplace, run, tmp_path, number):
    out = tmp_path / "out"
    held_out = workplace / "eval.jsonl"
    child = launch(make_flags(workplace, out, eval_data=held_out, eval_every=3, save_every=2))
    while not (out / "metrics.jsonl").exists() or not read_metrics(out):  # it has been evaluated
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.01)
    child.send_signal(number)
    output, _ = child.communicate(timeout=100)
    assert child.returncode == 128 + number and "--resume continues" in output
    (saved,) = (out / "checkpoints").iterdir()  # only the newest is kept
    assert not (out / "model").exists()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "loss": 1}\n{"torn')  # what a kill -9 after the checkpoint would leave
    with pytest.raises(InputError, match="--beta 0.4 -> 0.3"):
        stepdpo.train(make_config(workplace, out, resume=True, beta=0.3, eval_data=held_out))
    stepdpo.train(make_config(workplace, out, resume=True, eval_data=held_out, eval_every=3))
    assert 1 <= int(saved.name[-6:]) < 6
    for ours, theirs in zip(read_metrics(out), read_metrics(run), strict=True):
        assert ours["step"] == theirs["step"]
        for key in ("loss", "eval/loss"):
            assert ours.get(key) == theirs.get(key)
    assert weights_of(out / "model") == weights_of(run / "model")


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_reference_logps_are_cached_under_what_they_depend_on(workplace, tmp_path, capsys):
    def said(**changes):
        out = tmp_path / str(len(os.listdir(tmp_path)))
        stepdpo.train(make_config(workplace, out, max_steps=1, **changes))
        return capsys.readouterr().out
    os.environ["STEPDPO_CACHE"] = str(tmp_path / "cache")
    try:
        assert "computed, kept in" in said()
        assert "pairs read from" in said(learning_rate=1e-4)
        other_model, copy = workplace / "qwen2-tied", tmp_path / "copy"
        for changes in (dict(instruction="Think."), dict(span="solution"), dict(model=other_model),
                        dict(dtype="bfloat16"), dict(share_prefix=False)):
            assert "computed, kept in" in said(**changes)
        shutil.copytree(workplace / "qwen2", copy, copy_function=shutil.copyfile)
        assert "computed, kept in" in said(model=copy)  # written later, so it may be another
    finally:
        os.environ["STEPDPO_CACHE"] = str(workplace / "cache")


def test_another_reference_model_moves_the_first_loss(workplace, tmp_path):
    stepdpo.train(make_config(workplace, tmp_path, max_steps=1, reference=str(workplace / "qwen2-tied")))
    assert abs(losses_of(tmp_path)[0] - math.log(2)) > 0.1


def test_start_up_says_what_will_happen(workplace, tmp_path, capsys):
    stepdpo.train(make_config(workplace, tmp_path, max_steps=1, max_length=110))
    out = capsys.readouterr().out
    for expected in ("Qwen2ForCausalLM", "dropped 9: longer than --max-length 110 (first: ",
                     "sharing the prefix saves", "[[chosen> So 0 + 0 = 0<]]",
                     "packed and plain log-probabilities differ by", "model in"):
        assert expected in out


def test_the_self_check_stops_a_run_whose_attention_ignores_the_segments(workplace, tmp_path, monkeypatch):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def all_see_all(module, query, key, value, attention_mask, **kwargs):
        architectures._current.calls += 1
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    monkeypatch.setattr(architectures, "segment_attention", all_see_all)
    message = "Qwen2ForCausalLM: packed .* differ from plain ones by .* so it cannot be trained here"
    with pytest.raises(InputError, match=message):
        stepdpo.train(make_config(workplace, tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_is_never_overwritten(workplace, run, tmp_path, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        stepdpo.train(make_config(workplace, run))
    with pytest.raises(InputError, match="pairs.jsonl: is not a folder"):
        stepdpo.train(make_config(workplace, workplace / "pairs.jsonl"))
    stepdpo.train(make_config(workplace, run, resume=True, eval_data=str(workplace / "eval.jsonl")))
    assert "finished    already" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("changes, message", [
    (dict(model="/nowhere"), "/nowhere: no such folder"),
    (dict(tokens_per_micro_batch=100),
     r"pairs.jsonl:\d+: takes \d+ tokens, more than --tokens-per-micro-batch 100"),
    (dict(reference="tokenizer"), "its vocabulary is not that of"),
    (dict(model="empty"), "empty/config.json: No such file"),
    (dict(model="small"), r"pairs.jsonl:\d+: has token \d+, but .*small has 300 embeddings"),
    (dict(model="torn"), "torn: SafetensorError: Error while deserializing header"),
    (dict(model="pickled"), "only safetensors weights are loaded"),
    (dict(model="headless"), "its tensors are not one to one those of Qwen2ForCausalLM"),
    (dict(model="short"), r"pairs.jsonl:\d+: has \d+ tokens, but Qwen2.* has no positions beyond 90"),
    (dict(model="reshaped"), r"reshaped/model.safetensors: lm_head.weight must be \[400, 64\], got"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_bad_models_and_sizes_are_refused(workplace, tmp_path, changes, message):
    for name in ("tokenizer", "pickled", "headless"):
        shutil.copytree(workplace / "qwen2", tmp_path / name)
    text = (tmp_path / "tokenizer/tokenizer.json").read_text()
    (tmp_path / "tokenizer/tokenizer.json").write_text(text.replace('"<s>"', '"<t>"'))
    (tmp_path / "pickled/model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    shutil.copytree(workplace / "qwen2", tmp_path / "small")
    make_model("qwen2", vocab_size=300).save_pretrained(tmp_path / "small")
    shutil.copytree(workplace / "qwen2", tmp_path / "short")
    make_model("qwen2", max_position_embeddings=90).save_pretrained(tmp_path / "short")
    shutil.copytree(workplace / "qwen2", tmp_path / "torn")
    weights_file = tmp_path / "torn/model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    weights = load_file(tmp_path / "headless/model.safetensors")
    shutil.copytree(workplace / "qwen2", tmp_path / "reshaped")
    head = weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "headless/model.safetensors")
    save_file({**weights, "lm_head.weight": head[:7].clone()}, tmp_path / "reshaped/model.safetensors")
    changes = {k: str(tmp_path / v) if isinstance(v, str) and v[0] != "/" else v for k, v in changes.items()}
    with pytest.raises(InputError, match=message):
        stepdpo.train(make_config(workplace, tmp_path / "out", **changes))
    assert not os.path.exists(tmp_path / "out") or os.listdir(tmp_path / "out") == [".lock"]


def test_a_loss_that_is_not_finite_stops_before_the_update(workplace, tmp_path):
    with pytest.raises(InputError, match="step 1: loss nan.* nothing was updated.*pairs.jsonl:"):
        stepdpo.train(make_config(workplace, tmp_path / "out", learning_rate=1e30))
    assert len(losses_of(tmp_path / "out")) == 1 and not (tmp_path / "out/model").exists()


OFFLOADABLE = dict(max_grad_norm=0.3, tokens_per_micro_batch=300)  # clipped; several micro-batches


@pytest.fixture(scope="session")
def not_offloaded(workplace, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    stepdpo.train(make_config(workplace, out, **OFFLOADABLE))
    assert all(line["grad_norm"] > 0.3 for line in read_metrics(out))
    return out


@pytest.mark.parametrize("what", offload.OFFLOADS)
def test_offloading_changes_nothing_but_the_place(workplace, not_offloaded, tmp_path, what):
    stepdpo.train(make_config(workplace, tmp_path / "out", offload=what, **OFFLOADABLE))
    assert weights_of(tmp_path / "out/model") == weights_of(not_offloaded / "model")
    for ours, theirs in zip(read_metrics(tmp_path / "out"), read_metrics(not_offloaded), strict=True):
        assert ours["loss"] == theirs["loss"] and ours["grad_norm"] == theirs["grad_norm"]


@pytest.mark.parametrize("before, after", [("gradients", None), (None, "moments"), ("moments", "all")])
def test_a_checkpoint_knows_nothing_of_offloading(workplace, not_offloaded, tmp_path, before, after):
    saves = dict(save_every=3, **OFFLOADABLE)
    stop_after(3, lambda: stepdpo.train(make_config(workplace, tmp_path / "b", offload=before, **saves)))
    assert len(losses_of(tmp_path / "b")) == 3
    stepdpo.train(make_config(workplace, tmp_path / "b", offload=after, resume=True, **saves))
    assert weights_of(tmp_path / "b/model") == weights_of(not_offloaded / "model")


def stop_after(steps: int, train: Callable[[], None]) -> None:
    """Run a training that is asked to stop, as by SIGTERM, in its optimizer step `steps`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        train_step = stepdpo.train_step

        def step_and_stop(step, *args):
            if step + 1 == steps:
                signal.raise_signal(signal.SIGTERM)
            return train_step(step, *args)

        patch.setattr(stepdpo, "train_step", step_and_stop)
        train()


@needs_cuda
@pytest.mark.parametrize("what", offload.OFFLOADS)
def test_on_cuda_the_moments_visit_the_gpu_for_the_same_update(workplace, tmp_path, what):
    """Losses are equal to rounding: gradients on CUDA are not repeatable to the bit."""
    options = dict(dtype="float32", **OFFLOADABLE)
    for value in (None, what):
        flags = make_flags(workplace, tmp_path / str(value), offload=value, **options)
        child = launch(flags, dict(os.environ, TRITON_INTERPRET="0"))
        output, _ = child.communicate(timeout=300)
        assert child.returncode == 0, output
    assert losses_of(tmp_path / what) == pytest.approx(losses_of(tmp_path / "None"), abs=1e-5)


def launch_nodes(workplace, outs: Sequence[Path], homes: Path, processes: int, **options) -> list[tuple]:
    """A torchrun for each output folder, as on nodes of their own. Returns what each printed, and status."""
    nodes, port = [], free_port()
    for number, out in enumerate(outs):
        home = homes / f"home{number}"
        home.mkdir()
        command = [*TORCHRUN, str(processes), "--nnodes", str(len(outs)), "--node-rank", str(number),
                   "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command.remove("--standalone")
        nodes.append(subprocess.Popen(
            [*command, "stepdpo.py", *make_flags(workplace, out, **options)], cwd=HERE, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=ENVIRONMENT | {"HOME": str(home), "STEPDPO_CACHE": str(home / "cache")}))
    return [(node.communicate(timeout=200)[0], node.returncode) for node in nodes]


def test_nodes_may_share_copies_or_have_one_each(workplace, run, tmp_path):
    out = tmp_path / "out"
    options = dict(eval_data=str(workplace / "eval.jsonl"), eval_every=3, save_every=3)
    nodes = launch_nodes(workplace, [out, out], tmp_path, 2, shard_size=2, **options)
    assert [status for _, status in nodes] == [0, 0], nodes
    assert losses_of(out) == pytest.approx(losses_of(run), abs=1e-5)
    assert (tmp_path / "home0/cache").exists() and not (tmp_path / "home1/cache").exists()

    # Two shards, of two copies each; and one process can go on from them.
    assert len([*next((out / "checkpoints").iterdir()).glob("weights.*")]) == 2
    exported = weights_of(out / "model")
    shutil.rmtree(out / "model")
    stepdpo.train(make_config(workplace, out, resume=True, **options))
    assert weights_of(out / "model") == exported


def test_nodes_that_do_not_share_the_output_folder_are_told_so(workplace, tmp_path):
    nodes = launch_nodes(workplace, [tmp_path / "a", tmp_path / "b"], tmp_path, 1)
    for output, status in nodes:
        assert status != 0 and "rank 1 on " in output, output
        assert "use one that all nodes share" in output, output


@pytest.mark.parametrize("change", ["data", "model"])
def test_nodes_that_read_other_things_are_told_so(monkeypatch, workplace, tmp_path, change):
    def gathered(seen, mine):
        seen[:] = [mine, mine | {change: "other", "host": "second"}]

    startup.start_processes()
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with pytest.raises(InputError, match=f"--{change}: rank 1 on second reads another content than rank 0"):
        content = {"data": "a", "model": "b"}
        outputs.refuse_other_nodes({"content": content}, make_config(workplace, tmp_path))


def test_processes_that_share_copies_must_come_out_even(workplace, tmp_path):
    with pytest.raises(InputError, match="--shard-size 3: must divide the number of processes, 1"):
        stepdpo.train(make_config(workplace, tmp_path / "out", shard_size=3))


def _download_slowly() -> None:
    def snapshot_download(name, local_files_only=False, **_):
        time.sleep(0 if local_files_only else 6)
        return f"/cache/{name}"

    huggingface_hub.snapshot_download = snapshot_download
    startup.start_processes()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    print(storage.resolve("owner/name"))
    dist.barrier()


def test_a_download_may_take_longer_than_processes_wait_for_each_other(tmp_path):
    for said in run_in_processes(2, tmp_path, _download_slowly):
        assert said == "/cache/owner/name\n"


def test_answers_of_a_model_that_no_process_can_hold_are_refused(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "count_parameters", lambda folder: 10**15)
    with pytest.raises(InputError, match=r"would hold the model, 4,000,000 GB.*pairs solve --server"):
        stepdpo.run(make_config(workplace, tmp_path / "out", test_problems=HERE / "demo/test.jsonl"))
    assert not (tmp_path / "out/run.json").exists()


def test_numbers_of_a_model_are_counted_from_the_headers(workplace):
    model = transformers.AutoModelForCausalLM.from_pretrained(workplace / "qwen2-tied")
    assert storage.count_parameters(str(workplace / "qwen2-tied")) == model.num_parameters()


def test_torchrun_leaves_no_core_idle(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for environment in ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4"}, {"OMP_NUM_THREADS": "2"}, {}):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            startup.use_cores_and_memory_well()
    assert asked == [3]


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


def test_rows_of_other_lengths_and_segments_are_not_compiled_anew(tokenizer):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, pairs = make_model("qwen2"), make_pairs(tokenizer, 14)
    architectures.register_attention()
    model.set_attn_implementation("segments")
    policy = stepdpo.Policy(model)
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


# ------------------------------------------------------------------------------------------- the command line


def test_flags_take_hyphens_underscores_and_files(tmp_path):
    required = ["--model", "m", "--data", "d", "--output-dir", "o"]
    config = stepdpo.parse([*required, "--learning_rate", "1e-6", "--no-share-prefix", "--max-length=7"])
    assert (config.learning_rate, config.share_prefix, config.max_length) == (1e-6, False, 7)
    (tmp_path / "args").write_text(
        "# a recipe\n--model m --data d\n--output_dir 'a folder'  # comment\n--beta 0.5\n")
    config = stepdpo.parse([f"@{tmp_path / 'args'}", "--beta", "0.3"])
    assert (config.output_dir, config.beta) == ("a folder", 0.3)
    defaults = stepdpo.parse(required)
    assert (defaults.learning_rate, defaults.beta, defaults.batch_size) == (5e-7, 0.4, 128)
    assert (defaults.epochs, defaults.warmup_ratio) == (8, 0.1)


@pytest.mark.parametrize("flags, message", [
    (["--model", "m"], "required: --data, --output-dir"),
    (["--model", ""], "--model: must be more than nothing"),
    (["--learn", "1"], "unrecognized arguments"),
    (["--beta", "0"], "--beta: must be above 0"),
    (["--epochs", "two"], "invalid int value: 'two'"),
    (["--span", "word"], "invalid choice: 'word'"),
    (["--max-steps", "-1"], "--max-steps: must be at least 0"),
    (["--learning-rate", "nan"], "--learning-rate: must be above 0, got nan"),
])
def test_bad_flags_are_usage_errors(capsys, flags, message):
    required = [] if "--model" in flags else ["--model", "m", "--data", "d", "--output-dir", "o"]
    with pytest.raises(SystemExit) as stop:
        stepdpo.parse(required + flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_errors_reach_the_terminal_as_one_line(workplace, tmp_path):
    child = launch(make_flags(workplace, tmp_path, data=tmp_path / "none.jsonl"))
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 2 and "Traceback" not in output
    assert f"stepdpo.py: error: {tmp_path / 'none.jsonl'}: No such file or directory" in output


@needs_cuda
def test_training_on_cuda_with_varlen_attention_in_bf16(workplace, tmp_path):
    child = launch(make_flags(workplace, tmp_path, dtype="bfloat16"), dict(os.environ))
    output, _ = child.communicate(timeout=300)
    assert child.returncode == 0, output
    losses = losses_of(tmp_path)
    assert losses[0] == pytest.approx(math.log(2), abs=5e-3) and losses[-1] < losses[0]

