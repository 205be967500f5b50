#!/usr/bin/env python3
"""Which tokens of the demo's pairs became more likely by training, and which less?

    python demo/by_token.py runs/demo/model          # model folders, compared with demo/model

Chosen and rejected steps begin alike, then differ, and often have tokens in common after that. What pushing a
rejected step down takes along, and what pulling a chosen one up is spent on, shows by group of tokens.
"""

import argparse
import difflib
import os

import make
import torch
from transformers import AutoModelForCausalLM

import data
from runtime.rows import read_rows
from runtime.templates import read_tokenizer

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
            table[which].index_add_(0, torch.tensor(group), torch.stack([torch.ones_like(logps), logps], 1))
    return table / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of trained models")
    models = parser.parse_args().models

    for file in ("pairs", "eval_pairs"):
        rows, tokenizer = read_rows(f"{make.HERE}/{file}.jsonl"), read_tokenizer(f"{make.HERE}/model")
        pairs = data.encode(rows, tokenizer, "chat", "", "step")
        before = token_table(f"{make.HERE}/model", pairs)
        changes = {model: (token_table(model, pairs) - before)[..., 1] for model in models}

        print(f"\n{len(pairs)} of demo/{file}.jsonl, nats per step, chosen / rejected:\n")
        print(f"| | all | {' | '.join(GROUPS)} |", "|---|---|---|---|---|---|", sep="\n")
        for title, values in {"tokens per step": before[..., 0], "before": before[..., 1], **changes}.items():
            with_sum = torch.cat([values.sum(1, keepdim=True), values], 1)
            print(f"| {title} |", " | ".join(f"{c:+.2f} / {r:+.2f}" for c, r in with_sum.T.tolist()), "|")


if __name__ == "__main__":
    main()
