#!/usr/bin/env python3
"""Why does supervised training on chosen solutions beat Step-DPO on the demo? Rows of a table, each by name.

    python demo/why.py step sft moves           # these rows, judged on the test problems
    python demo/why.py twins twins@6e-5         # a row with another learning rate
    python demo/why.py --help                   # all rows

Every row is trained for as many optimizer steps as demo/args has, in batches of a twelfth of its data, so all
see theirs twice. A row that goes on from another starts from that one's first seed. What is there is not
repeated.
"""

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import claims
import make
from errors import first_errors

from bench.common import environment, write
from pairs.problems import find_steps
from runtime.commands import run_command
from runtime.files import content_key, lock
from runtime.weights import model_identity


class Row(NamedTuple):
    title: str
    data: str        # as `prepare` names it
    rate: str
    flags: str = ""  # of stepdpo.py; rows of solutions are trained by sft.py
    start: str = ""  # the row whose model it starts from, and makes fresh pairs with; "": the demo's model


NLL = "--nll-weight 1"
ALONE = f"--beta 1e-6 {NLL}"  # the preference weighs nothing: supervised on the chosen spans alone
ROWS = {
    "step": Row("Step-DPO", "pairs", "3e-5"),
    "step-nll": Row("Step-DPO + NLL", "pairs", "3e-5", NLL),
    "sft": Row("supervised, chosen solutions", "solutions", "6e-5"),
    "chosen": Row("supervised, chosen steps alone", "pairs", "6e-5", ALONE),
    "twins": Row("Step-DPO, both steps in the same words", "twins", "3e-5"),
    "moves": Row("Step-DPO, all tempting moves", "moves", "3e-5"),
    "moves-nll": Row("Step-DPO + NLL, all tempting moves", "moves", "3e-5", NLL),
    # The demo's pairs, apart by where the solution goes wrong.
    "tempting": Row("Step-DPO, pairs at tempting moves alone", "tempting", "3e-5"),
    "elsewhere": Row("Step-DPO, the other pairs alone", "elsewhere", "3e-5"),
    # The paper's order: supervised training first, then pairs of the model that comes out of it.
    "sft-step": Row("supervised, then Step-DPO on pairs of its own", "fresh pairs", "3e-5", "", "sft"),
    "sft-sft": Row("supervised, then supervised on these pairs", "fresh solutions", "6e-5", "", "sft"),
    # Rounds, each with pairs of the last one's model.
    "round2-nll": Row("Step-DPO + NLL, round 2", "fresh pairs", "3e-5", NLL, "step-nll"),
    "round3-nll": Row("Step-DPO + NLL, round 3", "fresh pairs", "3e-5", NLL, "round2-nll"),
}
SUM, ANSWER = re.compile(r"\d+[-+*/][-+*/=\d]*=\d+"), re.compile(r"(?<=\nThe answer is: )\d+")


def twins(pairs: list[dict]) -> list[dict]:
    """The pairs, the rejected step in the words of the chosen one: with its own sum, and its own answer if it
    is the last. Steps without one clear sum stay as they are."""
    rows = []
    for pair in pairs:
        twin = pair["chosen"]
        for pattern in (SUM, ANSWER):
            there, wrong = pattern.findall(twin), pattern.findall(pair["rejected"])
            twin = pattern.sub(wrong[0], twin) if len(there) == len(wrong) == 1 else twin
        rows.append({**pair, "rejected": twin if twin != pair["chosen"] else pair["rejected"]})
    return rows


def slipped(step: str) -> str | None:
    """A right step of a tempting move as people get it wrong: k bags of a, and a comes on top; a fewer, and a
    comes on top; a come back, and a is gone. None where the slip comes to what no model is taught."""
    right = SUM.search(step)[0]
    x, sign, times, a = re.match(r"(\d+)([+-])(\d+\*)?(\d+)=", right).groups()
    sign = sign if times else {"+": "-", "-": "+"}[sign]
    y = int(x) + int(a) if sign == "+" else int(x) - int(a)
    if not 0 < y < 100 or right.endswith(f"={y}"):
        return None
    return ANSWER.sub(str(y), step.replace(right, f"{x}{sign}{a}={y}"))


def moves(pairs: list[dict], problems: dict[str, dict]) -> list[dict]:
    """A pair for each tempting move of each chosen solution: the model's step, and the generator's slip."""
    rows = {}  # by chosen step and all before it: some chosen solutions begin alike
    for pair in pairs:
        problem, solution = problems[pair["prompt"]], claims.solution_of(pair, "chosen")
        if make.results_of(solution) != problem["results"]:
            continue  # right by another way: its steps are not the problem's moves
        for step, tempting, words in zip(find_steps(solution), problem["tempting"], problem["steps"],
                                         strict=True):
            wrong = slipped(f" {words}") if tempting else None
            if wrong:
                rows[step.before + step.text] = {**pair, "initial_reason_steps": step.before,
                                                 "chosen": step.text, "rejected": wrong}
    return list(rows.values())


def at_tempting_move(pair: dict, problems: dict[str, dict]) -> bool:
    k = claims.step_number(pair)
    return any(problems[pair["prompt"]]["tempting"][k - 1:k])  # a step too many is of no move


def fresh_pairs(args: argparse.Namespace, start: str) -> list[dict]:
    """Pairs of new problems, sampled by the model of a row; the generator names the wrong steps."""
    work, number = f"{args.work}/fresh-{start}-{args.fresh}", 2 + (ROWS[start].start != "")
    if not os.path.exists(f"{work}/pairs.jsonl"):
        os.makedirs(work, exist_ok=True)
        model = f"{trained(args, start, args.seeds[0])}/model"
        make.write(f"{work}/pairs.jsonl",
                   claims.pairs_by_generator(model, work, args.sets[f"problems {number}"]))
    return make.read(f"{work}/pairs.jsonl")


