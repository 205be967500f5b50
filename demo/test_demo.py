"""The demo: its problems, its files, its recipe, supervised training."""

import argparse
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers

import data
from conftest import ENVIRONMENT, HERE, TORCHRUN, rows_of, write_jsonl
from pairs.grading import is_correct
from pairs.problems import STEP_PREFIX, find_steps

sys.path.insert(0, str(HERE / "demo"))
import by_token  # noqa: E402
import claims  # noqa: E402
import errors  # noqa: E402
import make  # noqa: E402
import sft  # noqa: E402
import why  # noqa: E402

GSM8K = dict(question="Tom has 48/2 pens and buys 3. How many?",
             answer="He has 48/2=<<48/2=24>>24.\nSo 24+3=27.\n#### 27")


@pytest.fixture(scope="session")
def sets():
    return make.problem_sets(make.SEED)


def equations_of(step: str) -> str:
    (found,) = re.findall(r"[-\d+*/]+=[-\d+*/=]+", step)
    return found


def test_problems_are_right_and_no_two_sets_share_one(sets):
    prompts = [row["prompt"] for rows in sets.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    for row in sets["test"] + sets["problems"]:
        assert 6 <= len(row["steps"]) == len(row["foreign"]) == len(row["results"]) <= 12
        assert row["answer"] == str(row["results"][-1])
        for own, foreign, result in zip(row["steps"], row["foreign"], row["results"], strict=True):
            assert equations_of(own) == equations_of(foreign) and own != foreign
            assert {eval(side) for side in equations_of(own).split("=")} == {result}


def test_taught_solutions_slip_where_words_tempt_and_nowhere_else(sets):
    wrong = [row for row in sets["train"] if row["taught_answer"] != row["answer"]]
    assert 0.2 < len(wrong) / len(sets["train"]) < 0.4
    for row in wrong:
        k = make.first_wrong(sft.steps_of(dict(question="", answer=make.worked(row)), ""), row["results"])
        (slip,) = re.findall(r"(\d+)[-+](\d+)=\d+", row["taught"][k - 1])
        assert slip[0] == str(row["results"][k - 2])  # a sum of the right number with a wrong sign
        assert re.search("come back|fewer|apiece|bags of", row["prompt"])


def test_the_first_wrong_step_is_known_whatever_its_words():
    begin = "Let's think step by step.\nStep 1: Now 2*3=6 pens.\nStep 2:"
    for rest, step in ((" 6-2=5, good.\nStep 3: 5+1=6.\nThe answer is: 6", 2),
                       (" 6-2=4.\nStep 3: 4+1=5.\nStep 4: 5+1=6.\nThe answer is: 6", 4),
                       (" 6-2=4.\nThe answer is: 4", 2), (" 6-2=4.\nStep 3: so it is.\nThe answer is: 4", 3),
                       (" 6-2=4.\nStep 3: 4+1=5.\nThe answer is: 4", 3)):
        assert make.first_wrong(begin + rest, [6, 4, 5]) == step


def test_wrong_answers_are_told_apart_by_where_they_first_go_wrong(sets):
    rows = sets["test"]
    taught = [dict(prompt=row["prompt"], correct=row["answer"] == row["taught_answer"],
                   solution=sft.steps_of(dict(question="", answer=make.worked(row)), "")) for row in rows]
    found = errors.first_errors(taught, rows)
    assert found["right"] + found["tempting"] == 500 and found["tempting"] > 100
    assert found["plain"] == sum(not any(row["tempting"]) for row in rows)
    empty = [dict(answer, correct=False, solution=f"{STEP_PREFIX} so it is.") for answer in taught]
    assert errors.first_errors(empty, rows) == dict(right=0, tempting=0, elsewhere=500, plain=0)


def test_problems_can_be_made_again_in_seconds(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make.py", "--problems", str(tmp_path / "problems.jsonl")])
    monkeypatch.setattr(make, "problem_sets", lambda seed, **later: sets)  # they take seconds
    make.main()
    assert rows_of(tmp_path / "problems.jsonl") == make.only(sets["problems"], "prompt", "answer")
    assert rows_of(HERE / "demo/test.jsonl") == make.only(sets["test"], "prompt", "answer")


def test_demo_is_small_ordinary_and_its_pairs_are_of_its_problems(sets):
    files = [path for path in (HERE / "demo").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 8e6
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / "demo/model")
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.dtype == torch.bfloat16
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    answers = {row["prompt"]: row["answer"] for row in sets["problems"]}
    used = []
    for name in ("pairs", "eval_pairs"):
        rows = rows_of(HERE / f"demo/{name}.jsonl")
        used.append({row["prompt"] for row in rows})
        for row in rows:
            assert row["answer"] == answers[row["prompt"]]
            assert is_correct(row["initial_reason_steps"] + row["full_chosen"], row["answer"])
            assert not is_correct(row["initial_reason_steps"] + row["full_rejected"], row["answer"])
    assert not used[0] & used[1]


@pytest.mark.slow
def test_recipe_trains_evaluates_and_shows_accuracy_before_and_after(tmp_path):
    """The README's first command, with few optimizer steps and problems."""
    problems = write_jsonl(tmp_path / "test.jsonl", rows_of(HERE / "demo/test.jsonl")[:150])
    command = [*TORCHRUN, "2", "stepdpo.py", "@demo/args", "--max-steps", "4", "--test-problems", problems,
               "--output-dir", str(tmp_path / "out")]
    environment = ENVIRONMENT | {"STEPDPO_CACHE": str(tmp_path)}
    first = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=600, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.search(r"^step    0   held-out loss 0\.6931, margin \+0\.0000, accuracy -$", first.stdout, re.M)
    found = re.search(r"accuracy    before (\d+\.\d)%, after (\d+\.\d)% on 150 held-out problems: "
                      r"[+-]\d+\.\d points, 95% interval [+-]\d+\.\d to [+-]\d+\.\d", first.stdout)
    assert found and 40 <= float(found[1]) <= 65
    for number, when in enumerate(("before", "after"), 1):
        right = [row["correct"] for row in rows_of(tmp_path / f"out/{when}.jsonl")[1:]]
        right += [row["correct"] for row in rows_of(tmp_path / f"out/{when}.rank1.jsonl")[1:]]
        assert len(right) == 150 and f"{sum(right) / 150:.1%}" == found[number] + "%"
    evaluations = [row for row in rows_of(tmp_path / "out/metrics.jsonl") if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [0, 4]

    again = subprocess.run([*command, "--resume"], cwd=HERE, capture_output=True, text=True, timeout=600,
                           env=environment)
    assert "finished    already" in again.stdout and found[0] in again.stdout  # a stop loses nothing


def test_chosen_steps_of_the_generator_are_right_in_either_words(sets):
    pairs, problems = rows_of(HERE / "demo/pairs.jsonl"), {row["prompt"]: row for row in sets["problems"]}
    for words in ("steps", "foreign"):
        rows, kept = claims.by_generator(pairs, problems, words)
        changed = [new for old, new in zip(pairs, rows, strict=True) if old["chosen"] != new["chosen"]]
        assert len(rows) - kept >= len(changed) > 0.7 * len(rows)
        for row in changed:
            step = claims.step_number(row)
            assert make.results_of(row["initial_reason_steps"] + row["chosen"])[-1] == (
                problems[row["prompt"]]["results"][step - 1])
        last = [row for row in changed if "The answer is" in row["chosen"]]
        assert last and all(is_correct(row["chosen"], row["answer"]) for row in last)


def test_unlocalized_pairs_are_whole_solutions_one_right_and_one_wrong():
    pairs = rows_of(HERE / "demo/pairs.jsonl")[:40]
    solution = claims.solution_of(pairs[0], "chosen")
    rows = claims.as_solutions(pairs, {pairs[0]["prompt"]: [solution + " Indeed."]})
    assert rows[0]["full_chosen"] == (solution + " Indeed.").removeprefix(STEP_PREFIX)
    for row, pair in zip(rows, pairs, strict=True):
        assert row["initial_reason_steps"] == STEP_PREFIX and is_correct(row["full_chosen"], row["answer"])
        assert STEP_PREFIX + row["full_rejected"] == claims.solution_of(pair, "rejected")
    assert rows[-1]["full_chosen"] == claims.solution_of(pairs[-1], "chosen").removeprefix(STEP_PREFIX)


def test_the_gradient_of_branches_is_in_and_after_the_step_and_that_of_solutions_before_it_too(tmp_path):
    pairs = rows_of(HERE / "demo/pairs.jsonl")
    pairs = [pair for pair in pairs if claims.step_number(pair) > 2][:3]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "solutions.jsonl", claims.as_solutions(pairs, {}))
    args = argparse.Namespace(work=str(tmp_path))
    branches, solutions = (claims.gradient_shares(args, kind) for kind in ("branches", "solutions"))
    assert branches["before"] == 0 < branches["at"] and sum(branches.values()) == pytest.approx(1)
    # Both solutions have the same steps up to the wrong one here, so these say the same, and cancel out.
    assert solutions == pytest.approx(branches, abs=1e-3)


def test_twins_differ_in_the_sum_alone():
    pairs = rows_of(HERE / "demo/pairs.jsonl")
    rows = why.twins(pairs)
    changed = [row for row, pair in zip(rows, pairs, strict=True) if row != pair]
    assert len(changed) > 0.8 * len(rows)
    for row in changed:
        chosen, rejected = (why.ANSWER.sub("", why.SUM.sub("", row[name])) for name in ("chosen", "rejected"))
        assert chosen == rejected and row["chosen"] != row["rejected"]
    for row, pair in zip(rows, pairs, strict=True):  # and what is wrong is the model's own
        assert why.SUM.findall(row["rejected"]) == why.SUM.findall(pair["rejected"])


def test_a_slip_keeps_the_words_and_overlooks_what_tempts():
    for right, wrong in ((" Now 36-3=33 pens.", " Now 36+3=39 pens."), (" 5+3=8 pens.", " 5-3=2 pens."),
                         (" 10+4*4=10+16=26 pens.\nThe answer is: 26", " 10+4=14 pens.\nThe answer is: 14"),
                         (" Now 65-3*8=65-24=41. Good.", " Now 65-8=57. Good.")):
        assert why.slipped(right) == wrong
    assert why.slipped(" 3+3=6 pens.") is None and why.slipped(" 99-3=96 pens.") is None


def test_pairs_of_all_tempting_moves_go_on_from_right_steps_and_slip(sets):
    pairs, problems = rows_of(HERE / "demo/pairs.jsonl"), {row["prompt"]: row for row in sets["problems"]}
    rows = why.moves(pairs, problems)
    assert len(rows) > 150
    for row in rows:
        problem, k = problems[row["prompt"]], claims.step_number(row)
        right, wrong = (make.results_of(row["initial_reason_steps"] + row[name])
                        for name in ("chosen", "rejected"))
        assert right == problem["results"][:k] and right[:-1] == wrong[:-1] and right != wrong
        assert problem["tempting"][k - 1]


def test_tokens_are_grouped_by_how_they_stand_to_the_other_step():
    assert by_token.groups([1, 2, 3, 4, 5], [1, 2, 7, 8, 4]) == ([0, 0, 1, 2, 3], [0, 0, 1, 3, 2])
    assert by_token.groups([1, 2], [1, 2, 3]) == ([0, 0], [0, 0, 1])


def test_supervised_rows_are_numbered_steps_that_the_pipeline_reads(tokenizer):
    solution = sft.steps_of(GSM8K, "here")
    assert solution == ("Let's think step by step.\nStep 1: He has 48/2=24.\nStep 2: So 24+3=27.\n"
                        "The answer is: 27")
    assert len(find_steps(solution)) == 2 and is_correct(solution, "27")
    assert solution.startswith(STEP_PREFIX)
    ids, question = sft.encode(tokenizer, GSM8K, "here")
    assert tokenizer.decode(ids[question:]) == solution + tokenizer.eos_token  # EOS: an answer ends
    assert tokenizer.decode(ids[:question]) == data.open_turn(tokenizer, GSM8K["question"], "chat")
    own = dict(question="x", solution="Step 1: as it is.\n\nAnd so on.")
    assert sft.steps_of(own, "here") == own["solution"]
    for bad in (dict(question="x", answer="7"), dict(question="x", answer="#### 7"), dict(question="x")):
        with pytest.raises(ValueError, match="f:3: "):
            sft.steps_of(bad, "f:3")


def test_supervised_loss_is_that_of_the_answer_alone(tiny, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    examples = [sft.encode(tokenizer, GSM8K, ""),
                sft.encode(tokenizer, GSM8K | dict(answer="Three.\n#### 3"), "")]
    total = tokens = 0
    for ids, question in examples:  # one by one, by the library's own loss
        labels = torch.tensor([[-100] * question + ids[question:]])
        count = len(ids) - question
        total += model(torch.tensor([ids]), labels=labels).loss.item() * count
        tokens += count
    assert sft.loss_of(model, examples).item() == pytest.approx(total / tokens, rel=1e-5)


def test_an_export_in_fp32_keeps_what_bf16_rounds_away(tiny, tokenizer, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.fill_(1 + 1e-5)
    for dtype, expected in ((torch.float32, weight.max().item()), (torch.bfloat16, 1.0)):
        sft.export(model, tokenizer, str(tmp_path / "out"), dtype)
        stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert stored.get_input_embeddings().weight.dtype == dtype
        assert stored.get_input_embeddings().weight.max().item() == expected


def test_supervised_training_writes_a_model_that_has_learned(tiny, tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [GSM8K] * 12)
    flags = ["--model", tiny, "--data", path, "--rows", ":-4", "--out", str(tmp_path / "out"), "--epochs=12",
             "--batch-size=4", "--learning-rate=0.02"]
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags])
    sft.main()
    assert "8 rows, 24 steps of 4" in capsys.readouterr().out and os.listdir(tmp_path / "out")
    after, before = (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                     for folder in (tmp_path / "out", tiny))
    examples = [sft.encode(transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), GSM8K, "")]
    assert sft.loss_of(after, examples) < 0.5 * sft.loss_of(before, examples)
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags, "--rows", "50:"])
    with pytest.raises(SystemExit, match="sft: .*no rows left of 0"):
        sft.main()
