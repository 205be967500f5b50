"""The study on GSM8K: its split, what it keeps, what its arms are trained on. No model is needed."""

import gzip
import sys
from argparse import Namespace

import pytest

from conftest import HERE

sys.path.insert(0, str(HERE / "demo/gsm8k"))
import study  # noqa: E402
from claims import make  # noqa: E402

RIGHT = "Let's think step by step.\nStep 1: 1+1=2.\nStep 2: 2+1=3.\nThe answer is: 3"


@pytest.fixture
def args(tmp_path, monkeypatch):
    """A work folder, another one for what is kept, and a data set of 710 problems."""
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(study, "HERE", str(tmp_path / "kept"))
    rows = [dict(question=f"Problem {n}?", answer=f"It is {n}.\n#### {n}") for n in range(710)]
    make.write(str(tmp_path / "gsm8k.jsonl"), rows)
    (tmp_path / "work").mkdir()
    return Namespace(work=str(tmp_path / "work"), data=str(tmp_path / "gsm8k.jsonl"))


def test_no_problem_is_in_two_parts_of_the_split(args):
    study.prepare(args)
    parts = [make.read(f"{args.work}/{name}.jsonl") for name in ("train", "choose", "dev")]
    assert [len(part) for part in parts] == [10, 200, 500]
    rows = [row["question"] for part in parts for row in part]
    assert rows == [f"Problem {n}?" for n in range(710)]


def test_what_is_kept_is_gone_on_from_but_not_put_over_newer_samples(args, tmp_path):
    path = tmp_path / "work/build/samples.jsonl"
    path.parent.mkdir()
    path.write_text('{"settings": {}}\n{"key": "a 0"}\n{"key": "torn')
    study.keep(args)
    kept = (tmp_path / "kept/samples.jsonl.gz").read_bytes()
    assert gzip.decompress(kept) == b'{"settings": {}}\n{"key": "a 0"}\n'

    path.write_text("newer")
    study.prepare(args)
    assert path.read_text() == "newer"
    path.unlink()
    study.prepare(args)
    assert path.read_bytes() == gzip.decompress(kept)


def test_all_arms_have_the_same_pairs(args):
    """Of whole solutions the right one is sampled on its own, if there is one."""
    study.prepare(args)
    make.write(f"{args.work}/problems.jsonl", make.read(f"{args.work}/train.jsonl"))
    (problem, *_) = study.read_problems(f"{args.work}/problems.jsonl")
    prefix = f"{study.STEP_PREFIX} 1+1=2.\nStep 2:"
    pair = dict(prompt=problem.prompt, answer="0", initial_reason_steps=prefix, chosen=" 2-2=0.",
                rejected=" 4.", full_chosen=" 2-2=0.\nThe answer is: 0",
                full_rejected=" 4.\nThe answer is: 4")
    sample = dict(prompt=problem.prompt, correct=True, cut=False, solution=RIGHT)
    rows = [dict(settings={}), dict(sample, key=f"{problem.key(study.STEP_PREFIX)} 0"),
            dict(sample, key=f"{problem.key(study.STEP_PREFIX)} 1", correct=False, solution="wrong"),
            dict(sample, key=f"{problem.key(prefix)} 0", solution="of another start")]
    (study.Path(args.work) / "build").mkdir()
    make.write(f"{args.work}/build/samples.jsonl", rows)
    make.write(f"{args.work}/build/pairs.jsonl", [pair])
    study.write_rows(args)

    (own,), (whole,), (taught,) = (make.read(f"{args.work}/{name}.jsonl")
                                   for name in ("pairs", "solutions", "sft"))
    assert own == pair
    assert study.STEP_PREFIX + whole["full_chosen"] == RIGHT
    assert study.STEP_PREFIX + whole["full_rejected"] == prefix + pair["full_rejected"]
    assert taught == dict(question=problem.prompt, solution=prefix + pair["full_chosen"])