def prepare(args: argparse.Namespace, row: Row) -> str:
    """The file that a row is trained on, written now."""
    pairs = make.read(f"{make.HERE}/pairs.jsonl")
    problems = {problem["prompt"]: problem for problem in args.sets["problems"]}
    if row.data.startswith("fresh"):
        pairs = fresh_pairs(args, row.start)[:len(pairs)]
    if row.data.endswith("solutions"):
        pairs = [claims.as_supervised(pair) for pair in pairs]
    if row.data == "twins":
        pairs = twins(pairs)
    if row.data == "moves":
        pairs = moves(pairs, problems)
    if row.data in ("tempting", "elsewhere"):
        wanted = row.data == "tempting"
        pairs = [pair for pair in pairs if at_tempting_move(pair, problems) == wanted]
    path = f"{args.work}/{row.data} {row.start}".strip().replace(" ", "-") + ".jsonl"
    make.write(path, pairs)
    return path


def trained(args: argparse.Namespace, name: str, seed: int) -> str:
    """Folder of a run, with the trained model/ in it. `name` may end in @ and another learning rate."""
    name, _, rate = name.partition("@")
    row, path = ROWS[name], prepare(args, ROWS[name])
    rate = rate or row.rate
    start = f"{trained(args, row.start, args.seeds[0])}/model" if row.start else claims.MODEL
    out = f"{args.work}/{name}-{rate}-{seed}-{content_key(Path(path).read_text(), start, row.flags)}"
    if os.path.exists(f"{out}/model"):
        return out
    shutil.rmtree(out, ignore_errors=True)  # a run that was stopped

    pairs, batch = len(make.read(f"{make.HERE}/pairs.jsonl")), int(claims.of_recipe("batch-size"))
    batch = claims.batch_for(len(make.read(path)), pairs, batch)
    shared = ["--model", start, "--data", path, "--batch-size", str(batch),
              "--learning-rate", rate, "--seed", str(seed)]
    if row.data.endswith("solutions"):
        claims.run(f"{out}.log", "demo/sft.py", *shared, "--instruction", "",
                   "--epochs", claims.of_recipe("epochs"), "--out", f"{out}/model")
    else:
        claims.run(f"{out}.log", "stepdpo.py", f"@{args.work}/args", *shared, *row.flags.split(),
                   "--output-dir", out)
    return out


def measure(args: argparse.Namespace, name: str) -> dict:
    """Right answers, and where the wrong ones first go wrong, on average over the seeds."""
    test, folders = f"{args.work}/test.jsonl", [trained(args, name, seed) for seed in args.seeds]
    by_seed = [claims.answers(f"{folder}/model", test, f"{folder}/test") for folder in folders]
    errors = [first_errors(claims.samples_of(f"{folder}/test"), args.sets["test"]) for folder in folders]
    return {"answers": claims.over_seeds(by_seed), "right": [sum(right) for right in by_seed],
            "rows": len(make.read(prepare(args, ROWS[name.partition("@")[0]]))),
            "errors": {place: claims.share([found[place] for found in errors]) for place in errors[0]}}


def show(found: dict[str, dict], count: int) -> None:
    against, *_ = found
    print(f"| trained with | rows | rate | solved, by seed | over {ROWS[against].title} | first wrong at a "
          "tempting move | elsewhere | right where no move tempts |", "|---" * 8 + "|", sep="\n")
    for name, row in found.items():
        title, _, rate = name.partition("@")
        by_seed = ", ".join(f"{right / count:.1%}" for right in row["right"])
        over = "{:+.1f} ({:+.1f} to {:+.1f})".format(*row["over"])
        _, tempting, elsewhere, plain = row["errors"].values()
        print(f"| {ROWS[title].title} | {row['rows']} | {rate or ROWS[title].rate} | {by_seed} | {over} | "
              f"{tempting:.0f} | {elsewhere:.0f} | {plain:.0f} |")


def main() -> None:
    listed = "\n".join(["rows:", *(f"  {name:14}{row.title}" for name, row in ROWS.items())])
    parser = argparse.ArgumentParser(description=__doc__, epilog=listed, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("rows", nargs="+", metavar="ROW", help="names from below; the others are compared with the first")
    add("--seeds", type=int, nargs="+", default=[0], help="of training [0]")
    add("--fresh", type=int, default=600, metavar="N", help="problems to make fresh pairs of [600]")
    add("--work", default=f"{make.ROOT}/runs/why", type=os.path.abspath, help="folder of the runs")
    add("--out", default=f"{make.ROOT}/bench/results/why.json", help="JSON [bench/results/why.json]")
    args = parser.parse_args()
    for name in args.rows:
        if name.partition("@")[0] not in ROWS:
            parser.error(f"there is no row {name!r}")

    report = environment()
    args.work = f"{args.work}/{model_identity(claims.MODEL)}"
    locked = lock(f"{args.work}/.lock")  # noqa: F841  held until this ends
    args.sets = make.problem_sets(make.SEED, **{f"problems {n}": args.fresh for n in (2, 3)})
    make.write(f"{args.work}/test.jsonl", make.only(args.sets["test"], "prompt", "answer"))
    claims.write_recipe(args.work)
    found = {name: measure(args, name) for name in dict.fromkeys(args.rows)}
    answers = {name: row.pop("answers") for name, row in found.items()}
    for name, row in found.items():
        row["over"] = claims.percent_gain(answers[args.rows[0]], answers[name])
    show(found, len(args.sets["test"]))
    write(args.out, report | {"seeds": args.seeds, "fresh": args.fresh, "rows": found})


if __name__ == "__main__":
    run_command("demo/why.py", main)
