#!/usr/bin/env python3
"""Plain supervised fine-tuning on worked solutions, so that a small model answers in numbered steps.

Step-DPO starts from a model that already reasons in `Step k:` lines and is sometimes right. A small chat
model is not (a 135M one solves about 1% of GSM8K that way), so this teaches it first:

    user turn       {question}
                    Please reason step by step, and put your final answer within \\boxed{}.
    assistant turn  Let's think step by step.
                    Step 1: Natalia sold 48/2 = 24 clips in May.
                    Step 2: Natalia sold 48+24 = 72 clips altogether in April and May.
                    The answer is: 72<eos>

The loss is the mean cross-entropy over the answer's tokens and the end-of-sequence token.

    python demo/sft.py --model MODEL --data gsm8k_train.jsonl --rows :-500 --out OUT

Any causal LM folder with a chat template works, randomly initialised ones too. Rows carry `question` and
`answer`, the answer one step per line and ending in `#### N` (GSM8K); marks like `<<48/2=24>>` are removed.
Or `question` and `solution`, which is taught as it is.
"""

import argparse
import copy
import math
import os
import random
import re
import shutil
import sys
import time
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402
from runtime import hub_kernels  # noqa: E402
from runtime.flags import INT, POSITIVE_FLOAT, POSITIVE_INT  # noqa: E402
from runtime.rows import read_rows  # noqa: E402

hub_kernels.keep_out()
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


class Example(NamedTuple):
    ids: list[int]  # the conversation
    question: int   # so many tokens at its beginning are the question, which carries no loss


def steps_of(row: dict, where: str) -> str:
    """The solution that is taught: the row's own, or GSM8K's worked one as `Step k:` lines. Raises ValueError
    naming a row that is of neither form."""
    if isinstance(row.get("question"), str) and isinstance(row.get("solution"), str):
        return row["solution"]
    if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
        raise ValueError(f'{where}: needs the string fields "question" and "answer"')
    work, mark, final = row["answer"].rpartition("####")
    lines = [line.strip() for line in re.sub(r"<<.*?>>", "", work).splitlines() if line.strip()]
    if not mark or not lines or not final.strip():
        raise ValueError(f'{where}: "answer" is not worked lines followed by "#### N"')
    numbered = [f"Step {k}: {line}" for k, line in enumerate(lines, 1)]
    return "\n".join(["Let's think step by step.", *numbered, f"The answer is: {final.strip()}"])


def encode(tokenizer, row: dict, where: str, instruction: str | None = None) -> Example:
    solution = steps_of(row, where)
    opened = data.open_turn(tokenizer, row["question"], "chat", instruction)
    question, conversation = tokenizer([opened, opened + solution], add_special_tokens=False).input_ids
    return Example([*conversation, tokenizer.eos_token_id], len(question))


def read(args: argparse.Namespace, tokenizer) -> list[Example]:
    """The rows of --data that --rows takes and --max-tokens leaves."""
    rows = read_rows(args.data)[args.rows]
    examples = [encode(tokenizer, row, where, args.instruction) for where, row in rows]

    kept = [example for example in examples if len(example.ids) <= args.max_tokens]
    if not kept:
        raise ValueError(f"{args.data}: no rows left of {len(examples)}; check --rows and --max-tokens "
                         f"{args.max_tokens}")
    if len(kept) < len(examples):
        print(f"left out: {len(examples) - len(kept)} of {len(examples)} rows, longer than {args.max_tokens} "
              "tokens")
    return kept


def plan(examples: list[Example], batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """Batches of row numbers in training order. Rows of similar length share a batch, so little is padding:
    each epoch is shuffled, cut into pools of 50 batches and sorted in each; then the batches are shuffled."""
    rng, batches, pool_size = random.Random(seed), [], 50 * batch_size
    for _ in range(math.ceil(epochs)):
        shuffled = rng.sample(range(len(examples)), len(examples))
        order = []
        for start in range(0, len(shuffled), pool_size):
            order += sorted(shuffled[start:start + pool_size], key=lambda i: len(examples[i].ids))
        epoch = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
        batches += rng.sample(epoch, len(epoch))
    return batches[:math.ceil(epochs * math.ceil(len(examples) / batch_size))]


def loss_of(model, examples: list[Example]) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens. Only those positions go through the LM head: the
    vocabulary is a quarter of a small model's work."""
    longest = max(len(example.ids) for example in examples)
    ids, real, answer = torch.zeros(3, len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, :len(example.ids)] = torch.tensor(example.ids)
        real[row, :len(example.ids)] = 1
        answer[row, example.question:len(example.ids)] = 1
    ids, real, answer = ids.to(model.device), real.to(model.device), answer.to(model.device).bool()

    hidden = model.base_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1][answer[:, 1:]])
    return F.cross_entropy(logits.float(), ids[:, 1:][answer[:, 1:]])


