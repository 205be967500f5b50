"""The specification of this repository, executable: pytest, on a CPU, in a few minutes.

In the order of the code: the loss, the kernel, the data, the packed policy, training, the command line. Tests
that need a GPU skip visibly without one. Each test names the rule it protects.
"""

import argparse
import fcntl
import http.server
import importlib.util
import itertools
import json
import math
import multiprocessing
import operator
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; kernels.py then has both ways to run

import data  # noqa: E402
import kernels  # noqa: E402
import stepdpo  # noqa: E402

kernels._INTERPRETED = False  # plain torch, but where a test asks for the interpreter
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}  # of child processes
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


def plain_logps(hidden, weight, targets):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None].long())[:, 0]


def values_and_gradients(function, hidden, weight, targets, upstream, dtype):
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    logps = function(hidden, weight, targets)
    logps.backward(upstream.to(logps.dtype))
    return logps.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 32, 256), (7, 19, 201), (1, 16, 63), (33, 24, 65)], ids=str)
@pytest.mark.parametrize("scale", [0.2, 30.0], ids=["flat", "peaked"])
def test_kernel_is_no_less_accurate_than_plain_torch(op, dtype, shape, scale):
    function, device = op
    T, D, V = shape
    rng = torch.Generator().manual_seed(T * V)
    hidden = torch.randn(T, D, generator=rng).to(device, dtype)
    weight = (torch.randn(V, D, generator=rng) * scale / D**0.5).to(device, dtype)
    targets = torch.randint(V, (T,), generator=rng).to(device)
    targets[0], targets[-1] = 0, V - 1
    upstream = torch.randn(T, generator=rng).to(device)
    inputs = hidden, weight, targets, upstream
    truth = values_and_gradients(
        lambda h, w, t: (h @ w.T).log_softmax(-1).gather(1, t[:, None])[:, 0], *inputs, torch.float64)
    plain = values_and_gradients(plain_logps, *inputs, dtype)
    ours = values_and_gradients(function, *inputs, dtype)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    largest = (hidden.double() @ weight.double().T).abs().max()
    rounding = 4 * torch.finfo(torch.float32).eps * largest  # of a logit
    names = "logps", "dhidden", "dweight"
    for name, exact, torch_result, result in zip(names, truth, plain, ours, strict=True):
        error, allowed = ((x.double() - exact).abs().max() for x in (result, torch_result))
        tolerance = rounding if name == "logps" else (rounding + torch.finfo(dtype).eps) * exact.abs().max()
        assert error <= allowed + tolerance, (
            f"{name}: error {error:.3g}, torch {allowed:.3g} + {tolerance:.3g}")


def test_kernel_is_right_where_all_logits_are_far_below_zero(op):
    function, device = op
    hidden, weight = torch.ones(2, 4, device=device), torch.full((130, 4), -100.0, device=device)
    logps = function(hidden, weight, torch.tensor([0, 129], device=device))
    assert logps.tolist() == pytest.approx([-math.log(130)] * 2, abs=1e-4)


@pytest.mark.skipif(CUDA, reason="on a GPU Triton compiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_writes_the_gradient_of_a_tile_in_half_precision(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "_INTERPRETED", True)
    monkeypatch.setattr(kernels, "_CHUNK", 32)
    tile, targets, dlogps = torch.randn(5, 70) * 4, torch.tensor([103, 100, 169, 99, 170]), torch.randn(5)
    lse = tile.logsumexp(1) + 0.5  # this tile is not all of the vocabulary
    inside = torch.zeros(5, 70).index_put((torch.arange(3), targets[:3] - 100), torch.ones(3))
    expected = dlogps[:, None] * (inside - (tile - lse[:, None]).exp())
    dtile = kernels._dtile(tile, targets, lse, dlogps, 100, dtype)
    assert dtile.dtype == dtype
    assert (dtile.float() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max() + 1e-6


def test_kernel_computes_only_the_gradients_asked_for(op):
    function, device = op
    for asked in itertools.product((False, True), repeat=2):
        hidden, weight = torch.randn(3, 8, device=device), torch.randn(70, 8, device=device)
        hidden.requires_grad_(asked[0]), weight.requires_grad_(asked[1])
        logps = function(hidden, weight, torch.tensor([1, 2, 69], device=device))
        assert logps.requires_grad == any(asked)
        if any(asked):
            logps.sum().backward()
        assert (hidden.grad is not None, weight.grad is not None) == asked


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
    assert torch.allclose(logps, plain_logps(hidden[::2], weight, targets), atol=1e-5)


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
dtile = [dict(tile="*fp32", targets="*i64", lse="*fp32", dlogps="*fp32", dtile="*" + t, **numbers)
         for t in ("fp32", "bf16", "fp16")]
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
    assert transient <= T * kernels.BLOCK * 6 + 2 * T * D * 4 + 2**20


# --------------------------------------------------------------------------------------------------- the data

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 400 tokens, trained here, with a chat template, an EOS and no BOS (like Qwen's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>", "<s>"],
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([json.dumps(make_rows(50)), "Mind the token, then the tent. " * 20], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                                chat_template=CHATML)


def make_rows(count: int) -> list[dict]:
    """Step pairs of varied lengths, every one different."""
    rows = []
    for i in range(count):
        before = "".join(f"Step {k}: take {i + k} and double it to {2 * (i + k)}.\n"
                         for k in range(1, 1 + i % 3))
        chosen = f" So {i} + {i} = {2 * i}" + " which is right" * (i % 4)
        rejected = f" Thus we get {i * 7 + 1}."
        rows.append(dict(dataset="made", prompt=f"What is twice {i}{', please' * (i % 5)}?",
                         chosen=chosen, rejected=rejected,
                         initial_reason_steps=f"Let's think step by step.\n{before}Step {1 + i % 3}:",
                         full_chosen=chosen + f"\nThe answer is: {2 * i}",
                         full_rejected=rejected + "\nThe answer is: 7", answer=str(2 * i)))
    return rows


def make_pairs(tokenizer, count: int, span: str = "step", template: str = "chat") -> list[data.Pair]:
    rows = [(f"row {i}", row) for i, row in enumerate(make_rows(count))]
    return data.encode(rows, tokenizer, template, None, span, 1024)[0]


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_are_read_alike_from_jsonl_json_and_parquet(tmp_path):
    rows = make_rows(5)
    files = [write_jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "a.json")]
    Path(files[1]).write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    try:
        import datasets
        files.append(str(tmp_path / "a.parquet"))
        datasets.Dataset.from_list(rows).to_parquet(files[2])
    except ImportError:
        with pytest.raises(data.InputError, match="pip install datasets"):
            data.read_rows("a.parquet")
    for file in files:
        assert [row for _, row in data.read_rows(file)] == rows
    assert data.read_rows(files[0])[3][0] == f"{files[0]}:4"


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
    with pytest.raises(data.InputError, match="bad.jsonl" + message):
        data.read_rows(str(tmp_path / "bad.jsonl"))


def test_unreadable_files_are_named(tmp_path):
    for name, message in (("none.jsonl", "No such file"), ("x.csv", "must be a .jsonl")):
        with pytest.raises(data.InputError, match=f"{name}: {message}"):
            data.read_rows(str(tmp_path / name))
    (tmp_path / "one.json").write_text('{"a":\n 1,}')
    with pytest.raises(data.InputError, match="one.json:2: not valid JSON"):
        data.read_rows(str(tmp_path / "one.json"))
    (tmp_path / "one.json").write_text('{"a": 1}')
    with pytest.raises(data.InputError, match="one.json: must be one JSON list"):
        data.read_rows(str(tmp_path / "one.json"))


@pytest.mark.parametrize("change, message", [
    ({"chosen": None}, "'chosen' must be text, got NoneType"),
    ({"rejected": " \n"}, "'rejected' is empty"),
    ({"chosen": " half a \ud83d"}, "'chosen' has half a character"),
    ({"prompt": ["x"]}, "'prompt' must be text, got list"),
    ({"rejected": " So 0 + 0 = 0  "}, "'chosen' equals 'rejected'"),
    ("initial_reason_steps", "no field 'initial_reason_steps'"),
])
def test_bad_rows_are_refused_with_their_place(tokenizer, change, message):
    row = make_rows(1)[0]
    row = row | change if isinstance(change, dict) else {k: v for k, v in row.items() if k != change}
    with pytest.raises(data.InputError, match=f"1 of 2 rows cannot be trained on:\n  f:7: .*{message}"):
        data.encode([("f:6", make_rows(2)[1]), ("f:7", row)], tokenizer, "chat", None, "step", 1024)


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
    pairs = [data.encode([("f:1", r)], tokenizer, "chat", None, "solution", 1024)[0] for r in (row, whole)]
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
    assert "[[chosen> So 0 + 0 = 0<]][[rejected> Thus we get 1.<]]" in data.marked(pair, tokenizer)


def test_a_tokenizer_without_chat_template_is_told_what_to_pass(tokenizer):
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(data.InputError, match="--template alpaca"):
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
    (pair,), _ = data.encode([("f:1", row)], tokenizer, "chat", None, "step", 1024)
    text = data.open_turn(tokenizer, row["prompt"], "chat") + row["initial_reason_steps"]
    for step, ids in ((row["chosen"], pair.chosen), (row["rejected"], pair.rejected)):
        assert pair.prefix + ids == tokenizer(text + step).input_ids
    assert tokenizer.decode(pair.chosen) == " the token"  # the space merged with the word: not in the prefix
    assert tokenizer.decode(pair.prefix).endswith("Step 1:")


def test_too_long_pairs_are_dropped_and_counted_never_cut(tokenizer):
    rows = [(f"f:{i}", row) for i, row in enumerate(make_rows(20), 1)]
    every, none = data.encode(rows, tokenizer, "chat", None, "step", 1024)
    longest = sorted(len(p.prefix) + max(len(p.chosen), len(p.rejected)) for p in every)
    kept, dropped = data.encode(rows, tokenizer, "chat", None, "step", longest[9])
    assert not none and len(kept) + len(dropped) == 20
    assert [p for p in every if len(p.prefix) + max(len(p.chosen), len(p.rejected)) <= longest[9]] == kept
    assert len(kept) == sum(n <= longest[9] for n in longest) and all(d.startswith("f:") for d in dropped)
    with pytest.raises(data.InputError, match="all 20 pairs are longer than --max-length 5"):
        data.encode(rows, tokenizer, "chat", None, "step", 5)


def test_every_pair_is_used_once_per_epoch_in_a_new_order_that_the_seed_decides():
    plan = data.schedule(103, 10, 3, seed=1)
    assert len(plan) == 30 and {len(batch) for batch in plan} == {10, 11}
    epochs = [list(np.concatenate(plan[e * 10:(e + 1) * 10])) for e in range(3)]
    assert all(sorted(epoch) == list(range(103)) for epoch in epochs) and epochs[0] != epochs[1]
    same, other = data.schedule(103, 10, 3, seed=1), data.schedule(103, 10, 3, seed=2)
    assert all((a == b).all() for a, b in zip(plan, same, strict=True))
    assert (plan[0][:10] != other[0][:10]).any()
    paper = data.schedule(10795, 128, 8, 0)
    assert len(paper) == 672 and {len(batch) for batch in paper} == {128, 129}
    assert len(data.schedule(3, 128, 1, 0)) == 1


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
    batch = data.pack(pairs, multiple_of=8)
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 20, 4, 12, 21, 22, 0, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 0, 1, 2, 3, 4, 5]]
    assert batch.document.tolist() == [0] * 6 + [1] * 4 + [2] * 6
    assert batch.branch.tolist() == [0, 0, 0, 1, 1, 2, 0, 1, 2, 2] + [0] * 6
    assert batch.predict_at.tolist() == [2, 3, 2, 6, 6, 8]  # the last prefix token predicts both first tokens
    assert batch.targets.tolist() == [10, 11, 20, 12, 21, 22]
    assert batch.sequence.tolist() == [0, 0, 2, 1, 3, 3]  # chosen 0, 1, rejected 2, 3
    assert (batch.pairs, batch.tokens) == (2, 10)
    alone = data.pack(pairs[:1], share_prefix=False)
    assert alone.input_ids.tolist() == [[1, 2, 3, 10, 11, 1, 2, 3, 20]]
    assert alone.document.tolist() == [0] * 5 + [1] * 4
    assert alone.predict_at.tolist() == [2, 3, 7]
    empty = data.pack([], multiple_of=4)
    assert empty.input_ids.shape == (1, 4) and empty.targets.shape == (0,) and empty.tokens == 0


