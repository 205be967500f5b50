"""The specification of this repository, executable: pytest, on a CPU, in a few minutes.

In the order of the code: the loss, the kernel, the data, the packed policy, training, the command line. Tests that need a GPU
skip visibly without one. Each test names the rule it protects.
"""

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
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported; kernels.py then has both ways to run

import data  # noqa: E402
import kernels  # noqa: E402
import stepdpo  # noqa: E402

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0"}  # of child processes
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")

# ------------------------------------------------------------------------------------------------------------ the loss


def test_loss_by_hand():
    tensor = torch.tensor
    losses, chosen, rejected = stepdpo.step_dpo_loss(
        tensor([-10.0, -3.0]), tensor([-12.0, -4.0]), tensor([-11.0, -3.0]), tensor([-11.0, -2.0]), beta=0.5)
    assert chosen.tolist() == [0.5, 0.0] and rejected.tolist() == [-0.5, -1.0]
    # margins 1.0 and 1.0: both losses are log(1 + e^-1)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1.0))] * 2, abs=1e-7)


def test_loss_is_ln_2_where_policy_is_reference_and_survives_large_margins():
    same = torch.tensor([-200.0, 0.0])
    assert stepdpo.step_dpo_loss(same, same - 3, same, same - 3, 0.4)[0].tolist() == pytest.approx([math.log(2)] * 2)
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


# ---------------------------------------------------------------------------------------------------------- the kernel


@pytest.fixture(autouse=True)
def plain_torch_unless_asked(monkeypatch):
    monkeypatch.setattr(kernels, "_INTERPRETED", False)


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
    truth = values_and_gradients(lambda h, w, t: (h @ w.T).log_softmax(-1).gather(1, t[:, None])[:, 0], *inputs, torch.float64)
    plain = values_and_gradients(plain_logps, *inputs, dtype)
    ours = values_and_gradients(function, *inputs, dtype)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    rounding = 4 * torch.finfo(torch.float32).eps * (hidden.double() @ weight.double().T).abs().max()  # of a logit
    for name, exact, torch_result, result in zip(("logps", "dhidden", "dweight"), truth, plain, ours, strict=True):
        error, allowed = ((x.double() - exact).abs().max() for x in (result, torch_result))
        tolerance = rounding if name == "logps" else (rounding + torch.finfo(dtype).eps) * exact.abs().max()
        assert error <= allowed + tolerance, f"{name}: error {error:.3g}, torch {allowed:.3g} + {tolerance:.3g}"


def test_kernel_is_right_where_all_logits_are_far_below_zero(op):
    function, device = op
    hidden, weight = torch.ones(2, 4, device=device), torch.full((130, 4), -100.0, device=device)
    logps = function(hidden, weight, torch.tensor([0, 129], device=device))
    assert logps.tolist() == pytest.approx([-math.log(130)] * 2, abs=1e-4)


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
    assert torch.allclose(function(hidden[::2], weight, targets), plain_logps(hidden[::2], weight, targets), atol=1e-5)


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
    arguments = dict(hidden=torch.zeros(3, 8), weight=torch.zeros(10, 8), targets=torch.tensor([0, 1, 9])) | bad
    with pytest.raises(ValueError, match=message):
        function(*(x if x.is_meta else x.to(device) for x in arguments.values()))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive at the same time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage()._cdata not in known | self.seen:
                storage = x.untyped_storage()
                self.live, self.peak = self.live + storage.nbytes(), max(self.peak, self.live + storage.nbytes())
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
        hidden, weight = torch.randn(T, D, dtype=dtype, requires_grad=True), torch.randn(V, D, dtype=dtype, requires_grad=True)
        with LiveBytes() as memory:
            kernels.linear_logps(hidden, weight, torch.arange(T)).sum().backward()
        peaks.append(memory.peak - (T * D + V * D) * dtype.itemsize)
    formula = T * 256 * 4 + 2 * (T + 256) * D * 4
    assert peaks[1] <= peaks[0] + 1024 and peaks[1] <= formula + 16 * 1024, (peaks, formula)


