"""What all tests share: tokens and pairs, tiny models, short runs, processes.

pytest finds this file by its name.
"""

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The models here are so small that threads would only wait for each other, and with other work beside them
# take tens of times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; kernels.py then has both ways to run

import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402

import data  # noqa: E402
import kernels  # noqa: E402
import stepdpo  # noqa: E402
from pairs import local  # noqa: E402
from runtime import architectures, startup  # noqa: E402

kernels._INTERPRETED = False  # plain torch, but where a test asks for the interpreter
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}  # of child processes
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# Forked from a process that has imported the tests and done nothing else: at once, where a start takes ten
# seconds, and without what other tests have started in this one.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["conftest", "pairs.test_pairs"])

# ------------------------------------------------------------------------------------------- tokens and pairs

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_tokenizer():
    """A byte-level BPE of 400 tokens, trained here, with a chat template, an EOS and no BOS (like Qwen's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>", "<s>"],
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([json.dumps(make_rows(50)), "Mind the token, then the tent. " * 20], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                                chat_template=CHATML)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


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


def numbered(rows: list[dict]) -> list[tuple[str, dict]]:
    return [(f"f:{number}", row) for number, row in enumerate(rows, 1)]


def make_pairs(tokenizer, count: int, span: str = "step", template: str = "chat") -> list[data.Pair]:
    return data.encode(numbered(make_rows(count)), tokenizer, template, None, span)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ tiny models


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory):
    """A folder with a random Qwen2 model of two layers that ends an answer now and then."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# Of three experts, so that two ranks have unequal shares; each token asks two.
MIXTURE = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24)
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
    # It passes no keyword arguments on to its attention.
    "stablelm": (transformers.StableLmConfig, {}),
    "qwen2-moe": (transformers.Qwen2MoeConfig, MIXTURE | dict(shared_expert_intermediate_size=40)),
    "qwen3-moe": (transformers.Qwen3MoeConfig, MIXTURE | dict(head_dim=16)),
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


def make_policy(model) -> stepdpo.Policy:
    """A model as the trainer has it, but for the sharding."""
    architectures.register_attention()
    model.set_attn_implementation("segments")
    return stepdpo.Policy(model)


def separate_logps(model, pairs) -> torch.Tensor:
    """(2, B) with a plain forward over each sequence alone: the truth."""
    sums = []
    for kind in ("chosen", "rejected"):
        for pair in pairs:
            span = getattr(pair, kind)
            ids = torch.tensor([pair.prefix + span])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            sums.append(logps[-len(span):].sum())
    return torch.stack(sums).view(2, -1)


# ------------------------------------------------------------------------------------------------- short runs


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
    flags = dict(model=workplace / "qwen2", data=workplace / "pairs.jsonl", output_dir=out, batch_size=7,
                 epochs=2, learning_rate=2e-4, tokens_per_micro_batch=600, dtype="float32") | changes
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def make_config(workplace, out, **changes) -> argparse.Namespace:
    return stepdpo.parse(make_flags(workplace, out, **changes))


def default_flags(**changes) -> argparse.Namespace:
    """For what depends on some flags, and not on what they name."""
    config = stepdpo.parse(["--model=-", "--data=-", "--output-dir=-"])
    return argparse.Namespace(**vars(config) | changes)


@pytest.fixture(scope="session")
def run(workplace):
    """One whole run in this process, which other runs are compared with."""
    out = workplace / "run"
    stepdpo.train(make_config(workplace, out, eval_data=workplace / "eval.jsonl", eval_every=3))
    return out


def read_metrics(out) -> list[dict]:
    return rows_of(Path(out) / "metrics.jsonl")


def losses_of(out) -> list[float]:
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


if CUDA:  # the trainer is tested on the CPU there too, and on the GPU in a child process
    def start_on_cpu(minutes: float = 30) -> None:
        if not dist.is_initialized():
            alone = dict(store=dist.HashStore(), rank=0, world_size=1)
            dist.init_process_group("gloo", **({} if "RANK" in os.environ else alone))
    startup.start_processes = start_on_cpu
    startup.local_device = stepdpo.local_device = lambda: torch.device("cpu")
    local.local_device = lambda: "cpu"  # the sampler too, but where a test gives it the GPU

# -------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def no_process_group():
    """Tests before this one may have left theirs, as the trainer's functions do but for its command."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(flags: list[str], environment: dict = ENVIRONMENT) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "stepdpo.py", *flags], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=environment | {"STEPDPO_CACHE": os.environ["STEPDPO_CACHE"]})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(count: int, folder: Path, function: Callable, *arguments) -> list:
    """Children in which the function runs as in torchrun's processes. What each says is in said-RANK."""
    environment = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    children = []
    for rank in range(count):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(CHILDREN.Process(target=_as_a_rank,
                                         args=(own, folder / f"said-{rank}", function, *arguments)))
        children[-1].start()
    return children


def _as_a_rank(environment: dict[str, str], said: Path, function: Callable, *arguments) -> None:
    os.environ.update(environment)
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    function(*arguments)


def run_in_processes(processes: int, folder: Path, function: Callable, *arguments) -> list[str]:
    """A function in processes as torchrun starts them, without its start. Returns what each said."""
    ranks = start_ranks(processes, folder, function, *arguments)
    for rank in ranks:
        rank.join(200)
    said = [(folder / f"said-{rank}").read_text() for rank in range(processes)]
    assert [rank.exitcode for rank in ranks] == [0] * processes, "".join(said)
    return said


def train_by_flags(flags: list[str]) -> None:
    """The trainer's command, in this process."""
    sys.argv = ["stepdpo.py", *flags]
    stepdpo.main()
