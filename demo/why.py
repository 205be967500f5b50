#!/usr/bin/env python3
"""Why does supervised training on chosen solutions beat Step-DPO on the demo? Rows of a table, each by name.

    python demo/why.py step sft moves                     # these rows, judged on the test problems
    python demo/why.py moves@3e-5 moves@6e-5 --on dev     # learning rates, by the development problems
    python demo/why.py --tokens step sft                  # which tokens became more likely, which less
    python demo/why.py --help                             # all rows

Every row is trained for as many optimizer steps as demo/args has, in batches of a twelfth of its data: so no
row sees its data more often than another. Rows that go on from another's model start from that of the first
seed. Runs that are there are not repeated.
"""

import argparse
import difflib
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import claims
import make
import torch
from errors import first_errors
from transformers import AutoModelForCausalLM

import data
from bench.common import environment, write
from pairs.problems import find_steps
from runtime.commands import run_command
from runtime.files import content_key, lock
from runtime.rows import read_rows
from runtime.templates import read_tokenizer
from runtime.weights import model_identity


class Row(NamedTuple):
    title: str
    data: str        # a name of `prepare`'s
    rate: str        # the best of 3e-5 and 6e-5, by the development problems
    flags: str = ""  # of stepdpo.py; rows of solutions are trained by sft.py
    start: str = ""  # the row whose model it starts from, and makes fresh pairs with; "": the demo's model


ALONE = "--beta 1e-6 --nll-weight 1"  # the preference weighs nothing: supervised on the chosen spans alone
ROWS = {
    "sft": Row("supervised, chosen solutions", "solutions", "6e-5"),
    "step": Row("Step-DPO", "pairs", "3e-5"),
    "step-nll": Row("Step-DPO + NLL 1", "pairs", "3e-5", "--nll-weight 1"),
    "chosen": Row("supervised, chosen steps alone", "pairs", "6e-5", ALONE),
    # The rejected steps are the chosen ones with the wrong sums in them, so both have the same words.
    "twins": Row("Step-DPO, rejected in the words of chosen", "twins", "3e-5"),
    # All tempting moves of the chosen solutions.
    "moves": Row("Step-DPO, all tempting moves", "moves", "3e-5"),
    "moves-nll": Row("Step-DPO + NLL 1, all tempting moves", "moves", "3e-5", "--nll-weight 1"),
    "moves-twins": Row("Step-DPO, all tempting moves, same words", "move_twins", "3e-5"),
    "moves-chosen": Row("supervised, chosen steps of all tempting moves", "moves", "6e-5", ALONE),
    # The paper's order: supervised training first, then pairs of the model that comes out of it.
    "sft-step": Row("supervised, then Step-DPO on its own pairs", "fresh pairs", "3e-5", "", "sft"),
    "sft-step-nll": Row("the same + NLL 1", "fresh pairs", "3e-5", "--nll-weight 1", "sft"),
    "sft-sft": Row("supervised, then supervised on these pairs' chosen solutions", "fresh solutions", "6e-5",
                   "", "sft"),
    "sft-again": Row("supervised, then supervised on the same solutions again", "solutions", "6e-5", "",
                     "sft"),
    # Rounds, each with pairs of the last one's model.
    "round2": Row("Step-DPO, round 2", "fresh pairs", "3e-5", "", "step"),
    "round3": Row("Step-DPO, round 3", "fresh pairs", "3e-5", "", "round2"),
    "round2-nll": Row("Step-DPO + NLL 1, round 2", "fresh pairs", "3e-5", "--nll-weight 1", "step-nll"),
    "round3-nll": Row("Step-DPO + NLL 1, round 3", "fresh pairs", "3e-5", "--nll-weight 1", "round2-nll"),
}

# ----------------------------------------------------------------------------------------- what is trained on


SUM, ANSWER = re.compile(r"\d+[-+*/][-+*/=\d]*=\d+"), re.compile(r"(?<=\nThe answer is: )\d+")