def test_attention_rule_by_hand():
    batch = data.pack([data.Pair([1, 2], [10, 11], [20], "a"), data.Pair([4], [12], [21], "b")])
    index = torch.arange(8)
    seen = data.may_attend(batch)(0, 0, index[:, None], index[None, :]).int().tolist()
    assert seen == [[1, 0, 0, 0, 0, 0, 0, 0],
                    [1, 1, 0, 0, 0, 0, 0, 0],
                    [1, 1, 1, 0, 0, 0, 0, 0],
                    [1, 1, 1, 1, 0, 0, 0, 0],
                    [1, 1, 0, 0, 1, 0, 0, 0],   # rejected: the prefix and itself, not chosen
                    [0, 0, 0, 0, 0, 1, 0, 0],
                    [0, 0, 0, 0, 0, 1, 1, 0],
                    [0, 0, 0, 0, 0, 1, 0, 1]]
    windowed = data.may_attend(batch, window=2)(0, 0, index[:, None], index[None, :]).int()
    assert windowed[3].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert windowed[4].tolist() == [0, 1, 0, 0, 1, 0, 0, 0]


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
}


def make_model(family: str, **changes):
    """A tiny random model with weights large enough that a wrong mask changes everything."""
    kind, options = FAMILIES[family]
    config = kind(**dict(vocab_size=400, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
                         eos_token_id=1) | options | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa_by_document")
    return model.eval()


def separate_logps(model, pairs) -> torch.Tensor:
    """(2, B) with a plain forward over each sequence alone: the truth."""
    sums = []
    for pair, step in ((p, s) for k in (1, 2) for p, s in ((p, p[k]) for p in pairs)):
        ids = torch.tensor([pair.prefix + step])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(logps[len(pair.prefix) - 1:].sum())
    return torch.stack(sums).view(2, -1)


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logps_and_gradients_equal_those_of_separate_sequences(tokenizer, family, share_prefix):
    pairs, results = make_pairs(tokenizer, 5), []
    for packed in (True, False):
        model = make_model(family)
        if packed:
            batch = data.pack(pairs, share_prefix, multiple_of=64)
            logps = stepdpo.step_logps(stepdpo.Policy(model, share_prefix)(batch), batch)
        else:
            logps = separate_logps(model, pairs)
        stepdpo.step_dpo_loss(*logps, *torch.full((2, 5), -60.0), 0.1)[0].sum().backward()
        results.append((logps.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (ours, gradients), (truth, true_gradients) = results
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-4)
    for name, gradient in true_gradients.items():
        size = gradient.abs().max()
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * size + 1e-6, name


def test_flex_attention_follows_the_mask(tokenizer, monkeypatch):
    """Eager flex attention on the CPU, where PyTorch offers it for inference only and compiled."""
    from torch.nn.attention import flex_attention
    from transformers.integrations import flex_attention as integration
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    eager = flex_attention.flex_attention
    monkeypatch.setattr(integration.WrappedFlexAttention, "__call__", lambda self: eager)
    pairs = make_pairs(tokenizer, 4)
    for family in ("qwen2", "qwen2-windows", "mistral-window"):
        model, batch = make_model(family), data.pack(pairs, multiple_of=128)
        truth = separate_logps(model, pairs)
        model.set_attn_implementation("flex_attention")
        ours = stepdpo.step_logps(stepdpo.Policy(model, True)(batch), batch)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("change, message", [
    (dict(final_logit_softcapping=30.0), "final_logit_softcapping = 30.0"),
    (dict(logits_scaling=8.0), "logits_scaling = 8.0"),
    (dict(logit_scale=0.06), "logit_scale = 0.06"),
])
def test_models_that_change_their_logits_are_refused_by_name(change, message):
    with pytest.raises(data.InputError, match=message):
        stepdpo.Policy(make_model("llama", **change), True)


def test_models_that_carry_state_along_a_row_are_refused():
    model = make_model("llama")
    model._is_stateful = True
    with pytest.raises(data.InputError, match="carries state from token to token"):
        stepdpo.Policy(model, True)


def test_heads_with_a_bias_are_refused():
    model = make_model("llama")
    model.lm_head = torch.nn.Linear(64, 400, bias=True)
    with pytest.raises(data.InputError, match="without bias"):
        stepdpo.Policy(model, True)


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


def make_config(workplace, out, **changes) -> stepdpo.Config:
    options = dict(model=str(workplace / "qwen2"), data=str(workplace / "pairs.jsonl"), output_dir=str(out),
                   batch_size=7, epochs=2, learning_rate=2e-4, tokens_per_micro_batch=600, dtype="float32")
    return stepdpo.Config(**options | changes)


def arguments(config: stepdpo.Config) -> list[str]:
    result = []
    for name, value in vars(config).items():
        if isinstance(value, bool):
            result.append(f"--{'' if value else 'no-'}{name}")
        elif value is not None:
            result.append(f"--{name}={value}")
    return result


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_metrics(out) -> list[dict]:
    return rows_of(Path(out) / "metrics.jsonl")


def losses_of(out) -> list[float]:
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


if CUDA:  # the trainer is tested on the CPU there too, and on the GPU in a child process
    def start_on_cpu() -> torch.device:
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        return torch.device("cpu")
    stepdpo.start_processes = start_on_cpu


def launch(config: stepdpo.Config, processes: int, environment: dict = ENVIRONMENT) -> subprocess.Popen:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                    "--master_port", str(29600 + os.getpid() % 1000 + processes)]
    return subprocess.Popen([*command, "stepdpo.py", *arguments(config)], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=environment | {"STEPDPO_CACHE": os.environ["STEPDPO_CACHE"]})


def naive_training(config: stepdpo.Config) -> list[float]:
    """The same optimizer steps as plainly as can be: whole logits, one sequence at a time, two models."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, reference = (load(config.model, dtype=torch.float32).eval() for _ in range(2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    pairs, _ = data.encode(data.read_rows(config.data), tokenizer, "chat", None, config.span, 1024)
    plan = data.schedule(len(pairs), config.batch_size, config.epochs, config.seed)
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
    extra = {"grad_norm", "lr", "tokens_per_second", "pairs_per_second"}
    assert set(steps[0]) == {"step", *stepdpo.METRICS, *extra}
    assert set(evals[0]) == {"step", *(f"eval/{name}" for name in stepdpo.METRICS)}
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(steps[0]["rewards/margins"]) < 1e-4 and steps[-1]["rewards/margins"] > 0.05
    assert evals[-1]["eval/loss"] < evals[0]["eval/loss"]
    for x in steps:
        assert x["rewards/margins"] == pytest.approx(x["rewards/chosen"] - x["rewards/rejected"], abs=1e-6)
    assert [x["lr"] for x in steps][:2] == pytest.approx([1e-4, 2e-4])  # the rate that this very step used
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["beta"] == 0.4 and record["versions"]["torch"] == torch.__version__


def test_the_first_logged_gradient_norm_is_before_clipping(workplace, tokenizer, tmp_path):
    stepdpo.train(make_config(workplace, tmp_path, max_steps=1, max_grad_norm=1e-3))
    assert read_metrics(tmp_path)[0]["grad_norm"] > 0.1


def test_the_exported_model_is_an_ordinary_folder_with_the_trained_weights(workplace, run):
    before = transformers.AutoModelForCausalLM.from_pretrained(workplace / "qwen2", dtype=torch.float32)
    after, info = transformers.AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert after.dtype == torch.float32
    moved = [(a - b).abs().max() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 0.05
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    rows = data.read_rows(str(workplace / "eval.jsonl"))
    pairs, _ = data.encode(rows, tokenizer, "chat", None, "step", 1024)
    logged = [x for x in read_metrics(run) if "eval/loss" in x][-1]
    with torch.no_grad():
        chosen, _ = separate_logps(after, pairs)
    assert chosen.mean().item() == pytest.approx(logged["eval/logps/chosen"], abs=1e-3)
    prompt = torch.tensor([pairs[0].prefix])
    assert after.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.shape[1]


def test_export_keeps_the_files_names_and_dtypes_of_the_source(workplace, tmp_path):
    source = tmp_path / "source"
    model = make_model("qwen2-tied").bfloat16()
    model.save_pretrained(source, max_shard_size="20KB")
    stepdpo.start_processes()
    config = make_config(workplace, tmp_path)
    policy = stepdpo.build(str(source), config, torch.device("cpu"))
    stepdpo.export(policy, str(source), str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    for (name, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_buffers_that_no_checkpoint_holds_come_out_right(workplace):
    stepdpo.start_processes()
    config = make_config(workplace, "unused")
    ours = stepdpo.build(config.model, config, torch.device("cpu")).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(config.model)
    for (name, a), (other, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other and torch.equal(a, b)


def test_any_number_of_processes_gives_the_same_losses(workplace, run, tmp_path):
    for processes in (2, 4):
        out = tmp_path / str(processes)
        config = make_config(workplace, out, eval_data=str(workplace / "eval.jsonl"), eval_every=3)
        child = launch(config, processes)
        output, _ = child.communicate(timeout=200)
        assert child.returncode == 0, output
        for ours, theirs in zip(read_metrics(out), read_metrics(run), strict=True):
            for key in ours.keys() - {"tokens_per_second", "pairs_per_second"}:
                if key.endswith("accuracies") and ours["step"] == 0:
                    continue  # margins of 0, so rounding decides
                assert ours[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-5), (processes, key)
        with (safe_open(out / "model" / "model.safetensors", "pt") as a,
              safe_open(run / "model" / "model.safetensors", "pt") as b):
            for name in b.keys():
                torch.testing.assert_close(a.get_tensor(name), b.get_tensor(name), atol=2e-5, rtol=0)


def test_a_preempted_run_saves_and_resumes_to_the_same_losses(workplace, run, tmp_path):
    out = tmp_path / "out"
    config = make_config(workplace, out, eval_data=str(workplace / "eval.jsonl"), eval_every=3, save_every=2)
    child = launch(config, 1)
    while not (out / "metrics.jsonl").exists():  # made by the evaluation before the first optimizer step
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=100)
    assert child.returncode == 128 + signal.SIGTERM and "--resume continues" in output
    (saved,) = (out / "checkpoints").iterdir()  # only the newest is kept
    assert not (out / "model").exists()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "loss": 1}\n{"torn')  # what a kill -9 after the checkpoint would leave
    with pytest.raises(data.InputError, match="--beta 0.4 -> 0.3"):
        stepdpo.train(make_config(workplace, out, resume=True, beta=0.3, eval_data=config.eval_data))
    stepdpo.train(make_config(workplace, out, resume=True, eval_data=config.eval_data, eval_every=3))
    assert 1 <= int(saved.name[-6:]) < 6
    for ours, theirs in zip(read_metrics(out), read_metrics(run), strict=True):
        assert ours["step"] == theirs["step"]
        for key in ("loss", "eval/loss"):
            assert ours.get(key) == pytest.approx(theirs.get(key), abs=1e-6)


def test_reference_logps_are_cached_under_what_they_depend_on(workplace, tmp_path, capsys):
    def said(**changes):
        out = tmp_path / str(len(os.listdir(tmp_path)))
        stepdpo.train(make_config(workplace, out, max_steps=1, **changes))
        return capsys.readouterr().out
    os.environ["STEPDPO_CACHE"] = str(tmp_path / "cache")
    try:
        assert "computed, kept in" in said()
        assert "pairs read from" in said(learning_rate=1e-4)
        other_model = str(workplace / "qwen2-tied")
        for changes in (dict(instruction="Think."), dict(span="solution"), dict(model=other_model)):
            assert "computed, kept in" in said(**changes)
    finally:
        os.environ["STEPDPO_CACHE"] = str(workplace / "cache")


def test_another_reference_model_moves_the_first_loss(workplace, tmp_path):
    stepdpo.train(make_config(workplace, tmp_path, max_steps=1, reference=str(workplace / "qwen2-tied")))
    assert abs(losses_of(tmp_path)[0] - math.log(2)) > 0.1


def test_start_up_says_what_will_happen(workplace, tmp_path, capsys):
    stepdpo.train(make_config(workplace, tmp_path, max_steps=1, max_length=110))
    out = capsys.readouterr().out
    for expected in ("Qwen2ForCausalLM", "dropped as longer than --max-length 110; raise that to keep them",
                     "sharing the prefix saves", "[[chosen> So 0 + 0 = 0<]]",
                     "packed and plain log-probabilities differ by", "model in"):
        assert expected in out


def test_the_self_check_stops_a_run_whose_attention_ignores_the_mask(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(stepdpo.Policy, "attention_mask", lambda self, batch: None)
    message = "Qwen2ForCausalLM with .* attention: packed .* use --no-share-prefix"
    with pytest.raises(data.InputError, match=message):
        stepdpo.train(make_config(workplace, tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_is_never_overwritten_and_resume_needs_a_checkpoint(workplace, run, tmp_path):
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(data.InputError, match="already holds a run; continue it with --resume"):
        stepdpo.train(make_config(workplace, run))
    with pytest.raises(data.InputError, match="no checkpoint"):
        stepdpo.train(make_config(workplace, tmp_path, resume=True))
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("changes, message", [
    (dict(model="/nowhere"), "/nowhere: no such folder"),
    (dict(tokens_per_micro_batch=100),
     r"pairs.jsonl:\d+: takes \d+ tokens, more than --tokens-per-micro-batch 100"),
    (dict(reference="tokenizer"), "its vocabulary is not that of"),
    (dict(model="empty"), "empty: "),
    (dict(model="small"), r"pairs.jsonl:\d+: has token \d+, but .*small has 300 embeddings"),
    (dict(model="torn"), "torn: Error while deserializing header"),
    (dict(model="pickled"), "only safetensors weights are loaded"),
    (dict(model="headless"), "its tensors are not one to one those of Qwen2ForCausalLM"),
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
    shutil.copytree(workplace / "qwen2", tmp_path / "torn")
    weights_file = tmp_path / "torn/model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    from safetensors.torch import load_file, save_file
    weights = load_file(tmp_path / "headless/model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "headless/model.safetensors")
    changes = {k: str(tmp_path / v) if isinstance(v, str) and v[0] != "/" else v for k, v in changes.items()}
    with pytest.raises(data.InputError, match=message):
        stepdpo.train(make_config(workplace, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_before_the_update(workplace, tmp_path):
    with pytest.raises(data.InputError, match="step 1: loss nan.* nothing was updated.*pairs.jsonl:"):
        stepdpo.train(make_config(workplace, tmp_path / "out", learning_rate=1e30))
    assert len(losses_of(tmp_path / "out")) == 1 and not (tmp_path / "out/model").exists()


def test_offloading_changes_nothing_but_the_place(workplace, run, tmp_path):
    stepdpo.train(make_config(workplace, tmp_path, offload=True, epochs=2, max_steps=6))
    assert losses_of(tmp_path) == pytest.approx(losses_of(run), abs=1e-6)


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


# ----------------------------------------------------------------------------------------------- making pairs


STEPS = "Let's think step by step.\n"
HOSTILE = {  # solution: the texts of its steps, or None where the numbering is not exactly 1..n
    STEPS + "Step 1: a\nStep 2: b": [" a", " b"],
    STEPS + "Step 1: a\n\nStep 2: b\n\n": [" a", " b"],
    STEPS + "Step 1: as in Step 1: above\nStep 2: see Step 1: and Step 7: there": [
        " as in Step 1: above", " see Step 1: and Step 7: there"],
    STEPS + "Step 1: a\nmore of it\n\n  and more\nStep 2: b\nThe answer is: 3": [
        " a\nmore of it\n\n  and more", " b\nThe answer is: 3"],
    "Step 1:a": ["a"],
    "Some words first.\nStep 1: a\n Step 2: b": [" a", " b"],
    STEPS + "Step 1: Step 2 gave 5\nStep 2 gave us that\nStep 2: b": [
        " Step 2 gave 5\nStep 2 gave us that", " b"],
    STEPS + "Step 1: a\nStep 3: b": None,
    STEPS + "Step 1: a\nStep 2: b\nStep 2: c": None,
    STEPS + "Step 1: a\nStep 2: b\nStep 1: again": None,
    STEPS + "Step 2: a\nStep 3: b": None,
    STEPS + "Step 1: a\n**Step 2:** b": None,
    STEPS + "Step 1: a\nstep 2: b": None,
    STEPS + "Step 1: a\n## Step 2: b": None,
    STEPS + "Step 1: a\nStep 2. b": None,
    STEPS + "Step 1:\nStep 2: b": None,
    STEPS + "Step 1: a\nStep 2:  \n": None,
    "The answer is: 4": None,
    "": None,
}


@pytest.mark.parametrize("solution", HOSTILE)
def test_steps_run_from_one_numbered_line_to_the_next_and_are_never_guessed(solution):
    steps = data.find_steps(solution)
    assert (steps and [data.step_text(solution, steps, k)
                       for k in range(1, len(steps) + 1)]) == HOSTILE[solution]
    for k, (begin, text) in enumerate(steps or [], 1):
        assert solution[begin:text].strip() == f"Step {k}:"  # a prefix that ends here has no trailing space


def box(text: str) -> str:
    return rf"Step 1: so it is \boxed{{{text}}}."


NINES = "9" * 5000
RIGHT = [  # (solution, answer) that count as right
    (r"a \boxed{\frac{1}{2}} b", "1/2"), (r"\boxed{\sqrt{\frac{2}{3}}}", r"\sqrt{\frac23}"),
    (r"\fbox{7}", "7"),
    (r"first \boxed{3}, then \boxed{4}", "4"), (r"so \boxed 9.", "9"), (box(r"\{1,2\}"), r"\{2,1\}"),
    ("The answer is: 72", "72"), ("the ANSWER IS $72$.", "72"), ("#### 72", "72"),
    ("The answer is: **42**", "42"),
    ("The answer is: 7\nNo, the answer is: 8", "8"), ("The answer is 3.5. I hope this helps", "3.5"),
    ("The answer is: \u22123", "-3"), (box("$72$"), "72"), (box(r"\(72\)"), "72"),
    ("The answer is: 5", "work\n#### 5"),
    (box("0.5"), "1/2"), (box("1/2"), "2/4"), (box(r"\dfrac{6}{8}"), r"\frac34"),
    (box(r"-\frac{1}{2}"), "-0.5"),
    (box("3.50"), "3.5"), (box("72.0"), "72"), (box(".5"), "0.5"), (box("007"), "7"), (box("+5"), "5"),
    (box("1,234"), "1234"), (box("1,234,567.5"), "1234567.5"), (box(r"1{,}234"), "1234"),
    (box(r"12\,345"), "12345"),
    ("The answer is: $1,500.00", "1500"), (box(r"3 \times 10^5"), "300000"),
    (box(r"2.5 \cdot 10^{-3}"), "0.0025"),
    (box(r"1\frac{1}{2}"), "3/2"), (box("2 3/4"), "2.75"), (box(r"-1\frac12"), "-1.5"),
    (box(r"50\%"), "50"), (box("50%"), "50%"), (box("50 percent"), r"50\%"), (box("12.5%"), "25/2"),
    (box(r"5\text{ cm}"), "5"), (box("5 cm"), "5 cm"), (box(r"10\text{ cm}^2"), "10"), (box(r"\$18"), "18"),
    (box("$5"), "5 dollars"), ("The answer is: 72 clips", "72"), ("The answer is: 60 miles per hour", "60"),
    (box(r"90^\circ"), "90"), (box("90 degrees"), r"90^{\circ}"), (box("7 apples"), "7 apple"),
    (box(r"\left[0, 1\right)"), "[0,1)"), (box("(1, 2)"), "(1,2)"), (box("(1/2, 3)"), "(0.5,3)"),
    (box("5"), "(5)"),
    (box("1, 2"), "2,1"), (box("1 and 2"), "2, 1"), (box("3 or -3"), "-3, 3"),
    (box(r"\{1,2,3\}"), r"\{3,2,1\}"),
    (box(r"(-\infty, 0) \cup (1, \infty)"), r"(1,\infty)\cup(-\infty,0)"),
    (box(r"\text{Yes}"), "yes"), (box("Monday"), "monday"), ("The answer is: Tom", "Tom"),
    (box("x = 5"), "5"), (box("y = 2x + 1"), "2x+1"), (box("f(x) = 3x"), "3x"), (box("9^{9^9}"), "9^{9^9}"),
    (box("B"), "B"), (box("(B)"), "B"), (box(r"\text{(B)}"), "B"), (box("B) 12 km"), "B"), (box("b"), "B"),
    ("The answer is: B. 12", "B"), ("The answer is: option C", "C"), ("The answer is (D).", "D"),
]
WRONG = [
    (r"first \boxed{3}, then \boxed{4}", "3"), (r"\boxed{12", "12"), (r"it is \boxed{4}, no: \boxed{5", "4"),
    (r"\boxed{}", "0"), ("We get 72", "72"), ("The answer is", "72"), ("The answer is: ", "72"), ("", "72"),
    (STEPS + "Step 1: 3 + 4 = 7\nStep 2: so 7", "7"), (box("0.333"), "1/3"), (box("0.0005"), "0.001"),
    (box("1.0001"), "1"), (box("1/0"), "0"), (box("50"), "0.5"), (box("0.5"), "50"), (box("5000"), "50"),
    (box(r"50\%"), "0.5"), (box(r"1\frac{1}{2}"), "1/2"), (box("5 cm"), "5 m"), (box("5 cm"), "5 km"),
    (box("10 cm^2"), "10 cm"), (box("5 million"), "5"), (box("2 dozen"), "2"), (box("10 am"), "10 pm"),
    (box("2x"), "2"), (box(r"2\pi"), "2"), (box("[0,1)"), "(0,1)"), (box("(1,2)"), "(2,1)"),
    (box("(1,2)"), "[1,2]"),
    (box("(1,2)"), "1,2"), (box("(3,4)"), "3"), (box("1,2"), "1,2,3"), (box("1,1"), "1,2"),
    (box("1,234"), "234"),
    (box("east"), "seat"), (box(r"\text{odd}"), "even"), (box("x=5"), "y=5"), (box("101_2"), "101"),
    ("The answer is: A", "B"), (box("12"), "B"), ("The answer is: A train", "A"), ("The answer is: CD", "C"),
    (box(NINES), NINES + "1"), (box("-3"), "3"), (box("7:30"), "7.5"),
]


@pytest.mark.parametrize("solution, answer", RIGHT)
def test_answers_that_are_right(solution, answer):
    assert data.is_correct(solution, answer)


@pytest.mark.parametrize("solution, answer", WRONG)
def test_answers_that_are_wrong(solution, answer):
    assert not data.is_correct(solution, answer)


def test_formulas_are_compared_by_math_verify_within_a_time_limit(monkeypatch):
    pytest.importorskip("math_verify", reason="optional: pip install math-verify")
    for guess, answer, right in [("1+2x", "2x+1", True), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
                                 ("(x+1)^2", "x^2+2x+1", True), ("x^2+1", "x^2+2", False),
                                 ("2^{10}", "1024", True),
                                 (r"\frac{\pi}{2}", r"\pi/2", True)]:
        assert data.is_correct(box(guess), answer) == right, guess
    began = time.monotonic()
    assert not data.is_correct(box("9^{9^{9^9}}"), "9^{9^{8^9}}")
    assert time.monotonic() - began < 10
    data._worker.kill()  # one answer cannot be compared then, and after that a new worker is there
    assert not data.is_correct(box("3+x"), "x+3") and data.is_correct(box("3+x"), "x+3")
    hangs = "import sys, time\nsys.stdin.readline()\ntime.sleep(60)"
    monkeypatch.setattr(data, "WORKER", hangs), monkeypatch.setattr(data, "_worker", None)
    assert not data._same_formula("a", "b", seconds=0.2) and data._worker is None


def test_without_math_verify_the_rest_works_and_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(data, "_worker", None)
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    assert data.is_correct(box("1/2"), "0.5") and not capsys.readouterr().err
    assert not data.is_correct(box("1+2x"), "2x+1") and not data.is_correct(box("1+3x"), "3x+1")
    assert capsys.readouterr().err.count("pip install math-verify") == 1


def test_the_known_problem_formats(tmp_path):
    rows = [dict(question="How many?", answer="1 + 1 = <<1+1=2>>2\n#### 1,002"),
            dict(problem="What is x?", solution=r"So $x=\boxed{\frac12}$."), dict(problem="And y?", answer=7),
            dict(instruction="Find all roots.", answer=["1", "-1"], output="work"),
            dict(question="Which?", options=["A)3", "B) 4"], correct="B", rationale="because"),
            dict(prompt="Plain?", answer="5", dataset="mine"), dict(prompt="Plain?", answer="5")]
    found = data.read_problems(write_jsonl(tmp_path / "mixed.jsonl", rows))
    assert [p["answer"] for p in found] == ["1,002", r"\frac12", "7", "1, -1", "B", "5"]
    assert found[4]["prompt"] == "Which?\nAnswer choices: (A) 3 (B) 4" and found[4]["reference"] == "because"
    assert [p["dataset"]
            for p in found] == ["mixed"] * 5 + ["mine"] and found[0]["reference"].endswith("=2>>2")


@pytest.mark.parametrize("text, message", [
    ('{"text": "x"}',
     r"p\.jsonl:2: unknown format \(text\).*\n?.*GSM8K: question(.|\n)*AQuA(.|\n)*plain: prompt"),
    ('{"question": "x", "answer": "7"}', r'p\.jsonl:2: "answer" must end in "#### N"'),
    ('{"prompt": " ", "answer": "7"}', r"p\.jsonl:2: the problem or its answer is missing or empty"),
    ('{"problem": "x", "solution": "no box"}', r"p\.jsonl:2: the problem or its answer is missing or empty"),
    ('{"prompt": "x", ', r"p\.jsonl:2: not valid JSON"), ("[1]", r"p\.jsonl:2: must be a JSON object"),
])
def test_bad_problems_are_named_by_file_and_line(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine", "answer": "1"}\n' + text + "\n")
    with pytest.raises(data.InputError, match=message):
        data.read_problems(str(tmp_path / "p.jsonl"))


# ----------------------------------------------------------------------------------------------------- ledger


def test_a_ledger_drops_a_torn_line_and_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    data.Ledger(str(path), seed=1).append([dict(id="x", sample=0), dict(id="y", sample=0)])
    with open(path, "ab") as file:
        file.write(b'{"id": "z", "sam')
    ledger = data.Ledger(str(path), seed=1)
    assert set(ledger.rows) == {("x", 0), ("y", 0)}
    ledger.append([dict(id="z", sample=3)])
    assert [row["id"] for row in rows_of(path)] == ["x", "y", "z"]


def test_a_ledger_is_not_continued_with_other_settings(tmp_path):
    path = str(tmp_path / "a.jsonl")
    data.Ledger(path, model="m", temperature=0.8).append([dict(id="x", sample=0)])
    with pytest.raises(data.InputError,
                       match=r"a\.jsonl: was made with temperature = 0\.8, and this is 0\.7; use the same"):
        data.Ledger(path, model="m", temperature=0.7)
    os.remove(f"{path}.meta.json")
    with pytest.raises(data.InputError, match="unknown what it was made with"):
        data.Ledger(path, model="m", temperature=0.8)
    with open(path, "ab") as file:
        file.write(b"not json\n")
    Path(f"{path}.meta.json").write_text("{}")
    with pytest.raises(data.InputError, match=r"a\.jsonl:2: not valid JSON"):
        data.Ledger(path)


def test_processes_share_one_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WORLD", 4)
    ledgers = [data.Ledger(str(tmp_path / "a.jsonl"), seed=1) for _ in range(4)]

    def work(n: int) -> None:
        for i in range(20):
            ledgers[n].append([dict(id=str(n), sample=i)] * 2)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    wanted = [(str(n), i) for n in range(4) for i in range(20)]
    assert all(len(ledger.wait(wanted)) == 80
               for ledger in ledgers) and len(rows_of(tmp_path / "a.jsonl")) == 160


def test_a_process_that_writes_is_waited_for(tmp_path):
    ledger = data.Ledger(str(tmp_path / "a.jsonl"))
    with open(ledger.path, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b'{"id": "x", "sam')  # half a line: not torn, only not finished
        other.flush()
        thread = threading.Thread(target=ledger.append, args=([dict(id="y", sample=0)],))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        other.write(b'ple": 0}\n')
    thread.join()
    assert set(ledger.rows) == {("x", 0), ("y", 0)} and len(rows_of(ledger.path)) == 2


def test_a_retrained_model_in_the_same_folder_is_another_model(tmp_path):
    (tmp_path / "config.json").write_text("{}"), (tmp_path / "model.safetensors").write_bytes(bytes(300_000))
    before = data.model_identity(str(tmp_path))
    assert before == data.model_identity(str(tmp_path)) and data.model_identity("org/name") == "org/name"
    (tmp_path / "model.safetensors").write_bytes(bytes(150_000) + os.urandom(150_000))
    assert data.model_identity(str(tmp_path)) != before


# --------------------------------------------------------------------------------------------------- sampling


def parse(command: str, *flags: str) -> argparse.Namespace:
    return data.parse_arguments([command, *flags])


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory):
    """A folder with a random Qwen2 model of two layers that ends now and then."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                                      num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
                                      tie_word_embeddings=False, bos_token_id=None,
                                      eos_token_id=tokenizer.eos_token_id)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def local(tiny, tokenizer, *flags) -> data.Local:
    return data.Local(parse("solve", "--model", tiny, "--problems=p", "--out=o", "--max-new-tokens=24",
                            *flags), tokenizer)


