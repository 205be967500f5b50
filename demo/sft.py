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

    python bench/sft.py --model MODEL --data gsm8k_train.jsonl --rows :-500 --out OUT

Any causal LM folder with a chat template works, randomly initialised ones too. Rows carry `question` and
`answer`, the answer one step per line and ending in `#### N` (GSM8K); marks like `<<48/2=24>>` are removed.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import time
from statistics import mean

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402


def steps_of(row: dict, where: str) -> str:
    """GSM8K's worked solution as `Step k:` lines. Raises ValueError naming a row that is not of that form."""
    if not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise ValueError(f'{where}: needs the string fields "question" and "answer"')
    work, mark, final = row["answer"].rpartition("####")
    lines = [line.strip() for line in re.sub(r"<<.*?>>", "", work).splitlines() if line.strip()]
    if not mark or not lines or not final.strip():
        raise ValueError(f'{where}: "answer" is not worked lines followed by "#### N"')
    numbered = [f"Step {k}: {line}" for k, line in enumerate(lines, 1)]
    return "\n".join(["Let's think step by step.", *numbered, f"The answer is: {final.strip()}"])


def encode(tokenizer, row: dict, where: str, instruction: str = data.INSTRUCTION) -> tuple[list[int], int]:
    """(token ids of the whole conversation, how many of them are the question, which carries no loss)."""
    opened = data.open_turn(tokenizer, row["question"], "chat", instruction)
    question, whole = tokenizer([opened, opened + steps_of(row, where)], add_special_tokens=False).input_ids
    return whole + [tokenizer.eos_token_id], len(question)


def read(path: str, rows: slice, tokenizer, instruction: str, max_tokens: int) -> list[tuple[list[int], int]]:
    with open(path, encoding="utf-8") as file:
        lines = [(f"{path}:{n}", line) for n, line in enumerate(file, 1) if line.strip()][rows]
    items = [encode(tokenizer, json.loads(line), where, instruction) for where, line in lines]
    kept = [item for item in items if len(item[0]) <= max_tokens]
    if not kept:
        raise ValueError(f"{path}: no rows left of {len(items)}; check --rows and --max-tokens {max_tokens}")
    if len(kept) < len(items):
        print(f"{len(items) - len(kept)} of {len(items)} rows are longer than {max_tokens} tokens: left out")
    return kept


def plan(items: list, batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """Batches of row numbers in training order. Rows of similar length share a batch, so little is padding:
    each epoch is shuffled, cut into pools of 50 batches and sorted in each; then the batches are shuffled."""
    rng, batches = random.Random(seed), []
    for _ in range(math.ceil(epochs)):
        order = rng.sample(range(len(items)), len(items))
        pools = [order[i : i + 50 * batch_size] for i in range(0, len(order), 50 * batch_size)]
        order = [i for pool in pools for i in sorted(pool, key=lambda i: len(items[i][0]))]
        epoch = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        batches += rng.sample(epoch, len(epoch))
    return batches[: math.ceil(epochs * math.ceil(len(items) / batch_size))]


def loss_of(model, items: list[tuple[list[int], int]]) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens. Only those positions go through the LM head: the
    vocabulary is a quarter of a small model's work."""
    longest = max(len(ids) for ids, _ in items)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in items], device=model.device)
    real = [[1] * len(row) + [0] * (longest - len(row)) for row, _ in items]
    real = torch.tensor(real, device=model.device)
    start = torch.tensor([[begin] for _, begin in items], device=model.device)
    answer = real.bool() & (torch.arange(longest, device=model.device) >= start)
    hidden = model.base_model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1][answer[:, 1:]])
    return F.cross_entropy(logits.float(), ids[:, 1:][answer[:, 1:]])


def export(model, tokenizer, out: str, dtype: torch.dtype) -> None:
    """Write an ordinary model folder, complete or not at all: written beside, then renamed into place."""
    beside = f"{out}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    state = model.state_dict()
    once = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}  # tied weights only once
    model.save_pretrained(beside, state_dict={name: state[name].to(dtype) for name in once.values()})
    tokenizer.save_pretrained(beside)
    with open(f"{beside}/config.json", encoding="utf-8") as file:
        config = {**json.load(file), "dtype": str(dtype).removeprefix("torch.")}
    with open(f"{beside}/config.json", "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
    if os.path.exists(out):
        os.rename(out, f"{out}.old")
    os.rename(beside, out)
    shutil.rmtree(f"{out}.old", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder of the model to start from")
    parser.add_argument("--data", required=True, help="JSONL rows with `question` and `answer` (GSM8K)")
    parser.add_argument("--out", required=True, help="folder to write the trained model to")
    parser.add_argument("--rows", default=":", help="a Python slice; ':-500' is all but the last 500")
    parser.add_argument("--instruction", default=data.INSTRUCTION,
                        help="text after the question, '' for none")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the rows; fractions allowed")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak of the cosine schedule")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per optimizer step")
    parser.add_argument("--max-tokens", type=int, default=1024, help="leave out (and count) longer rows")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32",
                        help="arithmetic of forward and backward; the weights and AdamW stay fp32")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="stop after this long; the schedule then follows the clock if that is faster")
    parser.add_argument("--save-minutes", type=float, default=15, help="write --out so often, and at the end")
    args = parser.parse_args()

    bounds = [int(part) if part else None for part in args.rows.split(":")]
    if len(bounds) != 2 or args.epochs <= 0 or args.batch_size < 1:
        parser.error("--rows is START:STOP, --epochs and --batch-size are positive")
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).train()
    try:
        items = read(args.data, slice(*bounds), tokenizer, args.instruction, args.max_tokens)
    except ValueError as error:
        sys.exit(f"sft: {error}")
    if (largest := max(max(ids) for ids, _ in items)) >= model.config.vocab_size:
        sys.exit(f"sft: the tokenizer gives token {largest}, the model has {model.config.vocab_size}")
    batches = plan(items, args.batch_size, args.epochs, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    print(f"{len(items)} rows, {len(batches)} steps of {args.batch_size}, {device}, {args.dtype}")

    began = saved = time.monotonic()
    tokens, history = 0, []
    bar = tqdm(batches, unit="step", mininterval=2)
    for step, batch in enumerate(bar):
        done = max(step / len(batches), (time.monotonic() - began) / 60 / args.minutes)
        if done >= 1:
            print(f"--minutes {args.minutes:g} are over: stopped after {step} of {len(batches)} steps")
            break
        # Linear warm-up over 3% of the steps, then cosine to 0.
        rate = min((step + 1) / (0.03 * len(batches)), 0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = loss_of(model, [items[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(loss.item())
        tokens += sum(len(items[i][0]) for i in batch)
        speed = tokens / (time.monotonic() - began)
        bar.set_postfix_str(f"loss {mean(history[-20:]):.3f}, {speed:.0f} tokens/s", refresh=False)
        if time.monotonic() - saved > 60 * args.save_minutes:
            export(model, tokenizer, args.out, torch.bfloat16)
            saved = time.monotonic()
    export(model, tokenizer, args.out, torch.bfloat16)
    print(f"{tokens:,} tokens in {(time.monotonic() - began) / 60:.1f} minutes; "
          f"loss {mean(history[:20]):.3f} -> {mean(history[-20:]):.3f}; wrote {args.out}")


if __name__ == "__main__":
    main()