def twins(pairs: list[dict]) -> list[dict]:
    """The pairs, the rejected step in the words of the chosen one: with its sum alone, and the answer if it is
    the last. Steps without one clear sum stay as they are."""
    rows = []
    for pair in pairs:
        twin = pair["chosen"]
        for pattern in (SUM, ANSWER):
            there, wrong = pattern.findall(twin), pattern.findall(pair["rejected"])
            twin = pattern.sub(wrong[0], twin) if len(there) == len(wrong) == 1 else twin
        rows.append({**pair, "rejected": twin if twin != pair["chosen"] else pair["rejected"]})
    return rows


def slipped(step: str) -> str | None:
    """A right step of a tempting move as people get it wrong, in the same words: k bags of a, and a comes on
    top; a fewer, and a comes on top; a come back, and a is gone. None where the slip comes to nothing or too
    much, which no model is taught."""
    right = SUM.search(step)[0]
    x, sign, times, a = re.match(r"(\d+)([+-])(\d+\*)?(\d+)=", right).groups()
    sign = sign if times else {"+": "-", "-": "+"}[sign]
    y = int(x) + int(a) if sign == "+" else int(x) - int(a)
    if not 0 < y < 100 or right.endswith(f"={y}"):
        return None
    return ANSWER.sub(str(y), step.replace(right, f"{x}{sign}{a}={y}"))


def moves(pairs: list[dict], problems: dict[str, dict], same_words: bool) -> list[dict]:
    """A pair for each tempting move of each chosen solution. Chosen is the model's step, rejected its slip,
    in the same words or in those of the generator's worked solution."""
    rows = {}
    for pair in pairs:
        problem, solution = problems[pair["prompt"]], claims.solution_of(pair, "chosen")
        if make.results_of(solution) != problem["results"]:
            continue  # right by luck: its steps are not the problem's moves
        for step, tempting, words in zip(find_steps(solution), problem["tempting"], problem["steps"],
                                         strict=True):
            wrong = slipped(step.text if same_words else f" {words}") if tempting else None
            if wrong:
                rows[step.before + step.text] = {**pair, "initial_reason_steps": step.before,
                                                 "chosen": step.text, "rejected": wrong}
    return list(rows.values())


def fresh_pairs(args: argparse.Namespace, start: str) -> list[dict]:
    """Pairs of new problems, sampled by the model of a row; the generator names the wrong steps."""
    work = f"{args.work}/fresh-{start}-{args.fresh}"
    if not os.path.exists(f"{work}/pairs.jsonl"):
        os.makedirs(work, exist_ok=True)
        model = f"{trained(args, start, args.seeds[0])}/model"
        new = args.sets[f"problems {rounds(start) + 1}"]
        make.write(f"{work}/pairs.jsonl", claims.pairs_by_generator(model, work, new))
    return make.read(f"{work}/pairs.jsonl")


def rounds(name: str) -> int:
    """How many trainings a row's model has behind it."""
    return 1 + (rounds(ROWS[name].start) if ROWS[name].start else 0)


def prepare(args: argparse.Namespace, row: Row) -> str:
    """The file that a row is trained on, written now."""
    name = f"{row.data}-{row.start}" if row.data.startswith("fresh") else row.data
    path = f"{args.work}/{name.replace(' ', '-')}.jsonl"
    pairs = make.read(f"{make.HERE}/pairs.jsonl")
    if row.data.startswith("fresh"):
        pairs = fresh_pairs(args, row.start)[:len(pairs)]
    match row.data:
        case "pairs" | "fresh pairs":
            rows = pairs
        case "solutions" | "fresh solutions":
            rows = [claims.as_supervised(pair) for pair in pairs]
        case "twins":
            rows = twins(pairs)
        case "moves" | "move_twins":
            rows = moves(pairs, args.problems, same_words=row.data == "move_twins")
    make.write(path, rows)
    return path


# --------------------------------------------------------------------------------------------------- the runs