def all_of(sampler, wanted) -> list:
    return [drawn for _, drawn in sorted(pair for batch in sampler.sample(wanted) for pair in batch)]


def test_greedy_sampling_equals_generate(tiny, tokenizer):
    sampler = local(tiny, tokenizer, "--temperature=0")
    prompts = [tokenizer(text).input_ids for text in ("a", "What is twice 5, please?", "x y z " * 9)]
    for ids, drawn in zip(prompts, all_of(sampler, [(ids, "n") for ids in prompts]), strict=True):
        out = sampler.model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False,
                                     pad_token_id=0)[0, len(ids):]
        assert drawn.tokens == len(out) and drawn.cut == (out[-1] != tokenizer.eos_token_id)
        assert drawn.text == tokenizer.decode(out, skip_special_tokens=True)


def test_a_sample_depends_on_its_name_and_not_on_its_batch(tiny, tokenizer):
    wanted = [(tokenizer("word " * n).input_ids, f"0 {n} {i}") for n in (1, 5, 9) for i in range(4)]
    many, one = local(tiny, tokenizer), local(tiny, tokenizer, "--batch-tokens=40")
    many.ends = one.ends = set(range(0, 400, 16))  # so that some end early and leave the batch
    together, apart = all_of(many, wanted), all_of(one, wanted)
    assert together == apart and len(set(together)) > 6
    assert all_of(many, [(ids, name + "!") for ids, name in wanted]) != together
    assert {drawn.cut for drawn in together} == {True, False}