def train(model, examples: list[Example], args: argparse.Namespace, save) -> None:
    """AdamW, 3% linear warm-up, cosine to 0. `save` is called every --save-minutes."""
    batches = plan(examples, args.batch_size, args.epochs, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    print(f"{len(examples)} rows, {len(batches)} steps of {args.batch_size}, {model.device.type}, "
          f"{args.dtype}")
    began = saved = time.monotonic()
    tokens, losses = 0, []

    bar = tqdm(batches, unit="step", mininterval=2)
    for step, batch in enumerate(bar):
        done = max(step / len(batches), (time.monotonic() - began) / 60 / args.minutes)
        if done >= 1:
            print(f"--minutes {args.minutes:g} are over: stopped after {step} of {len(batches)} steps")
            break
        warm_up = (step + 1) / (0.03 * len(batches))
        rate = min(warm_up, 0.5 + 0.5 * math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = args.learning_rate * rate

        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = loss_of(model, [examples[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        losses.append(loss.item())
        tokens += sum(len(examples[i].ids) for i in batch)
        speed = tokens / (time.monotonic() - began)
        bar.set_postfix_str(f"loss {mean(losses[-20:]):.3f}, {speed:.0f} tokens/s", refresh=False)
        if time.monotonic() - saved > 60 * args.save_minutes:
            save()
            saved = time.monotonic()
    print(f"{tokens:,} tokens in {(time.monotonic() - began) / 60:.1f} minutes; "
          f"loss {mean(losses[:20]):.3f} -> {mean(losses[-20:]):.3f}")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def export(model, tokenizer, out: str, dtype: torch.dtype) -> None:
    """Write an ordinary model folder, complete or not at all: written beside, then renamed."""
    beside = f"{out}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    copy.deepcopy(model).to(dtype).save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    if os.path.exists(out):
        os.rename(out, f"{out}.old")
    os.rename(beside, out)
    shutil.rmtree(f"{out}.old", ignore_errors=True)


def python_slice(text: str) -> slice:
    start, _, stop = text.partition(":")
    return slice(int(start) if start else None, int(stop) if stop else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="folder of the model to start from")
    add("--data", required=True, help="JSONL rows with `question` and `answer` (GSM8K)")
    add("--out", required=True, help="folder to write the trained model to")
    add("--rows", type=python_slice, default=slice(None), help="a Python slice; ':-500': not the last 500")
    add("--instruction", help="text after the question, '' for none [the chat template's of data.py]")
    add("--epochs", type=POSITIVE_FLOAT, default=1.0, help="passes over the rows, also fractions [1]")
    add("--learning-rate", type=POSITIVE_FLOAT, default=1e-4, help="peak of the cosine schedule [1e-4]")
    add("--batch-size", type=POSITIVE_INT, default=16, help="rows per optimizer step [16]")
    add("--max-tokens", type=POSITIVE_INT, default=1024, help="leave out longer rows, counted [1024]")
    add("--dtype", choices=("fp32", "bf16"), default="fp32",
        help="arithmetic of forward and backward; the weights and AdamW stay fp32 [fp32]")
    add("--export-dtype", choices=("fp32", "bf16"), default="bf16",
        help="of the model that is written; bf16 rounds away what a small learning rate has changed [bf16]")
    add("--seed", type=INT, default=0, help="of the order of the rows [0]")
    add("--minutes", type=float, default=math.inf,
        help="stop after this long; the schedule then follows the clock if that is faster [never]")
    add("--save-minutes", type=float, default=15, help="write --out so often, and at the end [15]")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).train()
    try:
        examples = read(args, tokenizer)
    except ValueError as error:
        sys.exit(f"sft: {error}")
    largest = max(max(example.ids) for example in examples)
    if largest >= model.config.vocab_size:
        sys.exit(f"sft: the tokenizer gives token {largest}, the model has {model.config.vocab_size}")

    def save() -> None:
        export(model, tokenizer, args.out, torch.float32 if args.export_dtype == "fp32" else torch.bfloat16)

    train(model, examples, args, save)
    save()
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