def trained(args: argparse.Namespace, name: str, seed: int) -> str:
    """Folder of a run, with the trained model/ in it. `name` may end in @ and another learning rate."""
    row, rate = ROWS[name.partition("@")[0]], name.partition("@")[2]
    path, rate = prepare(args, row), rate or row.rate
    start = f"{trained(args, row.start, args.seeds[0])}/model" if row.start else claims.MODEL
    content = content_key(Path(path).read_text(), start, row.flags)
    out = f"{args.work}/{name.partition('@')[0]}-{rate}-{seed}-{content}"
    if os.path.exists(f"{out}/model"):
        return out
    shutil.rmtree(out, ignore_errors=True)  # a run that was stopped

    pairs, batch = len(make.read(f"{make.HERE}/pairs.jsonl")), int(claims.of_recipe("batch-size"))
    batch = math.ceil(len(make.read(path)) / data.steps_per_epoch(pairs, batch))
    shared = ["--model", start, "--data", path, "--batch-size", str(batch),
              "--learning-rate", rate, "--seed", str(seed)]
    if "solutions" in row.data:
        claims.run(f"{out}.log", "demo/sft.py", *shared, "--instruction", "",
                   "--epochs", claims.of_recipe("epochs"), "--out", f"{out}/model")
    else:
        claims.run(f"{out}.log", "stepdpo.py", f"@{args.work}/args", *shared, *row.flags.split(),
                   "--output-dir", out)
    return out


def measure(args: argparse.Namespace, name: str) -> dict:
    """Answers by seed, and where the wrong ones go wrong, on average over the seeds."""
    file = f"{args.work}/{args.on}.jsonl"
    folders = [trained(args, name, seed) for seed in args.seeds]
    by_seed = [claims.answers(f"{folder}/model", file, f"{folder}/{args.on}") for folder in folders]
    errors = [first_errors(claims.samples_of(f"{folder}/{args.on}"), args.judged_on) for folder in folders]
    return {"answers": claims.over_seeds(by_seed), "right": [sum(right) for right in by_seed],
            "rows": len(make.read(prepare(args, ROWS[name.partition("@")[0]]))),
            "errors": {place: claims.share([found[place] for found in errors]) for place in errors[0]}}


# ------------------------------------------------------------------------------------ tokens, before and after

GROUPS = "same beginning", "first that differs", "later, shared", "later, not shared"


def groups(chosen: list[int], rejected: list[int]) -> tuple[list[int], list[int]]:
    """How each token of both steps stands to the other step. Shared is what difflib aligns."""
    of = [[3] * len(chosen), [3] * len(rejected)]
    for a, b, size in difflib.SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        of[0][a:a + size] = of[1][b:b + size] = [2] * size
    same = len(os.path.commonprefix([chosen, rejected]))
    for one in of:
        one[:same + 1] = ([0] * same + [1])[:len(one)]
    return of[0], of[1]


@torch.no_grad()
def token_table(model: str, pairs: list[data.Pair]) -> torch.Tensor:
    """(2, 4, 2): of chosen and rejected steps, by group: tokens and nats per step, on average."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    table = torch.zeros(2, len(GROUPS), 2)
    for pair in pairs:
        for which, (span, group) in enumerate(zip(pair[1:3], groups(*pair[1:3]), strict=True)):
            ids = torch.tensor(pair.prefix + span)
            predicting = policy(ids[None]).logits[0, len(pair.prefix) - 1:-1].log_softmax(-1)
            logps = predicting.gather(1, torch.tensor(span)[:, None])[:, 0]
            values = torch.stack([torch.ones_like(logps), logps], 1)
            table[which].index_add_(0, torch.tensor(group), values)
    return table / len(pairs)


def show_tokens(args: argparse.Namespace, names: list[str]) -> None:
    """The change of log-probability of the demo's pairs, by group of tokens, in the run of the first seed."""
    tokenizer = read_tokenizer(claims.MODEL)
    for file in ("pairs", "eval_pairs"):
        pairs = data.encode(read_rows(f"{make.HERE}/{file}.jsonl"), tokenizer, "chat", "", "step")
        before = token_table(claims.MODEL, pairs)
        print(f"\n{len(pairs)} pairs of demo/{file}.jsonl, nats per step, chosen / rejected:\n")
        print(f"| | all | {' | '.join(GROUPS)} |", "|---|---|---|---|---|---|", sep="\n")

        def show(title: str, values: torch.Tensor, form: str) -> None:
            with_sum = torch.cat([values.sum(1, keepdim=True), values], 1)
            print(f"| {title} |", " | ".join(f"{c:{form}} / {r:{form}}" for c, r in with_sum.T.tolist()), "|")

        show("tokens per step", before[..., 0], ".1f")
        show("before", before[..., 1], ".2f")
        for name in names:
            after = token_table(f"{trained(args, name, args.seeds[0])}/model", pairs)
            show(f"{ROWS[name.partition('@')[0]].title}, change", (after - before)[..., 1], "+.2f")