def test_batches_keep_to_their_budget_and_are_halved_when_memory_runs_out(tiny, tokenizer, monkeypatch,
                                                                          capsys):
    sampler, sizes = local(tiny, tokenizer, "--batch-tokens=300"), []
    whole = sampler._batch

    def batch(wanted):
        sizes.append(sum(len(ids) + 24 for ids, _ in wanted))
        if len(wanted) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole(wanted)

    monkeypatch.setattr(sampler, "_batch", batch)
    wanted = [(tokenizer("w" * n).input_ids, str(n)) for n in range(1, 12)]
    assert len(all_of(sampler, wanted)) == 11 and max(sizes) <= 300
    assert capsys.readouterr().err.count("out of memory") == 1
    monkeypatch.setattr(sampler, "_batch",
                        lambda wanted: (_ for _ in ()).throw(RuntimeError("a shape is wrong")))
    with pytest.raises(RuntimeError, match="shape"):
        all_of(sampler, wanted)


def test_tokens_are_drawn_from_the_nucleus_in_its_proportions(tiny, tokenizer):
    sampler = local(tiny, tokenizer, "--temperature=0.5", "--top-p=0.88")
    logits = torch.tensor([0.0, 1.0, 2.0, 1.5, -3.0]).log_softmax(-1) + torch.zeros(20000, 1)
    drawn = sampler._choose(logits, [(i + 0.5) / 20000 for i in range(20000)])
    chances = (logits[0] / 0.5).softmax(-1).tolist()
    nucleus = {2: chances[2], 3: chances[3]}  # 0.66 + 0.24
    assert sum(nucleus.values()) > 0.88 > chances[2]
    shares = {token: count / 20000 for token, count in Counter(drawn.tolist()).items()}
    assert shares == pytest.approx({token: chance / sum(nucleus.values()) for token,
                                    chance in nucleus.items()}, abs=1e-3)


