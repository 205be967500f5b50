"""Step pairs from GSM8K's solutions: a worked line as chosen, the same line with a wrong result as rejected.

    python bench/corrupted_pairs.py gsm8k_train.jsonl OUT.jsonl [--rows 1000] [--eval-rows 100]

They have the text and the lengths of real step pairs and cost nothing, so they serve to try the trainer and
to time it. They are no substitute for `python -m pairs build`: the model wrote neither step, and a corrupted
number is easier to spot than a wrong thought. The last 500 rows of the file are left alone; `--eval-rows` of
those before them go to OUT.eval.jsonl.
"""

import argparse
import json
import random
import re

RESULT = re.compile(r"=\s*\$?(\d[\d,]*)(?!\.?\d)")  # a whole number behind an equals sign


def make_pair(question: str, worked: str, rng: random.Random) -> dict | None:
    """One pair from a random line that ends in a calculation; None if the solution has no such line."""
    solution, answer = worked.split("####")
    lines = [re.sub(r"<<.*?>>", "", line).strip() for line in solution.strip().splitlines()]
    calculations = [i for i, line in enumerate(lines) if RESULT.search(line)]
    if not calculations:
        return None

    k = rng.choice(calculations)
    result = list(RESULT.finditer(lines[k]))[-1]
    value = int(result[1].replace(",", ""))
    wrong = value + rng.choice([d for d in (-10, -2, -1, 1, 2, 10) if value + d > 0])
    chosen = f" {lines[k]}"
    rejected = f" {lines[k][:result.start(1)]}{wrong}{lines[k][result.end(1):]}"

    steps = [f"Step {i}: {line}" for i, line in enumerate(lines, 1)]
    rest = "\n".join(["", *steps[k + 1:], f"The answer is: {answer.strip()}"])
    return {"dataset": "gsm8k-corrupted", "prompt": question,
            "initial_reason_steps": "\n".join(["Let's think step by step.", *steps[:k], f"Step {k + 1}:"]),
            "chosen": chosen, "rejected": rejected,
            "full_chosen": chosen + rest, "full_rejected": rejected + rest, "answer": answer.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", help="gsm8k_train.jsonl: fields question and answer")
    parser.add_argument("out", help="the pairs, .jsonl")
    parser.add_argument("--rows", type=int, default=1000, help="pairs to make [1000]")
    parser.add_argument("--eval-rows", type=int, default=100,
                        help="held-out pairs to make, into OUT.eval.jsonl [100]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng, pairs = random.Random(args.seed), []
    with open(args.problems) as file:
        problems = [json.loads(line) for line in file][:-500]
    for row in problems:
        pair = make_pair(row["question"], row["answer"], rng)
        if pair:
            pairs.append(pair)

    eval_out = args.out.removesuffix(".jsonl") + ".eval.jsonl"
    for path, part in ((args.out, pairs[:args.rows]), (eval_out, pairs[len(pairs) - args.eval_rows:])):
        with open(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
        print(f"{len(part):,} pairs -> {path}")


if __name__ == "__main__":
    main()