# ---------------------------------------------------------------------------------------------- the reporting


def interval(before: list, after: list) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*claims.percent_gain(before, after))


def show(args: argparse.Namespace, found: dict[str, dict], against: str) -> None:
    count = len(args.judged_on)
    print(f"\n{count} {args.on} problems, seeds {args.seeds}; points over {ROWS[against].title}:\n")
    print("| trained with | rows | solved by seed | solved | points over it | right, first wrong at a tempting "
          "move, elsewhere; right where no move tempts |", "|---|---|---|---|---|---|", sep="\n")
    for name, row in found.items():
        title, _, rate = name.partition("@")
        by_seed = ", ".join(f"{right / count:.1%}" for right in row["right"])
        places = ", ".join(f"{value:.0f}" for value in row["errors"].values())
        over = "" if name == against else interval(found[against]["answers"], row["answers"])
        print(f"| {ROWS[title].title} {rate} | {row['rows']} | {by_seed} | "
              f"{claims.share(row['answers']):.1%} | {over} | {places} |")


def main() -> None:
    listed = "\n".join(["rows:", *(f"  {name:14}{row.title}" for name, row in ROWS.items())])
    parser = argparse.ArgumentParser(description=__doc__, epilog=listed, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("rows", nargs="+", metavar="ROW", help="names of rows, as listed below; ROW@RATE has another rate")
    add("--tokens", action="store_true", help="show tokens before and after instead of answers")
    add("--on", choices=("test", "dev"), default="test", help="problems to be judged on [test]")
    add("--over", default="step", help="the row that the others are compared with [step]")
    add("--seeds", type=int, nargs="+", default=[0], help="of training [0]")
    add("--fresh", type=int, default=600, metavar="N", help="problems to make fresh pairs of [600]")
    add("--work", default=f"{make.ROOT}/runs/why", type=os.path.abspath, help="folder of the runs")
    add("--out", help="JSON to write [none]")
    args = parser.parse_args()
    for name in args.rows:
        if name.partition("@")[0] not in ROWS:
            parser.error(f"there is no row {name!r}")

    report = environment()
    args.work = f"{args.work}/{model_identity(claims.MODEL)}"
    locked = lock(f"{args.work}/.lock")  # noqa: F841  held until this ends
    args.sets = make.problem_sets(make.SEED, dev=300, **{f"problems {n}": args.fresh for n in (2, 3)})
    args.problems = {row["prompt"]: row for row in args.sets["problems"]}
    args.judged_on = args.sets[args.on]
    make.write(f"{args.work}/{args.on}.jsonl", make.only(args.judged_on, "prompt", "answer"))
    claims.write_recipe(args.work)
    if args.tokens:
        return show_tokens(args, args.rows)

    found = {name: measure(args, name) for name in dict.fromkeys([args.over, *args.rows])}
    show(args, found, args.over)
    if args.out:
        write(args.out, report | {"on": args.on, "seeds": args.seeds, "rows": found})


if __name__ == "__main__":
    run_command("demo/why.py", main)
