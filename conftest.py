"""What all tests share: a tokenizer, step pairs, tiny models. (pytest finds this file by its name.)"""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; kernels.py then has both ways to run

import transformers  # noqa: E402

import kernels  # noqa: E402

kernels._INTERPRETED = False  # plain torch, but where a test asks for the interpreter
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}  # of child processes
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# Forked from a process that has imported the tests and done nothing else: at once, where a start takes ten
# seconds, and without what other tests have started in this one.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["test_stepdpo", "pairs.test_pairs"])


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


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
