#!/usr/bin/env python3
"""Makes everything in demo/ from nothing: problems, a model that solves about half of them, its step pairs.

    python demo/make.py                               # 50 minutes on 2 cores of an AMD EPYC
    python demo/make.py --problems problems.jsonl     # only the problems that pairs are made of, in seconds

1. 24,000 word problems of 6 to 12 dependent steps with worked solutions, 1,200 others to make pairs of, and
   500 to test on. No problem is in two sets. Each step is worded in one of several ways, often with a filler
   before it or a remark behind it.
2. A Qwen2 of 1.3M random parameters learns the worked solutions (demo/sft.py). Some of these are wrong, as
   what a language model learns from is: people overlook the "apiece" in "gives 4 friends 9 pens apiece" and
   add where "fewer" asks for a difference, and so do the solutions, in 3 of 5 such places. But such wording
   is rare (TEMPTING), as the errors of a strong model are: a wrong solution mostly holds a single one.
   The rest of the model's errors are arithmetic that it has not learned yet.
3. Step pairs out of the model's own samples (python -m pairs build). Nobody tells which step is wrong: only
   the final answers are known. The pairs of the last 150 problems are held out for evaluation.

Run twice on one machine it gives the same bytes. Another kind of processor or version of torch rounds
otherwise, and so gives another model.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HERE = os.path.join(ROOT, "demo")
sys.path.insert(0, ROOT)
from pairs.problems import find_steps  # noqa: E402

NAMES = "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jack Kim Leo Mia Nora Omar Pia Rosa Sam Tara Vera".split()
ITEMS = "pens apples books coins cards shells stamps beads cookies marbles stickers eggs".split()
SEED, SIZES = 0, dict(train=24000, test=500, problems=1200)
HELD_OUT = 150  # the last of the problems: their pairs are for evaluation
STEPS = 6, 12   # of a problem, at least and at most
TEMPTING, SLIP_RATE = 0.15, 0.6  # shares: of the wordings that tempt, of the steps that slip there
NEW_TOKENS = "320"  # of an answer, at most, as in demo/build_args
QWEN2_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

# ------------------------------------------------------------------------------------------------ problems
# A problem is a list of moves (kind, a, k), each of which changes how many items somebody has.

TOLD = {"boxes": "{name} has {k} boxes with {a} {item} in each.",
        "buys": "{name} buys {a} more {item}.",
        "loses": "{name} loses {a} {item}.",
        "friends": "{name} gives {a} {item} to each of {k} friends.",
        "bags": "{name} buys {k} bags with {a} {item} in each.",
        "half": "{name} sells half of the {item}.",
        "double": "Then {name} has twice as many {item}.",
        "count": "How many {item} does {name} have now?",
        "price": "{name} sells all {item} for {k} dollars each. How many dollars does {name} get?"}
# The same in words that tempt to overlook something, and the sign of the sum x + a or x - a that a slip is.
TEMPTING_TOLD = {"buys": "{a} {item} come back to {name}.",
                 "loses": "Then {name} has {a} fewer {item}.",
                 "friends": "{name} gives {k} friends {a} {item} apiece.",
                 "bags": "{name} buys {k} bags of {a} {item}."}
SLIPS = {"buys": "-", "loses": "+", "friends": "-", "bags": "+"}
EVENTS = "buys loses friends bags half double".split()

# Words of a step around its sum, those of no model, and what may stand before and behind any step.
AFTER = {"boxes": "at first", "buys": "after buying", "loses": "after the loss", "friends": "after giving",
         "bags": "with the bags", "half": "after selling", "double": "after doubling", "price": "in dollars"}
WORDINGS = ("{name} has {sum} {item} {after}.", "{after} that makes {sum} {item}.",
            "{after} {name} is at {sum}.", "{sum} {item} {after}.")
FOREIGN = "{name} counts again: {sum}, as everybody can see."
FILLERS = ("", "", "", "well, ", "next, ", "now ")
REMARKS = ("", "", "", "", " Good.", " We go on from there.", " That was easy.")


class Move(NamedTuple):
    kind: str
    a: int
    k: int
    tempting: bool  # whether it is told in tempting words


def sum_of(move: Move, x: int, slip: bool) -> tuple[str, int]:
    """(the sum that a move makes of x items, its result). With `slip` it is wrong, as people get it wrong."""
    kind, a, k, _ = move
    if slip:
        y = x + a if SLIPS[kind] == "+" else x - a
        return f"{x}{SLIPS[kind]}{a}={y}", y
    match kind:
        case "boxes":
            return f"{k}*{a}={k * a}", k * a
        case "buys":
            return f"{x}+{a}={x + a}", x + a
        case "loses":
            return f"{x}-{a}={x - a}", x - a
        case "friends":
            return f"{x}-{k}*{a}={x}-{k * a}={x - k * a}", x - k * a
        case "bags":
            return f"{x}+{k}*{a}={x}+{k * a}={x + k * a}", x + k * a
        case "half":
            return f"{x}/2={x // 2}", x // 2
        case "double":
            return f"2*{x}={2 * x}", 2 * x
        case "price":
            return f"{k}*{x}={k * x}", k * x
    raise ValueError(f"kind must be that of a step, got {kind!r}")


def sums(moves: list[Move], slips: random.Random | None = None) -> list[tuple[str, int]] | None:
    """The sums of all moves and their results; with `slips` some are wrong. None if one of them does not come
    out even, above zero and small."""
    x, found = 0, []
    for move in moves:
        slip = slips is not None and move.tempting and slips.random() < SLIP_RATE
        if move.kind == "half" and x % 2:
            return None
        text, x = sum_of(move, x, slip)
        if not 0 < x < (400 if move.kind == "price" else 100):
            return None
        found.append((text, x))
    return found


def worded(moves: list[Move], sums: list[tuple[str, int]], who: dict, rng: random.Random) -> list[str]:
    """Steps as they are taught: each in one of several wordings, some with a filler or a remark."""
    steps = []
    for move, (text, _) in zip(moves, sums, strict=True):
        words = rng.choice(WORDINGS).format(sum=text, after=AFTER[move.kind], **who)
        words = rng.choice(FILLERS) + words
        steps.append(words[0].upper() + words[1:] + rng.choice(REMARKS))
    return steps


def problem(rng: random.Random, tempting: float = TEMPTING) -> dict:
    """A problem of STEPS dependent steps: prompt and answer; the results of its right steps, and which moves
    tempt; the right steps, and in foreign words; a solution as it is taught, with slips, and its answer."""
    who = dict(name=rng.choice(NAMES), item=rng.choice(ITEMS))

    def move(kind: str) -> Move:
        a = rng.randint(2, 9) if kind in ("friends", "bags", "boxes") else rng.randint(2, 15)
        return Move(kind, a, rng.randint(2, 5), kind in SLIPS and rng.random() < tempting)

    length, has_price = rng.randint(*STEPS), rng.random() < 0.5
    while True:
        events = [rng.choice(EVENTS) for _ in range(length - 1 - has_price)]
        moves = [move(kind) for kind in ["boxes", *events, *["price"] * has_price]]
        right, taught = sums(moves), sums(moves, rng)
        if right and taught:
            break
    told = [(TEMPTING_TOLD if move.tempting else TOLD)[move.kind].format(a=move.a, k=move.k, **who)
            for move in moves]
    if not has_price:
        told.append(TOLD["count"].format(**who))
    return dict(prompt=" ".join(told), answer=str(right[-1][1]), results=[y for _, y in right],
                tempting=[move.tempting for move in moves],
                steps=worded(moves, right, who, rng),
                foreign=[FOREIGN.format(sum=text, **who) for text, _ in right],
                taught=worded(moves, taught, who, rng), taught_answer=str(taught[-1][1]))


def problem_sets(seed: int, tempting: float = TEMPTING, **counts: int) -> dict[str, list[dict]]:
    """Sets of problems by name, as many as SIZES and `counts` say. No problem is in two sets, and a set does
    not depend on those asked for after it."""
    seen, sets = set(), {}
    for name, count in (SIZES | counts).items():
        rng, sets[name] = random.Random(f"{name} {seed} {tempting}"), []
        while len(sets[name]) < count:
            row = problem(rng, tempting)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                sets[name].append(row)
    return sets


def results_of(solution: str) -> list[int | None]:
    """What each numbered step of a solution comes to: the last result in it, whatever its words."""
    found = [re.findall(r"=(\d+)", step.text) for step in find_steps(solution) or []]
    return [int(numbers[-1]) if numbers else None for numbers in found]


def first_wrong(solution: str, results: list[int]) -> int:
    """The first step of a wrong solution that does not come to what it should, or should not be there."""
    found = results_of(solution)
    for k, (number, should_be) in enumerate(zip(found, results, strict=False), 1):
        if number != should_be:
            return k
    return min(len(found), len(results) + 1)


# --------------------------------------------------------------------------------------- model and its pairs


def worked(row: dict) -> str:
    """The solution that is taught, in the format that demo/sft.py reads (GSM8K's)."""
    return "\n".join([*row["taught"], f"#### {row['taught_answer']}"])


def new_model(folder: str, rows: list[dict]) -> None:
    """A random Qwen2 of 1.3M parameters, and a tokenizer in which words and digits are single tokens: merges
    learned on the problems behind Qwen2's pre-tokenizer, which transformers gives every Qwen2 anyway."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from runtime import hub_kernels
    hub_kernels.keep_out()
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


def build_pairs(model: str, problems: str, out: str, *flags: str) -> list[dict]:
    run(1, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "pairs", "build", "@demo/build_args",
        "--model", model, "--problems", problems, "--out", out, *flags)
    path = f"{out}/pairs.jsonl"
    return read(path) if os.path.exists(path) else []  # `--by human` ends before there are any


def score(folder: str, problems: list[dict]) -> None:
    """Print how many of the steps that `pairs build --out folder` located are the first wrong ones."""
    results = {row["prompt"]: row["results"] for row in problems}
    rows = [row for row in read(f"{folder}/located_by_rollouts.jsonl") if row["step"]]
    exact = sum(row["step"] == first_wrong(row["solution"], results[row["prompt"]]) for row in rows)
    certainty = sum(row["certainty"] for row in rows) / len(rows)
    print(f"{exact} of {len(rows)} located steps ({exact / len(rows):.1%}) are the first wrong ones; "
          f"certainty {certainty:.1%} on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE, help="folder to write to (default: this one)")
    parser.add_argument("--work", default=os.path.join(ROOT, "runs/make"),
                        help="folder for what lies in between (default: runs/make)")
    parser.add_argument("--problems", metavar="FILE", help="write the problems to FILE, and nothing else")
    parser.add_argument("--score", metavar="DIR", help="score the located steps in DIR, and nothing else")
    parser.add_argument("--round", type=int, default=1, metavar="N",
                        help="problems of the N-th round (demo/rounds.sh), all different [1]")
    args = parser.parse_args()
    later = {f"problems {n}": SIZES["problems"] for n in range(2, args.round + 1)}
    sets = problem_sets(SEED, **later)
    problems = sets["problems" if args.round == 1 else f"problems {args.round}"]
    if args.problems:
        return write(args.problems, only(problems, "prompt", "answer"))
    if args.score:
        return score(args.score, problems)

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
        "--learning-rate", "2e-3", "--batch-size", "16", "--seed", str(SEED),
        "--out", f"{out}/model")
    pairs = build_pairs(f"{out}/model", f"{work}/problems.jsonl", f"{work}/build")
    score(f"{work}/build", problems)
    held_out = {row["prompt"] for row in sets["problems"][-HELD_OUT:]}
    write(f"{out}/pairs.jsonl", [pair for pair in pairs if pair["prompt"] not in held_out])
    write(f"{out}/eval_pairs.jsonl", [pair for pair in pairs if pair["prompt"] in held_out])


if __name__ == "__main__":
    main()