# ----------------------------------------------------------------------------------------------------- server


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server that refuses whatever is not exactly in order, and fails as `faults` says,
    one after the other. `answer(path, body)` gives the text."""

    daemon_threads, request_queue_size = True, 100

    def __init__(self, answer, faults=(), key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.faults, self.key, self.lock = answer, list(faults), key, threading.Lock()
        self.served, self.tried, self.now, self.most = [], 0, 0, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, code, body, headers=(), cut=0):
        text = json.dumps(body).encode()
        self.send_response(code)
        for name, value in dict(headers, **{"Content-Type": "application/json",
                                            "Content-Length": len(text) - cut}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text[:len(text) - cut])

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.tried, server.now = server.tried + 1, server.now + 1
            server.most, fault = max(server.most, server.now), server.faults.pop(0) if server.faults else None
        try:
            self.respond(server, body, fault)
        finally:
            with server.lock:
                server.now -= 1

    def respond(self, server, body, fault):
        sampling = dict(model=str, temperature=(int, float), max_tokens=int, stream=bool)
        chat = self.path == "/v1/chat/completions"
        fields = sampling | (dict(messages=list) if chat
                             else dict(prompt=list, n=int, top_p=(int, float), seed=int))
        if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            return self.reply(401, dict(error=f"no such key: {self.headers['Authorization']}"))
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            return self.reply(404, dict(error="no such path"))
        if body.keys() != fields.keys() or not all(isinstance(body[name], kind) for name,
                                                   kind in fields.items()):
            return self.reply(400, dict(error=f"bad fields {sorted(body)}"))
        if isinstance(fault, tuple):
            return self.reply(fault[0], dict(error="try later"), fault[1])
        if isinstance(fault, int):
            return self.reply(fault, dict(error=f"fault {fault} {self.headers['Authorization']}"))
        if fault == "hang":
            return time.sleep(10)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        text = server.answer(self.path, body)
        choice = dict(message=dict(role="assistant", content=text)) if chat else dict(text=text)
        reply = dict(choices=[choice | dict(index=0, finish_reason="stop")],
                     usage=dict(prompt_tokens=1, completion_tokens=len(text.split()), total_tokens=2))
        if fault == "nonsense":
            return self.reply(200, dict(hello=1))
        self.reply(200, reply, cut=20 if fault == "truncated" else 0)
        if fault is None:
            with server.lock:
                server.served.append(body)


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(data, "PAUSE", 0.01), monkeypatch.setattr(data, "TIMEOUT", 30)
    servers = []
    yield lambda *args, **options: servers.append(Server(*args, **options)) or servers[-1]
    for server in servers:
        server.shutdown(), server.server_close()


def solve_on(server, tokenizer, tmp_path, monkeypatch, *flags, problems=20):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "p.jsonl",
                      [dict(prompt=f"Problem {i}?", answer=str(i)) for i in range(problems)])
    data.main(["solve", "--model", str(tmp_path / "tokenizer"), "--server", server.url, "--server-model", "m",
               "--problems",
               path, "--out", str(tmp_path / "s.jsonl"), *flags])


def echo(tokenizer):
    """The right answer for even problems, and always the same text for the same prompt."""
    def answer(path, body):
        number = int(re.findall(r"Problem (\d+)\?", tokenizer.decode(body["prompt"]))[0])
        return f" it is so.\nThe answer is: {number + number % 2}"
    return answer


def test_through_every_fault_of_a_server_nothing_is_lost_and_nothing_doubled(serve, tokenizer, tmp_path,
                                                                             monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    faults = [(429, {"Retry-After": "0.3"}), 500, "reset", "truncated", "hang", 503,
              (429, {"Retry-After": "soon"}), 408,
              "reset", "truncated", 502]
    monkeypatch.setattr(data, "TIMEOUT", 2)
    server = serve(echo(tokenizer), faults, key="sk-very-secret")
    solve_on(server, tokenizer, tmp_path, monkeypatch, "--concurrency=4")
    rows = rows_of(tmp_path / "s.jsonl")
    assert len(rows) == len({(row["id"], row["sample"]) for row in rows}) == 40 <= len(server.served)
    assert server.tried >= 40 + len(faults) and server.most <= 5  # one may still hang, the next begin
    assert sum(row["correct"] for row in rows) == 20 and all(row["tokens"] == 7 for row in rows)
    assert len({body["seed"]
                for body in server.served}) == 40  # two samples of a problem are two different samples
    prompt = tokenizer.decode(server.served[0]["prompt"])
    assert prompt.endswith("<|im_start|>assistant\nLet's think step by step.\nStep 1:")
    assert prompt.count("<|im_start|>") == 2
    text = capsys.readouterr()
    assert "sk-very" not in text.out + text.err + (tmp_path / "s.jsonl").read_text()


def test_retry_after_is_waited_for(serve):
    server, began = serve(lambda path, body: "", [(429, {"Retry-After": "0.7"})]), time.monotonic()
    body = dict(model="m", prompt=[1], n=1, max_tokens=1, temperature=0, top_p=1, seed=0, stream=False)
    assert data.post(f"{server.url}/v1/completions", body)["choices"] and time.monotonic() - began > 0.7


@pytest.mark.parametrize("fault, tries, message", [
    (500, 6, "gave up after 6 tries, the last: 500"),
    ("reset", 6, "gave up after 6 tries, the last: Connection"),
    (400, 1, "400 Bad Request: .*fault 400"), (401, 1, "401 Unauthorized: .*fault 401"),
    ("nonsense", 1, "not the reply of an OpenAI-compatible server .*hello"),
])
def test_a_server_that_keeps_failing_is_an_error_that_says_how(serve, tokenizer, tmp_path, monkeypatch, fault,
                                                               tries, message):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server = serve(echo(tokenizer), [fault] * 99)
    with pytest.raises(SystemExit, match=f"(?s)/v1/completions: .*{message}") as error:
        solve_on(server, tokenizer, tmp_path, monkeypatch, "--concurrency=1")
    assert tries <= server.tried <= tries + 2  # another request may have begun before the error ended all
    assert "sk-very" not in str(error.value)
    server.faults.clear()
    solve_on(server, tokenizer, tmp_path, monkeypatch)  # and then the same command continues
    assert len(rows_of(tmp_path / "s.jsonl")) == 40


def test_no_server_at_all(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PAUSE", 0.0)
    nowhere = argparse.Namespace(url="http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="gave up after 6 tries, the last: URLError.*refused"):
        solve_on(nowhere, tokenizer, tmp_path, monkeypatch)


# --------------------------------------------------------------------------------------------------- searches


class Scripted:
    """A model whose true first error is known. A problem has n steps, each of which goes wrong with the
    problem's own chance; once wrong, later steps are wrong too, but a step repairs all by chance `recovery`.
    The answer is right if the last step is. A word is a token. `stop_at`: KeyboardInterrupt after so many
    batches."""

    recovery, stop_at, drawn, nap = 0.1, math.inf, 0, 0.0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def sample(self, wanted):
        for at in range(0, len(wanted), 16):
            if self.stop_at <= 0:
                raise KeyboardInterrupt
            self.stop_at -= 1
            time.sleep(self.nap)
            batch = [(i, self.go_on(*wanted[i])) for i in range(at, min(at + 16, len(wanted)))]
            self.drawn += len(batch)
            yield batch

    def go_on(self, ids, name):
        text, numbers = self.tokenizer.decode(ids), random.Random(name)
        chance, n = re.findall(r"(\d+) percent of (\d+) steps", text)[-1]
        steps = text.rpartition("Step 1:")[2].split("\n")[:-1] if "\nStep 2:" in text else []
        wrong, lines = bool(steps) and "wrong" in steps[-1], []
        for k in range(len(steps) + 1, int(n) + 1):
            wrong = numbers.random() >= self.recovery if wrong else numbers.random() < int(chance) / 100
            lines.append(f" {'wrong' if wrong else 'right'} step {k} way {numbers.randrange(3)}, worked out")
        for k in range(len(steps) + 2, int(n) + 1):
            lines[k - len(steps) - 1] = f"Step {k}:" + lines[k - len(steps) - 1]
        text = "\n".join([*lines, f"The answer is: {8 if wrong else 7}"])
        return data.Continuation(text, len(text.split()), False)


def true_error(solution: str) -> int:
    """The first step after which all is wrong: the last run of wrong steps begins there."""
    steps = data.find_steps(solution)
    wrong = ["wrong" in data.step_text(solution, steps, k) for k in range(1, len(steps) + 1)]
    return len(wrong) - [*reversed(wrong), False].index(False) + 1


def scripted_build(folder, tokenizer, sampler, *flags, problems=60, command="build"):
    rows = [dict(prompt=f"Problem {i}: {(5, 10, 20, 60)[i % 4]} percent of {3 + i % 6} steps", answer="7")
            for i in range(problems)]
    path = write_jsonl(Path(folder) / "problems.jsonl", rows)
    args = data.parse_arguments([command, "--model=scripted", "--problems", path, "--out",
                                 str(Path(folder) / "out"), *flags])
    tools = data.Tools(args)
    tools.tokenizer, tools.sampler = tokenizer, sampler
    data.COMMANDS[command](args, tools)
    return tools


def outputs(folder) -> dict:
    return {path.name: sorted(path.read_text().splitlines())
            for path in (Path(folder) / "out").glob("*.jsonl")}


@pytest.fixture(scope="session")
def built(tokenizer, tmp_path_factory):
    """One whole build, without a stop, that others are compared with."""
    folder, sampler = tmp_path_factory.mktemp("built"), Scripted(tokenizer)
    scripted_build(folder, tokenizer, sampler)
    return folder, sampler.drawn


def test_localization_finds_the_true_error_of_a_model_that_can_recover(tokenizer, tmp_path, capsys):
    sampler = Scripted(tokenizer)
    scripted_build(tmp_path, tokenizer, sampler, problems=240)
    out = tmp_path / "out"
    located = [row for row in rows_of(out / "located.jsonl") if row["status"] == "located"]
    hits = sum(row["step"] == true_error(row["solution"]) for row in located)
    tokens = sum(row["tokens"] for row in rows_of(out / "located.rollouts.jsonl"))
    length = sum(row["tokens"]
                 for row in rows_of(out / "solutions.jsonl")) / len(rows_of(out / "solutions.jsonl"))
    pairs = rows_of(out / "pairs.jsonl")
    good = sum("right" in pair["chosen"] and "wrong" in pair["rejected"] for pair in pairs)
    cost = tokens / len(located) / length
    print(f"\nlocated {len(located)}, exact {hits / len(located):.0%}, cost {cost:.1f} solution lengths "
          f"each, {len(pairs)} pairs, {good / len(pairs):.0%} good")
    assert len(located) >= 45 and hits >= 0.8 * len(located)
    assert cost < 90
    assert len(pairs) >= 40 and good >= 0.85 * len(pairs)


def test_pairs_are_rows_that_training_reads_unchanged(built, tokenizer):
    folder, _ = built
    pairs = rows_of(folder / "out" / "pairs.jsonl")
    for pair in pairs:
        assert sorted(pair) == ["answer", "chosen", "dataset", "full_chosen", "full_rejected",
                                "initial_reason_steps",
                                "prompt", "rejected"] and all(isinstance(value, str)
                                                              for value in pair.values())
        assert re.search(r"\nStep \d+:$", pair["initial_reason_steps"]) and pair["chosen"].startswith(" ")
        assert pair["full_chosen"].startswith(pair["chosen"])
        assert pair["full_rejected"].startswith(pair["rejected"])
        assert data.is_correct(pair["full_chosen"], pair["answer"]) > data.is_correct(pair["full_rejected"],
                                                                                      pair["answer"])
    encoded, dropped = data.encode(data.read_rows(str(folder / "out" / "pairs.jsonl")), tokenizer, "chat",
                                   None, "step", 1024)
    assert len(encoded) == len(pairs) > 10 and not dropped
    rejected = Counter((p["prompt"], p["initial_reason_steps"], data.simplified(p["rejected"]))
                       for p in pairs)
    assert max(rejected.values()) == 1 and max(Counter(p["prompt"] for p in pairs).values()) <= 4


def test_the_funnel_counts_every_row_once(built, tokenizer, tmp_path, capsys):
    folder, _ = built
    scripted_build(folder, tokenizer, None)  # all is there: nothing is sampled, only counted again
    text = capsys.readouterr().out
    count = {name: int(number.replace(",", "")) for name,
             number in re.findall(r"^(\w+) +([\d,]+)$", text, re.M)}
    drops = [int(number) for number in re.findall(r"^ +(-\d+)  \w", text[text.rindex("wrong "):], re.M)]
    wrong = sum(not row["correct"] for row in rows_of(folder / "out/solutions.jsonl"))
    assert count["solutions"] == 120 and count["wrong"] == wrong
    assert len(rows_of(folder / "out/pairs.jsonl")) == count["pairs"]
    assert len(rows_of(folder / "out/located.jsonl")) + sum(drops) == count["pairs"]
    again = {(row["id"], row["sample"]) for row in rows_of(folder / "out/located.rollouts.jsonl")}
    assert not again & {(row["id"], row["sample"]) for row in rows_of(folder / "out/solutions.jsonl")}
    assert "none of the first 4 samples of the problem passes" in text and "0 tokens" not in text


@pytest.mark.parametrize("every", [1, 3, 8])
def test_a_build_stopped_after_every_few_batches_ends_as_one_that_was_not(built, tokenizer, tmp_path, every):
    samples = 0
    for _ in range(1000):
        sampler = Scripted(tokenizer)
        sampler.stop_at = every
        try:
            scripted_build(tmp_path, tokenizer, sampler)
            break
        except KeyboardInterrupt:
            samples += sampler.drawn
    assert outputs(tmp_path) == outputs(built[0])
    assert samples + sampler.drawn == built[1]  # and no sample was drawn twice


def _build_and_exit(folder, tokenizer, rank=0, world=1):
    data.RANK, data.WORLD = rank, world
    sampler = Scripted(tokenizer)
    sampler.nap = 0.02
    scripted_build(folder, tokenizer, sampler)


def test_a_build_killed_again_and_again_ends_as_one_that_was_not(built, tokenizer, tmp_path):
    fork, kills, reached = multiprocessing.get_context("fork"), 0, set()
    while True:
        child = fork.Process(target=_build_and_exit, args=(tmp_path, tokenizer))
        child.start()
        child.join(0.35 + 0.05 * (kills % 5))
        if child.exitcode is not None:
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills, reached = kills + 1, reached | outputs(tmp_path).keys()
    assert child.exitcode == 0 and kills >= 3 and {"solutions.jsonl", "located.rollouts.jsonl"} <= reached
    assert outputs(tmp_path) == outputs(built[0])


def test_ranks_share_the_work_and_make_the_same_pairs(built, tokenizer, tmp_path):
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_build_and_exit, args=(tmp_path, tokenizer, rank, 3))
                for rank in range(3)]
    [child.start() for child in children], [child.join(60) for child in children]
    assert [child.exitcode for child in children] == [0, 0, 0]
    ours, whole = outputs(tmp_path), outputs(built[0])
    assert ours == whole


def test_another_model_template_or_setting_is_never_mixed_in(built, tokenizer):
    folder, _ = built
    for flag, name in (("--temperature=0.7", "temperature"), ("--seed=1", "seed"),
                       ("--template=alpaca", "template"),
                       ("--model=other", "model"), ("--no-step-prefix", "step_prefix"),
                       ("--max-new-tokens=9", "max_new")):
        with pytest.raises(data.InputError, match=rf"solutions\.jsonl: was made with {name}.*same setting"):
            scripted_build(folder, tokenizer, None, flag)
    with pytest.raises(data.InputError, match=r"located\.jsonl: was made with rollouts = 8, and this is 9"):
        scripted_build(folder, tokenizer, None, "--rollouts=9")
    for stage, given in (("locate", "solutions"), ("rectify", "located")):
        args = parse(stage, "--model=other", f"--{given}", str(folder / f"out/{given}.jsonl"), "--out",
                     str(folder / "new.jsonl"))
        with pytest.raises(data.InputError,
                           match=rf"{given}\.jsonl: was made with model = 'scripted', and this is 'other'"):
            data.COMMANDS[stage](args, data.Tools(args))


# ------------------------------------------------------------------------------------------- judge and people


@pytest.mark.parametrize("reply, steps, found", [
    ("It adds wrongly.\nVerdict:\nStep 1: correct\nStep 2: incorrect", 3, 2),
    ("Verdict:\nStep 1: neutral\nStep 2: correct\nStep 3: neutral", 3, 0),
    ("Verdict: Step 1: correct; Step 2: neutral; Step 3: incorrect.", 3, 3),
    ("Verdict:\n**Step 1: incorrect**\n", 3, 1),
    ("First I thought Verdict:\nStep 1: incorrect\nbut no. Verdict:\nStep 1: correct", 1, 0),
    ("Verdict:\nStep 1: correct\nStep 2: correct", 3, None),  # does not go to the end, and names no error
    ("Verdict:\nStep 1: incorrect\nStep 2: correct", 3, None),
    ("Verdict:\nStep 2: incorrect", 3, None),
    ("Verdict:\nStep 1: correct\nStep 2: maybe incorrect", 3, None),
    ("Verdict:\nStep 1: correct\nStep 2: correct\nStep 3: correct\nStep 4: incorrect", 3, None),
    ("Step 1: correct\nStep 2: incorrect", 3, None), ("", 3, None), ("Verdict:", 3, None),
])
def test_a_verdict_is_read_strictly_or_not_at_all(reply, steps, found):
    assert data.first_error(reply, steps) == found


def test_a_judge_locates_errors_and_checks_chosen_steps(serve, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-judge")

    def judge(path, body):
        text = body["messages"][0]["content"]
        steps = re.findall(r"^Step \d+: (right|wrong) step", text, re.M)
        if "Problem 3:" in text:
            return "Who knows."
        first = next((k for k, step in enumerate(steps, 1) if step == "wrong"), len(steps))
        return "I see.\nVerdict:\n" + "\n".join(f"Step {k}: {'in' * (steps[k - 1] == 'wrong')}correct"
                                                for k in range(1, first + 1))

    server = serve(judge, [500, "truncated"], key="sk-judge")
    flags = ["--by=judge", "--check=judge", "--judge-url", server.url, "--judge-model=j"]
    scripted_build(tmp_path, tokenizer, Scripted(tokenizer), *flags)
    located = rows_of(tmp_path / "out/located.jsonl")
    first_wrong = [1 + [data.step_text(r["solution"], data.find_steps(r["solution"]), k + 1)[:6]
                        for k in range(
        len(data.find_steps(r["solution"])))].index(" wrong") for r in located if "step" in r]
    assert [row["step"] for row in located if "step" in row] == first_wrong and len(first_wrong) > 20
    statuses = Counter(row["status"] for row in located if "Problem 3:" in row["prompt"])
    assert statuses == {"located: verdict not as asked for": sum(statuses.values())} and statuses
    replies = [row["reply"] for row in rows_of(tmp_path / "out/located.judge.jsonl")]
    assert "Who knows." in replies  # kept, to be read
    pairs = rows_of(tmp_path / "out/pairs.jsonl")
    assert len(pairs) > 10 and all(" right" in p["chosen"] and " wrong" in p["rejected"] for p in pairs)
    asked, again = server.tried, outputs(tmp_path)
    scripted_build(tmp_path, tokenizer, None, *flags)
    assert server.tried == asked and outputs(tmp_path) == again
    assert "sk-judge" not in "".join(capsys.readouterr())


def test_people_fill_in_a_file_that_is_read_back(built, tokenizer, tmp_path, capsys):
    def run(command, *flags):
        args = parse(command, "--model=scripted", *flags)
        tools = data.Tools(args)
        tools.tokenizer, tools.sampler = tokenizer, Scripted(tokenizer)
        data.COMMANDS[command](args, tools)
        return capsys.readouterr().out

    sheet, pairs = tmp_path / "located.jsonl", tmp_path / "pairs.jsonl"
    flags = ["--solutions", str(built[0] / "out/solutions.jsonl"), "--by=human", "--out", str(sheet)]
    assert "where step is null, put the number" in run("locate", *flags)
    rows = rows_of(sheet)
    assert len(rows) > 20 and all(list(row)[0] == "step" and row["step"] is None for row in rows)
    for i, row in enumerate(rows[:6]):
        row["step"] = 0 if i == 5 else true_error(row["solution"])
    write_jsonl(sheet, rows)
    shown = run("locate", *flags)
    assert f"-{len(rows) - 6}  not filled in yet" in shown and "-1  no wrong step" in shown
    assert [row["step"] for row in rows_of(sheet)] == [row["step"] for row in rows]  # what is filled in stays
    run("rectify", "--located", str(sheet), "--out", str(pairs))
    assert 1 <= len(rows_of(pairs)) <= 5
    for bad in (99, -1, "2", True):
        write_jsonl(sheet, [*rows[:2], rows[2] | dict(step=bad)])
        for command in (["locate", *flags], ["rectify", "--located", str(sheet), "--out", str(pairs)]):
            with pytest.raises(data.InputError,
                               match=r"located\.jsonl:3: step must be 0 \(none is wrong\) to \d"):
                run(*command)


# ----------------------------------------------------------------------------------------- stages, one by one


def test_evaluation_prints_accuracy_with_its_interval(tokenizer, tmp_path, capsys):
    scripted_build(tmp_path, tokenizer, Scripted(tokenizer), "--samples=1", "--out",
                   str(tmp_path / "s.jsonl"), command="solve",
                   problems=200)
    right = sum(row["correct"] for row in rows_of(tmp_path / "s.jsonl"))
    low, high = data.wilson(right, 200)
    shown = f"accuracy {right / 200:.1%} ({right} of 200, 95% interval {low:.1%} to {high:.1%}); 0 without"
    assert shown in capsys.readouterr().out
    assert data.wilson(0, 100) == pytest.approx((0, 0.0370), abs=1e-4)
    assert data.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_a_line_that_was_cut_off_is_no_answer(tokenizer, tmp_path):
    class Cut:
        def sample(self, wanted):
            yield [(0, data.Continuation(" so\nThe answer is: 7", 5, True)),
                   (1, data.Continuation(" so\nThe answer is: 7\nAnd on and", 5, True))]
    scripted_build(tmp_path, tokenizer, Cut(), "--out", str(tmp_path / "s.jsonl"), command="solve",
                   problems=1)
    assert [(row["predicted"], row["correct"]) for row in rows_of(tmp_path / "s.jsonl")] == [(None, False),
                                                                                             ("7", True)]


@pytest.mark.parametrize("stage, given, row, message", [
    ("locate", "solutions", dict(prompt="x", answer="1", solution="s"),
     r"in\.jsonl:1: needs 'correct' \(bool\)"),
    ("locate", "solutions", dict(prompt="x", answer=1, solution="s", correct=False),
     r"in\.jsonl:1: needs 'answer' \(str\)"),
    ("rectify", "located", dict(prompt="x"), r"in\.jsonl:1: needs status, prompt, answer and solution"),
    ("rectify", "located", dict(status="located", prompt="x", answer="1", solution="Step 1: a", step=2),
     r"in\.jsonl:1: step must be 0 \(none is wrong\) to 1, or null, not 2"),
    ("rectify", "located", dict(status="located", prompt="x", answer="1", solution="a", step=1),
     "to 0, or null"),
])
def test_rows_that_are_not_of_the_stage_before_are_refused(tmp_path, stage, given, row, message):
    path = write_jsonl(tmp_path / "in.jsonl", [row])
    with pytest.raises(SystemExit, match=message):
        data.main([stage, "--model=m", f"--{given}", path, "--out", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_chosen_step_must_be_as_good_to_go_on_from_and_of_sane_length():
    prefix = STEPS + "Step 1:"
    row = dict(prompt="p", answer="7", solution=prefix + " wrong thing\nStep 2: end\nThe answer is: 8",
               step=1, drawn=20,
               passed=[prefix + text + "\nStep 2: end\nThe answer is: 7" for text in (
                   " Wrong  thing", " bad luck here", " bad luck here", " fine thing", " x",
                   " far too long" * 9)])
    args = parse("rectify", "--model=m", "--located=l", "--out=o")
    search = data.repair(row, args)
    (first,) = next(search)
    assert first.prefix == prefix + " bad luck here\nStep 2:" and first.count == 8  # the most frequent first
    rollout = dict(correct=True, cut=False)
    (second,) = search.send([[dict(rollout, correct=i == 0) for i in range(8)]])  # 1/8 < 6/20
    assert second.prefix == prefix + " fine thing\nStep 2:"
    with pytest.raises(StopIteration) as end:
        search.send([[rollout] * 8])
    assert [pair["chosen"] for pair in end.value.value["pairs"]] == [" fine thing"]
    search = data.repair(row, args)
    next(search), search.send([[dict(rollout, cut=True)] * 8])  # what was cut off does not pass
    with pytest.raises(StopIteration) as end:
        search.send([[dict(rollout, correct=False)] * 8])
    assert end.value.value == dict(status="rectified: no chosen step passes --check", pairs=[])


# ----------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("flags, message", [
    (["solve", "--model=m", "--problems=p"], "required: --out"), (["solve", "--mod=m"], "required"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--temp=1"], "unrecognized arguments: --temp=1"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--samples=0"], "--samples is out of range: 0"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--top-p=1.5"], "--top-p is out of range"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--top-p=0"], "--top-p is out of range"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--temperature=-1"], "--temperature is out of range"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--server=u"], "--server-model is needed too"),
    (["locate", "--model=m", "--solutions=s", "--out=o", "--by=judge"], "--judge-url is needed too"),
    (["locate", "--model=m", "--solutions=s", "--out=o", "--by=oracle"], "invalid choice: 'oracle'"),
    ([], "required"), (["sample"], "invalid choice: 'sample'"),
])
def test_usage_errors(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        data.parse_arguments(flags)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_flags_take_hyphens_or_underscores_and_files(tmp_path):
    (tmp_path / "args").write_text("--max_new_tokens 99  # so\n--problems 'my file'\n\n--no-step-prefix\n")
    args = data.parse_arguments(["solve", f"@{tmp_path}/args", "--model=m", "--out=o", "--top_p=0.5"])
    assert (args.max_new_tokens, args.problems, args.step_prefix, args.top_p) == (99, "my file", False, 0.5)
    assert parse("rectify", "--model=m", "--located=l", "--out=o").samples == 20
    args = parse("solve", "--model=m", "--problems=p", "--out=o", "--seed=3", "--batch-tokens=9",
                 "--instruction=")
    assert (args.seed, args.batch_tokens, args.instruction, args.temperature) == (3, 9, "", 0.8)


def test_the_command_line_end_to_end(tiny, tmp_path, capsys):
    """A real (random) model in a process of its own: samples, funnel, no pairs; nothing drawn twice."""
    path = write_jsonl(tmp_path / "p.jsonl", [dict(prompt=f"Problem {i}?", answer="7") for i in range(3)])
    flags = ["build", "--model", tiny, "--problems", path, "--out", str(tmp_path / "out"),
             "--max-new-tokens=16"]
    first = subprocess.run([sys.executable, data.__file__, *flags], capture_output=True, text=True,
                           timeout=300)
    assert first.returncode == 0, first.stderr
    assert "accuracy 0.0% (0 of 6 samples of 3 problems)" in first.stdout
    assert "0 pairs of 0 problems" in first.stdout and re.search(r"^[1-9]\d* tokens sampled", first.stdout,
                                                                 re.M)
    data.main(flags)
    assert "\n0 tokens sampled" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"data\.py solve: nowhere\.jsonl: No such file or directory"):
        data.main(["solve", "--model", tiny, "--problems", "nowhere.jsonl", "--out", "o"])
    with pytest.raises(SystemExit,
                       match=r"data\.py solve: --model .*nowhere: no tokenizer there"):
        data.main(["solve", "--model", str(tmp_path / "nowhere"), "--problems", path, "--out",
                   str(tmp_path / "o")])
    with pytest.raises(SystemExit):
        data.main(["--help"])
    help = capsys.readouterr().out
    assert "AQuA: question, options, correct" in help and "torchrun" in help and "the same command" in help


def test_if_every_solution_is_right_there_are_no_pairs(tokenizer, tmp_path):
    class Right:
        def sample(self, wanted):
            yield [(i, data.Continuation(" so\nThe answer is: 7", 5, False)) for i in range(len(wanted))]
    scripted_build(tmp_path, tokenizer, Right(), problems=3)
    assert (tmp_path / "out/pairs.jsonl").read_text() == ""


# --------------------------------------------------------------------------------------- supervised training


def module_of(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, HERE / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sft():
    return module_of("bench/sft.py")


GSM8K = dict(question="Tom has 48/2 pens and buys 3. How many?",
             answer="He has 48/2=<<48/2=24>>24.\nSo 24+3=27.\n#### 27")


def test_supervised_rows_are_numbered_steps_that_the_pipeline_reads(sft, tokenizer):
    solution = sft.steps_of(GSM8K, "here")
    assert solution == STEPS + "Step 1: He has 48/2=24.\nStep 2: So 24+3=27.\nThe answer is: 27"
    assert len(data.find_steps(solution)) == 2 and data.is_correct(solution, "27")
    assert solution.startswith(data.STEP_PREFIX)
    ids, question = sft.encode(tokenizer, GSM8K, "here")
    assert tokenizer.decode(ids[question:]) == solution + tokenizer.eos_token  # EOS: an answer ends
    assert tokenizer.decode(ids[:question]) == data.open_turn(tokenizer, GSM8K["question"], "chat", None)
    for bad in (dict(question="x", answer="7"), dict(question="x", answer="#### 7"), dict(question="x")):
        with pytest.raises(ValueError, match="f:3: "):
            sft.steps_of(bad, "f:3")


def test_supervised_loss_is_that_of_the_answer_alone(sft, tiny, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    items = [sft.encode(tokenizer, GSM8K, ""),
             sft.encode(tokenizer, GSM8K | dict(answer="Three.\n#### 3"), "")]
    losses = []
    for ids, question in items:  # one by one, by the library's own loss
        labels = torch.tensor([[-100] * question + ids[question:]])
        losses.append((model(torch.tensor([ids]), labels=labels).loss.item(), len(ids) - question))
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert sft.loss_of(model, items).item() == pytest.approx(mean, rel=1e-5)


def test_supervised_training_writes_a_model_that_has_learned(sft, tiny, tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [GSM8K] * 12)
    flags = ["--model", tiny, "--data", path, "--rows", ":-4", "--out", str(tmp_path / "out"), "--epochs=12",
             "--batch-size=4", "--learning-rate=0.02"]
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags])
    sft.main()
    text = capsys.readouterr().out
    assert "8 rows, 24 steps of 4" in text and os.listdir(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    items = [sft.encode(transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), GSM8K, "")]
    assert sft.loss_of(model, items) < 0.5 * sft.loss_of(before, items)
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags, "--rows", "50:"])
    with pytest.raises(SystemExit, match="sft: .*no rows left of 0"):
        sft.main()


# --------------------------------------------------------------------------------------------------- the demo


@pytest.fixture(scope="session")
def demo():
    return module_of("demo/make.py")


def test_demo_problems_are_right_and_no_two_sets_share_one(demo):
    sets = demo.problem_sets(demo.SEED)
    prompts = [row["prompt"] for rows in sets.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    for name in ("test", "problems"):  # what lies in demo/ is what the generator makes
        assert rows_of(HERE / f"demo/{name}.jsonl") == [
            dict(prompt=row["prompt"], answer=row["answer"]) for row in sets[name]]
    assert len(sets["test"]) == 500
    for row in sets["test"] + sets["problems"]:
        assert 2 <= len(row["steps"]) == len(row["other"]) <= 5
        for own, other in zip(row["steps"], row["other"], strict=True):
            results = []
            for step in (own, other):
                sums = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", step)
                for left, sign, right, result in sums:
                    compute = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
                    assert compute[sign](int(left), int(right)) == int(result) >= 0, step
                results.append(sums[-1][3])
            assert own != other and results[0] == results[1]
        assert results[0] == row["answer"]


def test_demo_is_small_ordinary_and_its_pairs_are_of_its_problems():
    files = [path for path in (HERE / "demo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") <= 8e6
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / "demo/model")
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.dtype == torch.bfloat16
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    answers = {row["prompt"]: row["answer"] for row in rows_of(HERE / "demo/problems.jsonl")}
    used = []
    for name in ("pairs", "eval_pairs"):
        rows = rows_of(HERE / f"demo/{name}.jsonl")
        used.append({row["prompt"] for row in rows})
        for row in rows:
            assert row["answer"] == answers[row["prompt"]]
            assert data.is_correct(row["initial_reason_steps"] + row["full_chosen"], row["answer"])
            assert not data.is_correct(row["initial_reason_steps"] + row["full_rejected"], row["answer"])
    assert not used[0] & used[1]


def test_demo_recipe_trains_evaluates_and_shows_accuracy_before_and_after(workplace, tmp_path):
    """The README's first command, with few optimizer steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "stepdpo.py",
               "@demo/args", "--max-steps", "4", "--output-dir", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=600,
                            env=ENVIRONMENT | {"STEPDPO_CACHE": str(tmp_path)})
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(r"accuracy    before (\d+\.\d)%, after (\d+\.\d)% on 500 held-out problems: "
                      r"[+-]\d+\.\d points, 95% interval [+-]\d+\.\d to [+-]\d+\.\d", result.stdout)
    assert found and 50 <= float(found[1]) <= 70
    for number, when in enumerate(("before", "after"), 1):
        right = [row["correct"] for row in rows_of(tmp_path / f"out/{when}.jsonl")]
        assert len(right) == 500 and f"{sum(right) / 500:.1%}" == found[number] + "%"
    assert [row["step"] for row in read_metrics(tmp_path / "out") if "eval/loss" in row] == [0, 4]
    again = subprocess.run([*command, "--resume"], cwd=HERE, capture_output=True, text=True, timeout=600,
                           env=ENVIRONMENT | {"STEPDPO_CACHE": str(tmp_path)})
    assert "finished    already" in again.stdout and found[0] in again.stdout  # a stop loses nothing


