"""README's recipes, taken from its text: the copied loss is right, a changed loss is seen everywhere."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers

from conftest import ENVIRONMENT, HERE, make_rows, write_jsonl
from kernels import linear_logps

README = (HERE / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(title: str, language: str) -> list[str]:
    """The code blocks of a section."""
    return re.findall(rf"```{language}\n(.*?)```", section(title), re.S)


def test_the_copied_loss_is_the_definition(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    logps_code, loss_code = blocks("Copy the loss", "python")
    prompt, chosen, rejected = [5, 7, 11, 13], [17, 19, 23], [29, 31]

    names = {"torch": torch, "F": F, "linear_logps": linear_logps, "model": model, "beta": 0.4}
    expected = []
    for name, span in (("chosen", chosen), ("rejected", rejected)):
        names |= {"input_ids": torch.tensor([prompt + span]), "n": len(span)}
        exec(logps_code, names)
        logp = names["logps"].sum()
        names[f"policy_{name}_logps"] = logp[None]
        names[f"reference_{name}_logps"] = logp[None].detach() - len(name)

        logps = model(names["input_ids"]).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(span) - 1)
        expected.append(sum(logps[place, token] for place, token in zip(places, span, strict=True)))
        assert logp.item() == pytest.approx(expected[-1].item(), rel=1e-5)

    exec(loss_code, names)
    margin = 0.4 * (len("chosen") - len("rejected"))
    assert names["losses"].item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)
    names["losses"].sum().backward()
    weight = model.get_output_embeddings().weight
    gradient, weight.grad = weight.grad, None
    difference = expected[0] - expected[1]
    (-F.logsigmoid(margin + 0.4 * (difference - difference.detach()))).backward()
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)


def apply(change: str, text: str) -> str:
    """A block of README's in the form of `diff`: lines with a +, after lines that stand in the text once."""
    context = "".join(line[1:] for line in change.splitlines(keepends=True) if line.startswith(" "))
    added = "".join(line[1:] for line in change.splitlines(keepends=True) if line.startswith("+"))
    assert text.count(context) == 1, f"README's context is not in the code: {context}"
    return text.replace(context, context + added)


def test_a_changed_loss_is_trained_on_logged_and_measured_on_held_out_pairs(tiny, tmp_path):
    shutil.copytree(HERE / "runtime", tmp_path / "runtime", ignore=shutil.ignore_patterns("tests"))
    for name in ("stepdpo.py", "kernels.py", "data.py"):
        shutil.copy(HERE / name, tmp_path)
    changes = blocks("Change the loss", "diff")
    for name, change in zip(("stepdpo.py", "runtime/flags.py"), changes, strict=True):
        (tmp_path / name).write_text(apply(change, (HERE / name).read_text()))

    # One pair per step and one held out, so that the margin says what its loss must be.
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_rows(2))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_rows(3)[2:])
    words = ["--model", tiny, "--data", pairs, "--eval-data", held_out, "--output-dir", str(tmp_path / "out"),
             "--batch-size", "1", "--epochs", "3", "--eval-every", "1", "--learning-rate", "1e-2",
             "--label-smoothing", "0.25"]
    ended = subprocess.run([sys.executable, tmp_path / "stepdpo.py", *words], cwd=tmp_path, text=True,
                           capture_output=True, env={**ENVIRONMENT, "STEPDPO_CACHE": str(tmp_path / "cache")})
    assert ended.returncode == 0, ended.stderr

    seen = set()
    for line in map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines()):
        prefix = "eval/" if "eval/loss" in line else ""
        margin = line[f"{prefix}rewards/margins"]
        smoothed = 0.75 * math.log1p(math.exp(-margin)) + 0.25 * math.log1p(math.exp(margin))
        assert line[f"{prefix}loss"] == pytest.approx(smoothed, rel=1e-5)
        if abs(margin) > 0.1:
            seen.add(prefix)
    assert seen == {"", "eval/"}, "the margins are too small to tell the losses apart"
    assert json.loads((tmp_path / "out/run.json").read_text())["config"]["label_smoothing"] == 0.25
