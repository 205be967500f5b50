#!/usr/bin/env python3
"""Do many optimizer steps drift apart? The demo, trained packed and shared, against a naive trainer in fp32.

    python bench/drift.py                     # 132 optimizer steps of each, some 20 minutes on 2 CPU cores

The naive one has whole logits, one sequence at a time and every prefix twice. Printed are how far the losses
are apart, step by step, how far the exported weights (norms), and what both answer to held-out problems.
"""

import argparse
import json
import os
import tempfile

from common import CUDA, HERE, ROOT, announced_environment, write
from naive import naive_training
from transformers import AutoModelForCausalLM, AutoTokenizer

import stepdpo
from pairs.problems import read_problems
from pairs.sampling import Sample, Samples, Settings
from pairs.stages import solve


def answers_of(model: str, config: argparse.Namespace) -> list[Sample]:
    """Greedy answers to the test problems."""
    settings = Settings(model, config.template, config.instruction, config.template_args, temperature=0,
                        dtype="float32", max_new_tokens=config.max_length)
    samples = Samples(f"{model}/answers.jsonl", settings)
    return [sample for _, sample in solve(read_problems(config.test_problems), samples, count=1)]


def compare(config: argparse.Namespace, folder: str) -> dict:
    naive_losses, naive = naive_training(config)
    naive.to(AutoModelForCausalLM.from_pretrained(config.model).dtype)  # as the trainer exports
    naive.save_pretrained(f"{folder}/naive")
    AutoTokenizer.from_pretrained(config.model).save_pretrained(f"{folder}/naive")
    stepdpo.train(config)

    with open(f"{config.output_dir}/metrics.jsonl") as file:
        losses = [line["loss"] for line in map(json.loads, file) if "loss" in line]
    start, ours = (AutoModelForCausalLM.from_pretrained(model).state_dict()
                   for model in (config.model, f"{config.output_dir}/model"))
    theirs = naive.state_dict()
    moved = sum((theirs[name] - start[name]).double().square().sum() for name in start).sqrt()
    apart = sum((theirs[name] - ours[name]).double().square().sum() for name in start).sqrt()

    answers = [answers_of(model, config) for model in (f"{config.output_dir}/model", f"{folder}/naive")]
    return {"losses": losses, "naive_losses": naive_losses, "weights_moved": moved.item(),
            "weights_apart": apart.item(), "problems": len(answers[0]),
            "right": [sum(answer.correct for answer in of_model) for of_model in answers],
            "same_answers": sum(a.solution == b.solution for a, b in zip(*answers, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=11, help="of 12 optimizer steps [11]")
    parser.add_argument("--out", help="JSON [bench/results/drift.json]")
    args = parser.parse_args()
    if CUDA:
        parser.error("compares in fp32 on a CPU; hide the GPUs: CUDA_VISIBLE_DEVICES=")

    report = announced_environment()
    os.chdir(ROOT)  # where the recipe's paths begin
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STEPDPO_CACHE"] = folder
        flags = ["@demo/args", f"--output-dir={folder}/out", f"--epochs={args.epochs}"]
        report |= compare(stepdpo.parse(flags), folder)

    differences = [abs(a - b) for a, b in zip(report["losses"], report["naive_losses"], strict=True)]
    print(f"losses      {report['losses'][0]:.4f} to {report['losses'][-1]:.4f} in {len(differences)} "
          f"optimizer steps, apart by {max(differences):.1e} at most and {differences[-1]:.1e} at the last")
    print(f"weights     moved by {report['weights_moved']:.3g}, apart by {report['weights_apart']:.1e}")
    print(f"answers     {report['same_answers']} of {report['problems']} are the same; right are "
          f"{report['right'][0]} and, of the naive trainer, {report['right'][1]}")
    write(args.out or f"{HERE}/results/drift.json", report)


if __name__ == "__main__":
    main()