def test_foreign_chosen_steps_are_right_and_in_other_words(demo, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "bench")
    pairs = rows_of(HERE / "demo/pairs.jsonl")
    rows, kept = module_of("bench/ablation.py").written(pairs, demo.problem_sets(demo.SEED)["problems"])
    changed = [new for old, new in zip(pairs, rows, strict=True) if old["chosen"] != new["chosen"]]
    assert len(changed) == len(rows) - kept > 0.9 * len(rows)
    last = [row for row in changed if "The answer is" in row["chosen"]]
    assert last and all(data.is_correct(row["chosen"], row["answer"]) for row in last)


def test_gain_is_paired_by_problem():
    # 10 of 100 changed, all for the better: the standard error is sqrt(0.1 * 0.9 / 100) = 0.03
    gain = stepdpo.paired_gain([True] * 50 + [False] * 50, [True] * 60 + [False] * 40)
    assert gain == pytest.approx((0.1, 0.1 - 1.96 * 0.03, 0.1 + 1.96 * 0.03))


# -------------------------------------------------------------------------------------------- the benchmarks


def bench(script: str, out, *flags: str) -> tuple[dict, str]:
    result = subprocess.run([sys.executable, f"bench/{script}.py", *flags, "--out", str(out)], cwd=HERE,
                            text=True, capture_output=True, timeout=300, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(Path(out).read_text()), result.stdout


def test_loss_benchmark_measures_what_runs_here_and_names_what_does_not(tmp_path):
    report, text = bench("loss", tmp_path / "loss.json", "--shapes", "64,32,1000", "--repeats", "2", "--skip",
                         "compiled")
    results = report["shapes"]["64,32,1000"]
    for name in ("ours", "plain", "torch"):
        assert results[name]["seconds"] > 0 and results[name]["extra_bytes"] > 0
        assert all(results[name][key] < 1e-5 for key in ("logps", "dhidden", "dweight", "untargeted"))
    assert all(f"{name:11}missing: " in text for name in ("compiled", "liger", "cce", "cce-filter", "quack"))


def test_training_benchmark_runs_ours_and_names_a_missing_trl(workplace, tmp_path):
    report, text = bench("train", tmp_path / "train.json", "--model", str(workplace / "qwen2"), "--data",
                         str(workplace / "pairs.jsonl"), "--batch-size=4", "--steps=1", "--rounds=1",
                         "--only=^ours$|^trl")
    assert report["table"]["ours"]["pairs_per_second"] > 0
    assert report["runs"]["ours"][0]["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    if importlib.util.find_spec("trl") is None:
        assert "not installed: pip install trl" in text and set(report["table"]) == {"ours"}
    else:
        assert report["table"]["trl"]["loss_differs"] < 1e-4


def test_training_benchmark_tells_where_the_time_of_a_step_goes(workplace, tmp_path):
    report, text = bench("train", tmp_path / "profile.json", "--model", str(workplace / "qwen2"), "--data",
                         str(workplace / "pairs.jsonl"), "--batch-size=4", "--steps=1", "--profile")
    kinds = report["kinds"]
    assert min(kinds["matrix products"], kinds["attention"], kinds["the rest"]) > 0 and report["flops"] > 0
    assert sum(kinds.values()) == pytest.approx(report["seconds"], rel=0.5)
    assert "matrix products" in text and "TFLOP/s" in text


def test_training_benchmark_goes_on_with_the_runs_that_it_finished(tmp_path):
    bench_train, path = module_of("bench/train.py"), str(tmp_path / "new" / "train.json.part")
    runs = {(0, "ours"): {"loss": [0.7]}, (0, "trl"): {"failed": bench_train.OOM},
            (1, "ours"): {"failed": "another error, worth a second try"}}
    assert bench_train.finished_before(path, {"model": "a"}) == {}
    with open(path, "a") as file:
        file.writelines(json.dumps([n, name, run]) + "\n" for (n, name), run in runs.items())
        file.write('[1, "trl", {"lo')  # killed while writing
    for _ in range(2):
        kept = bench_train.finished_before(path, {"model": "a"})
        assert kept == {key: run for key, run in runs.items() if key != (1, "ours")}
    assert bench_train.finished_before(path, {"model": "b"}) == {}


def test_scaling_benchmark_gives_the_same_losses_with_more_processes(workplace, tmp_path):
    report, text = bench("scaling", tmp_path / "scaling.json", "--model", str(workplace / "qwen2"), "--quick")
    one, two = report["processes"]
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert report["sharing"][0]["formula"] == pytest.approx(2 * 80 / 96) and "PROJECTION" in text


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
    (["--model", "m"], "--data is required"),
    (["--learn", "1"], "unrecognized arguments"),
    (["--beta", "0"], "--beta must be above 0, got 0.0"),
    (["--epochs", "two"], "invalid int value: 'two'"),
    (["--span", "word"], "invalid choice: 'word'"),
    (["--max-steps", "-1"], "--max-steps must be at least 0, got -1"),
])
def test_bad_flags_are_usage_errors(capsys, flags, message):
    required = [] if "--model" in flags else ["--model", "m", "--data", "d", "--output-dir", "o"]
    with pytest.raises(SystemExit) as stop:
        stepdpo.parse(required + flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_errors_reach_the_terminal_as_one_line(workplace, tmp_path):
    child = launch(make_config(workplace, tmp_path, data=str(tmp_path / "none.jsonl")), 1)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 2 and "Traceback" not in output
    assert f"stepdpo.py: error: {tmp_path / 'none.jsonl'}: No such file or directory" in output


@needs_cuda
def test_training_on_cuda_with_flex_attention_in_bf16(workplace, tmp_path):
    child = launch(make_config(workplace, tmp_path, dtype="bfloat16"), 1, dict(os.environ))
    output, _ = child.communicate(timeout=300)
    assert child.returncode == 0 and "flex_attention" in output, output
    losses = losses_of(tmp_path)
    assert losses[0] == pytest.approx(math.log(2), abs=5e-3) and losses[-1] < losses[0]
