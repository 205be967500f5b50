#!/usr/bin/env python3
"""Makes everything in demo/ from nothing: problems, a model that solves about half of them, its step pairs.

    python demo/make.py                               # 20 minutes on 2 cores of an AMD EPYC
    python demo/make.py --problems problems.jsonl     # only the problems that pairs are made of, in seconds

1. 48,000 word problems of 2 to 5 dependent steps with worked solutions, 6,000 others to make pairs of, and
   500 to test on. No problem is in two sets.
2. A Qwen2 of 1.3M random parameters learns the worked solutions (demo/sft.py, 1,500 steps of 32). Some of
   these are wrong, as what a language model learns from is: people overlook the "each" in "9 pens to each of
   4 friends" and add where "fewer" asks for a difference, and so do the solutions, in 3 of 5 such places.
   The rest of the model's errors are arithmetic that it has not learned yet.
3. Step pairs out of the model's own samples (python -m pairs build). Nobody tells which step is wrong: only
   the final answers are known. The pairs of the last 300 problems are held out for evaluation.

Run twice on one machine it gives the same bytes. (demo/pairs.jsonl has the same pairs in another order: that
in which an earlier version wrote them.) Another kind of processor or version of torch rounds otherwise, and
so gives another model.
"""

import argparse
import json
import os
import random
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HERE = os.path.join(ROOT, "demo")
NAMES = "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jack Kim Leo Mia Nora Omar Pia Rosa Sam Tara Vera".split()
ITEMS = "pens apples books coins cards shells stamps beads cookies marbles stickers eggs".split()
SEED, SIZES = 0, dict(train=48000, test=500, problems=6000)
HELD_OUT = 300  # the last of the problems: their pairs are for evaluation
EVENTS = "buys loses loses friends packs half double".split()
# Where a solution that is taught may overlook "each" or "fewer", and how often it does.
SLIPS, SLIP_RATE = ("friends", "packs", "fewer"), 0.6
QWEN2_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# ------------------------------------------------------------------------------------------------ problems
# A problem is a list of moves (kind, a, k) that change how many items somebody has. `told` puts a move into
# the problem's words, `step` into the solution's, for the x items there are at that point.


def told(move: tuple, name: str, friend: str, item: str) -> str:
    kind, a, k = move
    return {"has": f"{name} has {a} {item}.",
            "boxes": f"{name} has {k} boxes with {a} {item} in each.",
            "buys": f"{name} buys {a} more {item}.",
            "loses": f"{name} loses {a} {item}.",
            "friends": f"{name} gives {a} {item} to each of {k} friends.",
            "packs": f"{name} buys {k} bags with {a} {item} in each.",
            "half": f"{name} sells half of the {item}.",
            "double": f"Then {name} has twice as many {item}.",
            "price": f"{name} sells all {item} for {k} dollars each. How many dollars does {name} get?",
            "bags": f"{name} puts all {item} in bags of {k}. How many bags does {name} fill?",
            "count": f"How many {item} does {name} have now?",
            "more": f"{friend} has {a} more {item} than {name}.",
            "fewer": f"{friend} has {a} fewer {item} than {name}.",
            "times": f"{friend} has twice as many {item} as {name}.",
            "together": f"How many {item} do {name} and {friend} have together?"}[kind]