def test_kernel_file_works_copied_alone_into_an_empty_folder(tmp_path):
    shutil.copy(HERE / "kernels.py", tmp_path)
    code = ("import sys; sys.modules.update(dict.fromkeys(('transformers', 'numpy', 'tqdm', 'safetensors')))\n"
            "import torch, kernels\n"
            "h = torch.randn(5, 8, requires_grad=True); kernels.linear_logps(h, torch.randn(99, 8), torch.arange(5))"
            ".sum().backward(); print('gradient', h.grad.shape)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                            env=ENVIRONMENT)
    assert "gradient torch.Size([5, 8])" in result.stdout, result.stderr


AHEAD_OF_TIME = """
import re, subprocess, sys, tempfile, triton, kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
numbers = dict(start="i32", width="i32", CHUNK="constexpr")
fold = dict(tile="*fp32", targets="*i64", maximum="*fp32", total="*fp32", target_logit="*fp32", **numbers)
dtile = [dict(tile="*fp32", targets="*i64", lse="*fp32", dlogps="*fp32", dtile="*" + t, **numbers) for t in ("fp32", "bf16", "fp16")]
for kernel, signatures in ((kernels._fold_kernel, [fold]), (kernels._dtile_kernel, dtile)):
    for signature in signatures:
        for capability in (80, 90, 100):
            source = ASTSource(kernel, signature, {"CHUNK": kernels._CHUNK})
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"]); file.flush()
                tool = triton.knobs.nvidia.cuobjdump.path
                usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
            stack, local = (int(re.search(name + r":(\\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
            print(kernel.__name__, capability, "STACK", stack, "LOCAL", local)
"""


def test_kernels_compile_ahead_of_time_for_a100_h100_b200_without_spills():
    result = subprocess.run([sys.executable, "-c", AHEAD_OF_TIME], cwd=HERE, capture_output=True, text=True, env=ENVIRONMENT)
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


# ------------------------------------------------------------------------------------------------------------ the data

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 400 tokens, trained here, with a chat template, an EOS and no BOS (like Qwen's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>", "<s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([Path(data.__file__).read_text()] * 2, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=CHATML)


def make_rows(count: int) -> list[dict]:
    """Step pairs of varied lengths, every one different."""
    rows = []
    for i in range(count):
        before = "".join(f"Step {k}: take {i + k} and double it to {2 * (i + k)}.\n" for k in range(1, 1 + i % 3))
        chosen, rejected = f" So {i} + {i} = {2 * i}" + " which is right" * (i % 4), f" Thus we get {i * 7 + 1}."
        rows.append(dict(dataset="made", prompt=f"What is twice {i}{', please' * (i % 5)}?", chosen=chosen, rejected=rejected,
                         initial_reason_steps=f"Let's think step by step.\n{before}Step {1 + i % 3}:",
                         full_chosen=chosen + f"\nThe answer is: {2 * i}", full_rejected=rejected + "\nThe answer is: 7",
                         answer=str(2 * i)))
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
])
def test_unreadable_rows_name_file_and_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(data.InputError, match="bad.jsonl" + (message if message[0] == ":" else ": " + message)):
        data.read_rows(str(tmp_path / "bad.jsonl"))


def test_unreadable_files_are_named(tmp_path):
    for path, message in ((tmp_path / "none.jsonl", "No such file"), (tmp_path / "x.csv", "must be a .jsonl")):
        with pytest.raises(data.InputError, match=f"{path.name}: {message}"):
            data.read_rows(str(path))
    (tmp_path / "one.json").write_text('{"a":\n 1,}')
    with pytest.raises(data.InputError, match="one.json:2: not valid JSON"):
        data.read_rows(str(tmp_path / "one.json"))
    (tmp_path / "one.json").write_text('{"a": 1}')
    with pytest.raises(data.InputError, match="one.json: must be one JSON list"):
        data.read_rows(str(tmp_path / "one.json"))


@pytest.mark.parametrize("change, message", [
    ({"chosen": None}, "'chosen' must be text, got NoneType"),
    ({"rejected": " \n"}, "'rejected' is empty"),
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
    assert tokenizer.decode(step.chosen) == row["chosen"] and tokenizer.decode(step.rejected) == row["rejected"]
    assert tokenizer.decode(solution.chosen) == row["full_chosen"] + tokenizer.eos_token
    assert solution.chosen.count(tokenizer.eos_token_id) == solution.rejected.count(tokenizer.eos_token_id) == 1


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
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    for template in data.TEMPLATES:
        (pair,) = make_pairs(with_bos, 1, template=template)
        assert pair.prefix[0] == bos and (pair.prefix + pair.chosen + pair.rejected).count(bos) == 1
        (pair,) = make_pairs(tokenizer, 1, template=template)
        assert bos not in pair.prefix + pair.chosen + pair.rejected


def test_no_merge_across_the_step_boundary_is_invented_or_lost(tokenizer):
    row = make_rows(1)[0] | {"initial_reason_steps": "Let's think\nStep 1: ", "chosen": "the token", "rejected": "ten"}
    (pair,), _ = data.encode([("f:1", row)], tokenizer, "chat", None, "step", 1024)
    text = data.open_turn(tokenizer, row["prompt"], "chat") + row["initial_reason_steps"]
    for step, ids in ((row["chosen"], pair.chosen), (row["rejected"], pair.rejected)):
        assert pair.prefix + ids == tokenizer(text + step).input_ids
    assert tokenizer.decode(pair.chosen) == " the token"  # the space is merged with the word, so it is not in the prefix
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
    assert all((a == b).all() for a, b in zip(plan, same, strict=True)) and (plan[0][:10] != other[0][:10]).any()
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
    assert batch.predict_at.tolist() == [2, 3, 2, 6, 6, 8]  # the last prefix token predicts the first of both branches
    assert batch.targets.tolist() == [10, 11, 20, 12, 21, 22]
    assert batch.sequence.tolist() == [0, 0, 2, 1, 3, 3]  # chosen 0, 1, rejected 2, 3
    assert (batch.pairs, batch.tokens) == (2, 10)
    alone = data.pack(pairs[:1], share_prefix=False)
    assert alone.input_ids.tolist() == [[1, 2, 3, 10, 11, 1, 2, 3, 20]] and alone.document.tolist() == [0] * 5 + [1] * 4
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
    assert windowed[3].tolist() == [0, 0, 1, 1, 0, 0, 0, 0] and windowed[4].tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