def step(move: tuple, x: int, z: int, slip: bool, name: str, friend: str,
         item: str) -> tuple[str, str, int, int]:
    """(the step as it is taught, the step in other words, x and z after it): name has x items, the friend z.
    With `slip` what is taught is wrong as people get it wrong: see SLIPS."""
    kind, a, k = move
    n = a if slip else k * a
    times = f"{a}" if slip else f"{k}*{a}={n}"
    match kind:
        case "boxes":
            return (f"{name} starts with {k}*{a}={n} {item}.",
                    f"{k} boxes with {a} {item} in each are {a}*{k}={n}.", n, z)
        case "buys":
            return (f"After buying more, {name} has {x}+{a}={x + a} {item}.",
                    f"{name} buys {a} more, so there are {a}+{x}={x + a} {item} now.", x + a, z)
        case "loses":
            return (f"After the loss, {name} has {x}-{a}={x - a} {item}.",
                    f"{name} loses {a}, so {x}-{a}={x - a} {item} are left now.", x - a, z)
        case "friends":
            return (f"{name} gives away {times} and keeps {x}-{n}={x - n} {item}.",
                    f"{k} friends with {a} each are {a}*{k}={n}, so {x}-{n}={x - n} {item} are left now.",
                    x - n, z)
        case "packs":
            return (f"The bags hold {times}, so {name} has {x}+{n}={x + n} {item}.",
                    f"{k} bags with {a} each are {a}*{k}={n}, so there are {n}+{x}={x + n} {item} now.",
                    x + n, z)
        case "half":
            return (f"Half of them are sold, so {x}/2={x // 2} {item} are left.",
                    f"{name} sells half, so {name} keeps {x}/2={x // 2} {item}.", x // 2, z)
        case "double":
            return (f"Now {name} has 2*{x}={2 * x} {item}.",
                    f"As there are twice as many now, {name} has {x}*2={2 * x} {item}.", 2 * x, z)
        case "price":
            return (f"{name} gets {x}*{k}={x * k} dollars.",
                    f"{x} {item} for {k} dollars each are {k}*{x}={x * k} dollars.", x * k, z)
        case "bags":
            return (f"{name} fills {x}/{k}={x // k} bags.",
                    f"{x} {item} in bags of {k} are {x}/{k}={x // k} bags.", x // k, z)
        case "more":
            return (f"{friend} has {x}+{a}={x + a} {item}.",
                    f"{a} more than {x} are {a}+{x}={x + a}.", x, x + a)
        case "fewer":
            sign, z = ("+", x + a) if slip else ("-", x - a)
            return f"{friend} has {x}{sign}{a}={z} {item}.", f"{a} fewer than {x} are {x}-{a}={x - a}.", x, z
        case "times":
            return f"{friend} has 2*{x}={2 * x} {item}.", f"twice {x} are {x}*2={2 * x}.", x, 2 * x
        case "together":
            return (f"Together they have {x}+{z}={x + z} {item}.",
                    f"{name} and {friend} have {z}+{x}={x + z} {item} together.", x + z, z)
    raise ValueError(f"kind must be that of a step, got {kind!r}")


def possible(move: tuple, x: int, z: int) -> bool:
    """Whether the move comes out even, above zero and in small numbers."""
    kind, a, k = move
    return {"buys": x + a < 100, "loses": a < x, "friends": k * a < x,
            "packs": x + k * a < 100, "half": x % 2 == 0, "double": x < 50, "price": x * k < 200,
            "bags": x % k == 0, "more": x + a < 100, "fewer": a < x, "times": x < 50}.get(kind, True)


def solution(moves: list[tuple], who: tuple, slips: random.Random | None = None) -> list[tuple] | None:
    """The steps of the moves; with `slips` some are wrong. None if a move is not possible."""
    x, z, steps = moves[0][1], 0, []
    for move in moves[1:] if moves[0][0] == "has" else moves:
        if not possible(move, x, z):
            return None
        slip = slips is not None and move[0] in SLIPS and slips.random() < SLIP_RATE
        *texts, x, z = step(move, x, z, slip, *who)
        steps.append((*texts, x))
    return steps


def problem(rng: random.Random) -> dict:
    """A problem of 2-5 dependent steps: prompt and answer; its right steps, and the same in `other` words;
    and the steps of a solution as it is taught, with slips, and their answer."""
    *who, other = rng.sample(NAMES, 3)
    item, unrelated = rng.sample(ITEMS, 2)
    who = (*who, item)

    def move(*kinds: str) -> tuple[str, int, int]:
        kind = rng.choice(kinds)
        low, high = (2, 9) if kind in ("friends", "packs", "boxes") else (3, 40)
        return kind, rng.randint(low, high), rng.randint(2, 5)

    while True:
        length, end = rng.randint(2, 5), rng.choice(("count", "price", "bags", "together", "together"))
        moves = [move("boxes", "boxes", "has")] if end != "together" or length > 2 else [move("has")]
        ending = [move("more", "fewer", "fewer", "times")] if end == "together" else []
        ending.append(move(end))
        events = length - (moves[0][0] == "boxes") - len(ending) + (end == "count")
        moves += [move(*EVENTS) for _ in range(events)] + ending
        counted = [move for move in moves if move[0] != "count"]
        steps, taught = solution(counted, who), solution(counted, who, rng)
        if events >= 0 and steps and taught:
            break
    text = [told(move, *who) for move in moves]
    if rng.random() < 0.3:  # a number that must not be used
        text.insert(1, f"{other} has {rng.randint(2, 99)} {unrelated}.")
    return dict(prompt=" ".join(text), answer=str(steps[-1][2]), steps=[own for own, _, _ in steps],
                other=[reworded for _, reworded, _ in steps], taught=[own for own, _, _ in taught],
                taught_answer=str(taught[-1][2]))


def problem_sets(seed: int, **counts: int) -> dict[str, list[dict]]:
    """Sets of problems by name, as many as SIZES and `counts` say. No problem is in two sets, and a set does
    not depend on those asked for after it."""
    seen, sets = set(), {}
    for name, count in (SIZES | counts).items():
        rng, sets[name] = random.Random(f"{name} {seed}"), []
        while len(sets[name]) < count:
            row = problem(rng)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                sets[name].append(row)
    return sets


# --------------------------------------------------------------------------------------- model and its pairs


def worked(row: dict) -> str:
    """The solution that is taught, in the format that demo/sft.py reads (GSM8K's)."""
    return "\n".join([*row["taught"], f"#### {row['taught_answer']}"])


def new_model(folder: str, rows: list[dict]) -> None:
    """A random Qwen2 of 1.3M parameters, and a tokenizer in which words and digits are single tokens: merges
    learned on the problems behind Qwen2's pre-tokenizer, which transformers gives every Qwen2 anyway."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=20, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False)
    frame = "user\nassistant\nLet's think step by step.\nStep 1:\nThe answer is: "
    tokenizer.train_from_iterator(("\n".join([row["prompt"], worked(row), frame]) for row in rows), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, chat_template=CHAT)
    fast.save_pretrained(folder)
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=-(-len(fast) // 64) * 64, hidden_size=160, intermediate_size=480, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def run(threads: int, *command: str) -> None:
    """On the CPU, whatever is there: results depend on the device, and in the last bits on the threads."""
    print("+ python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT,
                   env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)})


def write(path: str, rows: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def only(rows: list[dict], *names: str) -> list[dict]:
    return [{name: row[name] for name in names} for row in rows]


def make_pairs(model: str, problems: str, work: str) -> list[dict]:
    run(1, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "pairs", "build", "@demo/build_args",
        "--model", model, "--problems", problems, "--seed", str(SEED), "--out", f"{work}/build")
    return read(f"{work}/build/pairs.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE, help="folder to write to (default: this one)")
    parser.add_argument("--work", default=os.path.join(ROOT, "runs/make"),
                        help="folder for what lies in between (default: runs/make)")
    parser.add_argument("--problems", metavar="FILE", help="write the problems to FILE, and nothing else")
    args = parser.parse_args()
    sets = problem_sets(SEED)
    if args.problems:
        write(args.problems, only(sets["problems"], "prompt", "answer"))
        return

    work, out = os.path.abspath(args.work), os.path.abspath(args.out)
    if os.path.exists(work):  # the stages would go on from what they find there
        sys.exit(f"make: {work} is there already; remove it, or choose another --work")
    os.makedirs(work)
    os.makedirs(out, exist_ok=True)
    taught = [{"question": row["prompt"], "answer": worked(row)} for row in sets["train"]]
    write(f"{work}/train.jsonl", taught)
    write(f"{work}/problems.jsonl", only(sets["problems"], "prompt", "answer"))
    write(f"{out}/test.jsonl", only(sets["test"], "prompt", "answer"))

    new_model(f"{work}/random", sets["train"][:4000])
    run(2, "demo/sft.py", "--model", f"{work}/random", "--data", f"{work}/train.jsonl", "--instruction", "",
        "--learning-rate", "2e-3", "--batch-size", "32", "--seed", str(SEED), "--out", f"{out}/model")
    pairs = make_pairs(f"{out}/model", f"{work}/problems.jsonl", work)
    held_out = {row["prompt"] for row in sets["problems"][-HELD_OUT:]}
    write(f"{out}/pairs.jsonl", [pair for pair in pairs if pair["prompt"] not in held_out])
    write(f"{out}/eval_pairs.jsonl", [pair for pair in pairs if pair["prompt"] in held_out])


if __name__ == "__main__":
    main()
