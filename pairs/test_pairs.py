"""The specification of pairs/, executable, in the order of the code: steps and problems, the cache, sampling,
a server, the stages, a judge and people, the command line. Grading has a file of its own, test_grading.py."""

import argparse
import http.server
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CHILDREN, ENVIRONMENT, HERE, TORCHRUN, default_flags, rows_of, start_ranks, write_jsonl
from pairs import __main__ as command_line
from pairs import sampling, stages
from pairs import server as client
from pairs.cache import Cache
from pairs.grading import is_correct, wilson_interval
from pairs.judge import Judge, first_error
from pairs.problems import Problem, find_steps, read_problems
from pairs.sampling import Continuation, LocalSampler, Settings
from runtime.commands import run_command
from runtime.messages import InputError
from runtime.rows import pairs_of, read_rows
from runtime.templates import read_tokenizer

# ----------------------------------------------------------------------------------------- steps and problems

STEPS = "Let's think step by step.\n"
HOSTILE = {  # solution: the texts of its steps, or None where the numbering is not exactly 1..n
    STEPS + "Step 1: a\nStep 2: b": [" a", " b"],
    STEPS + "Step 1: a\n\nStep 2: b\n\n": [" a", " b"],
    STEPS + "Step 1: as in Step 1: above\nStep 2: see Step 1: and Step 7: there": [
        " as in Step 1: above", " see Step 1: and Step 7: there"],
    STEPS + "Step 1: a\nmore of it\n\n  and more\nStep 2: b\nThe answer is: 3": [
        " a\nmore of it\n\n  and more", " b\nThe answer is: 3"],
    "Step 1:a": ["a"],
    "Some words first.\nStep 1: a\n Step 2: b": [" a", " b"],
    STEPS + "Step 1: Step 2 gave 5\nStep 2 gave us that\nStep 2: b": [
        " Step 2 gave 5\nStep 2 gave us that", " b"],
    STEPS + "Step 1: a\nStep 3: b": None,
    STEPS + "Step 1: a\nStep 2: b\nStep 2: c": None,
    STEPS + "Step 1: a\nStep 2: b\nStep 1: again": None,
    STEPS + "Step 2: a\nStep 3: b": None,
    STEPS + "Step 1: a\n**Step 2:** b": None,
    STEPS + "Step 1: a\nstep 2: b": None,
    STEPS + "Step 1: a\n## Step 2: b": None,
    STEPS + "Step 1: a\nStep 2. b": None,
    STEPS + "Step 1:\nStep 2: b": None,
    STEPS + "Step 1: a\nStep 2:  \n": None,
    "The answer is: 4": None,
    "": None,
}


@pytest.mark.parametrize("solution", HOSTILE)
def test_steps_run_from_one_numbered_line_to_the_next_and_are_never_guessed(solution):
    steps = find_steps(solution)
    assert (steps and [step.text for step in steps]) == HOSTILE[solution]
    for k, step in enumerate(steps or [], 1):
        assert solution.startswith(step.before + step.text)
        assert step.before.endswith(f"Step {k}:")  # a prefix that ends here has no trailing space


@pytest.mark.parametrize("kind", ["jsonl", "with null columns", "parquet"])
def test_the_known_problem_formats(tmp_path, kind):
    rows = [dict(question="How many?", answer="1 + 1 = <<1+1=2>>2\n#### 1,002"),
            dict(problem="What is x?", solution=r"So $x=\boxed{\frac12}$."), dict(problem="And y?", answer=7),
            dict(instruction="Find all roots.", answer=["1", "-1"], output="work"),
            dict(question="Which?", options=["A)3", "B) 4"], correct="B", rationale="because"),
            dict(prompt="Plain?", answer="5", dataset="mine"), dict(prompt="Plain?", answer="5")]
    if kind != "jsonl":  # a file of one table has a column for each field of any row
        rows = [{**row, "answer": row.get("answer") and str(row["answer"])} for row in rows]
        rows[3]["answer"] = "1, -1"
        rows = [dict.fromkeys(name for other in rows for name in other) | row for row in rows]
    path = write_jsonl(tmp_path / "mixed.jsonl", rows)
    if kind == "parquet":
        path = str(tmp_path / "mixed.parquet")
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(path)
    found = read_problems(path)
    assert [p.answer for p in found] == ["1,002", r"\frac12", "7", "1, -1", "B", "5"]
    assert found[4].prompt == "Which?\nAnswer choices: (A) 3 (B) 4" and found[4].reference == "because"
    assert [p.dataset
            for p in found] == ["mixed"] * 5 + ["mine"] and found[0].reference.endswith("=2>>2")


@pytest.mark.parametrize("text, message", [
    ('{"text": "x"}',
     r"p\.jsonl:2: unknown format \(text\).*\n?.*GSM8K: question(.|\n)*AQuA(.|\n)*plain: prompt"),
    ('{"question": "x", "answer": "7"}', r'p\.jsonl:2: "answer" must end in "#### N"'),
    ('{"question": "x", "options": null, "correct": "A"}', r"p\.jsonl:2: unknown format \(question, cor"),
    ('{"question": null, "answer": "7", "text": "x"}', r"p\.jsonl:2: unknown format \(answer, text\)"),
    ('{"question": "x", "answer": null, "options": null}', r'p\.jsonl:2: "answer" must end in "#### N"'),
    ('{"question": "x", "options": ["A"], "correct": null}', r"p\.jsonl:2: the problem or its answer is"),
    ('{"problem": null, "solution": "x", "answer": null}', r"p\.jsonl:2: unknown format \(solution\)"),
    ('{"prompt": " ", "answer": "7"}', r"p\.jsonl:2: the problem or its answer is missing or empty"),
    ('{"problem": "x", "solution": "no box"}', r"p\.jsonl:2: the problem or its answer is missing or empty"),
    ('{"prompt": "x", ', r"p\.jsonl:2: not valid JSON"), ("[1]", r"p\.jsonl:2: must be a JSON object"),
])
def test_bad_problems_are_named_by_file_and_line(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine", "answer": "1"}\n' + text + "\n")
    with pytest.raises(InputError, match=message):
        read_problems(str(tmp_path / "p.jsonl"))


def one_line(error) -> str:
    """The message of an InputError, which is one line without control characters."""
    message = str(error.value)
    assert message.isprintable() and len(message) < 1500
    return message


@pytest.mark.parametrize("fields, message", [
    ('"answer": {"a": 1}', "the answer must be text or a finite number, got dict"),
    ('"answer": [{"a": 1}]', "the answer must be text or a finite number, got dict"),
    ('"answer": true', "the answer must be text or a finite number, got bool"),
    ('"answer": NaN', "the answer must be text or a finite number, got float"),
    ('"answer": [1, -Infinity]', "the answer must be text or a finite number, got float"),
    ('"answer": null', "the problem or its answer is missing"), ('"answer": []', "is missing or empty"),
    (f'"answer": {"[" * 400}{"]" * 400}', "the answer must be text or a finite number, got list"),
    (f'"answer": {"[" * 99999}{"]" * 99999}', "not a row: maximum recursion depth"),
    (f'"answer": {"9" * 9999}', "not a row: Exceeds the limit"),
    (f'"answer": "{"9" * 10**7}"', "the answer has 10,000,000 characters, and may have 10,000; is it"),
    ('"answer": "\\ud800"', "the answer has half a character"),
    ('"answer": 1, "prompt": "\\udfff"', "the problem has half a character"),
    ('"answer": 1, "dataset": "\\udfff"', "the dataset has half a character"),
    ('"answer": 1, "prompt": {"a": 1}', "the problem must be text or a finite number, got dict"),
    ('"answer": 1, "solution": ["a"]', "the worked solution must be text or a finite number, got list"),
    ('"answer": 1, "prompt": []', "the problem must be text, or a list of one message of the user"),
    ('"answer": 1, "prompt": [{"role": "user"}, {"role": "user"}]', "or a list of one message of the user"),
    ('"answer": 1, "prompt": [{"role": "system", "content": "x"}]', "or a list of one message of the user"),
    ('"answer": 1, "prompt": [{"role": "user", "content": ["x"]}]', "the problem must be text or a finite"),
    ('"answer": 1, "prompt": [{"role": "user"}]', "the problem or its answer is missing or empty"),
    ('"question": "x", "options": "A) 3", "correct": "A"', '"options" must be a list, got str'),
    ('"question": "x", "options": [{}], "correct": "A"', "the option must be text or a finite number"),
    ('"question": {"a": 1}, "answer": "#### 4"', "the problem must be text or a finite number, got dict"),
    ('"question": "x", "answer": {"####": 4}', "the answer must be text or a finite number, got dict"),
    ('"prompt": "fine", "answer": "2"', r"the same problem as .*p\.jsonl:1, with another answer \('1' there"),
])
def test_odd_problems_are_one_line_with_file_and_line(tmp_path, fields, message):
    row = "{" + ("" if '"prompt"' in fields or '"question"' in fields else '"prompt": "x", ') + fields + "}"
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine", "answer": "1"}\n' + row + "\n")
    with pytest.raises(InputError) as error:
        read_problems(str(tmp_path / "p.jsonl"))
    assert re.search(rf"p\.jsonl:2: .*{message}", one_line(error))


def test_a_prompt_may_be_one_message_of_the_user(tmp_path):
    rows = [dict(prompt=[dict(role="user", content="How many?")], answer=7.5), dict(prompt="How many?",
                                                                                    answer="7.5")]
    found = read_problems(write_jsonl(tmp_path / "p.jsonl", rows))
    assert found == [Problem("p", "How many?", "7.5", None)]


# -------------------------------------------------------------------------------------------------- the cache


def row(key: str) -> dict:
    return dict(key=key)


def test_a_cache_drops_a_torn_line_and_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    Cache(str(path), dict(seed=1)).add([row("x"), row("y")])
    with open(path, "ab") as file:
        file.write(b'{"key": "z')
    cache = Cache(str(path), dict(seed=1))
    assert set(cache.rows) == {"x", "y"}
    cache.add([row("z")])
    assert rows_of(path) == [dict(settings=dict(seed=1)), row("x"), row("y"), row("z")]


@pytest.mark.parametrize("torn", [b"", b'{"setti'])
def test_a_cache_that_was_killed_before_its_first_line_begins_anew(tmp_path, torn):
    (tmp_path / "a.jsonl").write_bytes(torn)
    Cache(str(tmp_path / "a.jsonl"), dict(seed=1)).add([row("x")])
    assert rows_of(tmp_path / "a.jsonl") == [dict(settings=dict(seed=1)), row("x")]


def _open_a_cache(path: str) -> None:
    run_command("test", lambda: Cache(path, dict(seed=1)))


def test_a_second_start_does_not_write_beside_the_first(tmp_path):
    first = Cache(str(tmp_path / "a.jsonl"), dict(seed=1))
    first.add([row("x")])
    for status in (2, 0):  # while the first goes on, and then
        (second,) = start_ranks(1, tmp_path, _open_a_cache, first.file.name)
        second.join(60)
        assert second.exitcode == status
        said = (tmp_path / "said-0").read_text()
        assert ("a.jsonl: another process writes there" in said) == (status != 0)
        first.file.close()
    assert rows_of(tmp_path / "a.jsonl") == [dict(settings=dict(seed=1)), row("x")]


def test_a_cache_is_not_continued_with_other_settings(tmp_path):
    path = str(tmp_path / "a.jsonl")
    Cache(path, dict(model="m", temperature=0.8)).add([row("x")])
    with pytest.raises(InputError,
                       match=r"a\.jsonl: was made with temperature = 0\.8, and this is 0\.7; use the same"):
        Cache(path, dict(model="m", temperature=0.7))
    with open(path, "ab") as file:
        file.write(b"not json\n")
    with pytest.raises(InputError, match=r"a\.jsonl:3: not valid JSON"):
        Cache(path, dict(model="m", temperature=0.8))


def test_what_other_ranks_have_drawn_is_read_whatever_their_number_was(tmp_path):
    for rank in (1, 2):
        path = tmp_path / f"a.rank{rank}.jsonl"
        path.write_text(json.dumps(dict(settings=dict(seed=1))) + "\n" + json.dumps(row(f"of {rank}")) + "\n")
    with open(tmp_path / "a.rank2.jsonl", "a") as file:
        file.write('{"key": "torn')
    assert set(Cache(str(tmp_path / "a.jsonl"), dict(seed=1)).rows) == {"of 1", "of 2"}
    (tmp_path / "a.rank2.jsonl").write_text(json.dumps(dict(settings=dict(seed=2))) + "\n")
    with pytest.raises(InputError, match=r"a\.rank2\.jsonl: was made with seed = 2, and this is 1"):
        Cache(str(tmp_path / "a.jsonl"), dict(seed=1))


OURS = b'{"settings": {"seed": 1}}\n{"key": "x", "reply": "a"}\n'
REMOVE, ANOTHER = "remove that line, and what it held is made again$", "choose another --out$"


@pytest.mark.parametrize("content, line, message", [
    (b"my notes\n", 1, f"not valid JSON.*{ANOTHER}"), (b"my notes", 1, f"not valid JSON.*{ANOTHER}"),
    (b'{"mine": 1}\n', 1, f"not written by this command.*'settings'.*{ANOTHER}"),
    (b'{"mine": 1}', 1, f"not written by this command.*{ANOTHER}"), (b"[1]\n", 1, ANOTHER),
    (b"7", 1, ANOTHER),
    (b'{"settings": [1]}\n', 1, ANOTHER), (b"\n" + OURS, 1, ANOTHER), (b"\x1f\x8b\xff\n", 1, "not UTF-8"),
    (b"\0" * 99, 1, ANOTHER), (b'{"settings": {"seed": 2}}', "", "seed = 2, and this is 1"),
    (OURS + b"[1]\n", 3, f"not written by this command.*{REMOVE}"), (OURS + b"null\n", 3, REMOVE),
    (OURS + b'{"reply": "a"}\n', 3, f"look at 'key'.*{REMOVE}"), (OURS + b'{"key": 1}\n', 3, REMOVE),
    (OURS + b'{"key": ["x"], "reply": "a"}\n', 3, REMOVE), (OURS + b'{"key": "y"}\n', 3, "look at 'reply'"),
    (OURS + b'{"key": "y", "reply": null}\n', 3, "look at 'reply'"), (OURS + b"\0\0\0\n", 3, REMOVE),
    (OURS + b"\xff\r\xfe\n" + OURS[26:], 3, f"not UTF-8.*{REMOVE}"), (OURS + b"\n", 3, REMOVE),
    (OURS + b'{"key": "y", "reply": "b"}{"key": "z", "reply": "b"}\n', 3, f"not valid JSON.*{REMOVE}"),
])
@pytest.mark.parametrize("name", ["a.jsonl", "a.rank1.jsonl"])
def test_a_file_that_is_no_cache_is_refused_by_its_line_and_not_touched(tmp_path, name, content, line,
                                                                        message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        Cache(str(tmp_path / "a.jsonl"), dict(seed=1), {"reply": str})
    assert re.search(rf"{re.escape(name)}:{line}.*{message}", one_line(error))
    assert path.read_bytes() == content and os.listdir(tmp_path) == [name]  # and no other was made


def test_a_row_without_what_a_sample_needs_is_refused_by_its_line(tokenizer, tmp_path):
    run_scripted(tmp_path, tokenizer, Scripted(tokenizer), problems=2, command="solve")
    settings, first, *rest = (tmp_path / "out/samples.jsonl").read_text().splitlines(keepends=True)
    for change in (dict(solution=None), dict(correct="no"), dict(cut=0), dict(tokens="5"), dict(predicted=7)):
        changed = json.dumps(json.loads(first) | change) + "\n"
        (tmp_path / "out/samples.jsonl").write_text("".join([settings, *rest, changed]))
        with pytest.raises(InputError, match=rf"samples\.jsonl:5: .*look at '{[*change][0]}'.*; remove that"):
            run_scripted(tmp_path, tokenizer, Scripted(tokenizer), command="solve")


@pytest.mark.parametrize("target", ["absent", "empty", "foreign", "ours"])
def test_a_cache_is_not_written_through_a_link(tmp_path, target):
    content = dict(absent=None, empty=b"", foreign=b"my notes", ours=OURS)[target]
    if content is not None:
        (tmp_path / "target").write_bytes(content)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.jsonl").symlink_to(tmp_path / "target")
    with pytest.raises(InputError) as error:
        Cache(str(tmp_path / "out/a.jsonl"), dict(seed=1))
    assert re.search(r"a\.jsonl: is a link.*; remove the link, or choose another --out", one_line(error))
    assert (tmp_path / "out/a.jsonl").is_symlink() and (tmp_path / "target").exists() == (content is not None)
    assert content is None or (tmp_path / "target").read_bytes() == content


def keep_stderr(path) -> None:
    """What this process says from here on, in a file: pytest knows nothing of the children's."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)


def _add_on_a_full_disk(path, said):
    keep_stderr(said)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    cache = Cache(path, dict(seed=1))
    run_command("test", lambda: [cache.add([row(f"{n:020}")]) for n in range(99)])


def test_on_a_full_disk_what_was_written_before_stays(tmp_path):
    path = str(tmp_path / "a.jsonl")
    child = CHILDREN.Process(target=_add_on_a_full_disk, args=(path, tmp_path / "said"))
    child.start(), child.join()
    assert child.exitcode == 2
    said = (tmp_path / "said").read_text()
    assert re.fullmatch(r"test: error: .*a\.jsonl: cannot be written: File too large\n", said)
    cache = Cache(path, dict(seed=1))
    assert [*cache.rows] == [f"{n:020}" for n in range(5)]
    cache.add([row("x")])
    assert rows_of(path)[-1] == row("x")


def test_what_is_no_file_is_no_cache(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(InputError) as error:
        Cache(str(tmp_path / "a.jsonl"), dict(seed=1))
    assert "a.jsonl: cannot be written: Is a directory" in one_line(error)


# --------------------------------------------------------------------------------------------------- sampling


def local(tiny, tokenizer, **options) -> LocalSampler:
    return LocalSampler(Settings(tiny, **dict(max_new_tokens=24) | options), tokenizer)


def all_of(sampler, wanted) -> list:
    drawn = [pair for batch in sampler.sample(wanted) for pair in batch]
    return [continuation for _, continuation in sorted(drawn)]


def test_greedy_sampling_equals_generate(tiny, tokenizer):
    sampler = local(tiny, tokenizer, temperature=0)
    prompts = [tokenizer(text).input_ids for text in ("a", "What is twice 5, please?", "x y z " * 9)]
    for ids, drawn in zip(prompts, all_of(sampler, [(ids, "n") for ids in prompts]), strict=True):
        out = sampler.model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False,
                                     pad_token_id=0)[0, len(ids):]
        assert drawn.tokens == len(out) and drawn.cut == (out[-1] != tokenizer.eos_token_id)
        assert drawn.text == tokenizer.decode(out, skip_special_tokens=True)


def test_a_sample_depends_on_its_name_and_not_on_its_batch(tiny, tokenizer):
    wanted = [(tokenizer("word " * n).input_ids, f"0 {n} {i}") for n in (1, 5, 9) for i in range(4)]
    many, one = local(tiny, tokenizer), local(tiny, tokenizer, batch_tokens=40)
    many.end_tokens = one.end_tokens = set(range(0, 400, 16))  # so that some end early and leave the batch
    together, apart = all_of(many, wanted), all_of(one, wanted)
    assert together == apart and len(set(together)) > 6
    assert all_of(many, [(ids, name + "!") for ids, name in wanted]) != together
    assert {drawn.cut for drawn in together} == {True, False}


def test_batches_keep_to_their_budget_and_are_halved_when_memory_runs_out(tiny, tokenizer, monkeypatch,
                                                                          capsys):
    sampler, sizes = local(tiny, tokenizer, batch_tokens=300), []
    draw = sampler._draw

    def draw_two(wanted):
        sizes.append(len(wanted) * max(len(ids) + 24 for ids, _ in wanted))  # all are padded to the longest
        if len(wanted) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return draw(wanted)

    monkeypatch.setattr(sampler, "_draw", draw_two)
    wanted = [(tokenizer("w" * n).input_ids, str(n)) for n in range(1, 12)]
    assert len(all_of(sampler, wanted)) == 11 and max(sizes) <= 300
    assert "out of memory: batches are halved" in capsys.readouterr().err

    def fail(wanted):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(sampler, "_draw", fail)
    with pytest.raises(RuntimeError, match="shape"):
        all_of(sampler, wanted)


def test_tokens_are_drawn_from_the_nucleus_in_its_proportions(tiny, tokenizer):
    sampler = local(tiny, tokenizer, temperature=0.5, top_p=0.88)
    logits = torch.tensor([0.0, 1.0, 2.0, 1.5, -3.0]).log_softmax(-1) + torch.zeros(20000, 1)
    drawn = sampler._choose(logits, [(i + 0.5) / 20000 for i in range(20000)])
    chances = (logits[0] / 0.5).softmax(-1).tolist()
    nucleus = {2: chances[2], 3: chances[3]}  # 0.66 + 0.24
    assert sum(nucleus.values()) > 0.88 > chances[2]
    shares = {token: count / 20000 for token, count in Counter(drawn.tolist()).items()}
    expected = {token: chance / sum(nucleus.values()) for token, chance in nucleus.items()}
    assert shares == pytest.approx(expected, abs=1e-3)


def test_a_nucleus_wider_than_a_glance_is_drawn_from_too(tiny, tokenizer):
    sampler = local(tiny, tokenizer, temperature=1.0, top_p=0.5)
    logits = torch.linspace(0, 1e-3, 2000) + torch.zeros(4000, 1)  # flat, so half of them are in
    drawn = set(sampler._choose(logits, [(i + 0.5) / 4000 for i in range(4000)]).tolist())
    assert 950 < len(drawn) < 1050 and min(drawn) > 900


def damaged(tiny, tmp_path, **changed) -> str:
    """A copy of a model folder with other tensors (None: without it)."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None},
              folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("changed, message", [
    ({UP: None}, f"missing: {UP} \\(1 in all\\)"),
    ({UP: torch.zeros(3, 4)}, f"of another shape: {UP} \\(1 in all\\)"),
    ({"extra.weight": torch.zeros(3)}, r"left over: extra\.weight"),
    ({UP: torch.full((64, 32), math.nan)}, f"{UP} holds numbers that are not finite"),
    ({UP: torch.full((64, 32), -math.inf)}, f"{UP} holds numbers that are not finite"),
])
def test_a_model_whose_numbers_are_not_all_in_its_folder_is_refused(tiny, tokenizer, tmp_path, changed,
                                                                    message):
    folder = damaged(tiny, tmp_path, **changed)
    with pytest.raises(InputError) as error:
        all_of(local(folder, tokenizer), [([1], "a")])
    assert re.search(f"{re.escape(folder)}: .*{message}", one_line(error))


def test_frequencies_that_are_computed_anew_may_be_left_over(tiny, tokenizer, tmp_path):
    folder = damaged(tiny, tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert all_of(local(folder, tokenizer, max_new_tokens=2), [([1], "a")])


@pytest.mark.parametrize("file, change, message", [
    ("config.json", dict(model_type="nonesuch"), "ValueError: .*nonesuch"),
    ("config.json", dict(hidden_size="x"), "hidden_size"),
    ("config.json", "{", "config"), ("config.json", "[1]", "config"),
    ("generation_config.json", dict(eos_token_id=[[1]]), "TypeError: int"),
    ("model.safetensors", "too short", "SafetensorError"), ("model.safetensors", None, "no file named"),
])
def test_an_odd_model_folder_is_one_line(tiny, tokenizer, tmp_path, file, change, message):
    folder = shutil.copytree(tiny, tmp_path / "model")
    if change is None:
        (folder / file).unlink()
    elif isinstance(change, str):
        (folder / file).write_text(change)
    else:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(InputError) as error:
        all_of(local(str(folder), tokenizer), [([1], "a")])
    assert re.search(f"{re.escape(str(folder))}: .*({message})", one_line(error))


@pytest.mark.parametrize("content", [None, "{", '{"tokenizer_class": "Nonesuch"}'])
def test_an_odd_tokenizer_is_one_line(tmp_path, content):
    if content:
        (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError) as error:
        read_tokenizer(str(tmp_path))
    assert f"{tmp_path}: its tokenizer cannot be read (" in one_line(error)


def test_nothing_runs_code_that_came_with_a_model(tiny, tokenizer, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= dict(auto_map=dict(AutoConfig="code.C", AutoModelForCausalLM="code.M"), model_type="its_own")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    with pytest.raises(InputError) as error:
        all_of(local(str(folder), tokenizer), [([1], "a")])
    assert str(folder) in one_line(error) and not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("generation, named", [
    (dict(eos_token_id=None), []), (dict(), []), (None, []), (dict(eos_token_id=7), [7]),
    (dict(eos_token_id=[8, 7]), [7, 8])])
def test_a_model_may_say_nothing_of_its_end_tokens(tiny, tokenizer, generation, named):
    sampler = local(tiny, tokenizer)
    if generation is not None:
        generation = argparse.Namespace(**generation)
    sampler.model = argparse.Namespace(generation_config=generation)
    assert sampler.end_tokens == {tokenizer.eos_token_id, *named}


def test_a_sample_ends_where_the_model_has_no_more_positions(tiny, tokenizer, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=20)))
    ids = tokenizer("w " * 50).input_ids
    for length in (1, 10, 19):
        wide, narrow = local(tiny, tokenizer), local(str(folder), tokenizer)
        wide.end_tokens = narrow.end_tokens = set()
        (longer,), (drawn,) = [all_of(sampler, [(ids[:length], "a")]) for sampler in (wide, narrow)]
        assert drawn.tokens == min(24, 20 - length) and drawn.cut
        assert longer.text.startswith(drawn.text) and longer.tokens == 24

    sampler = local(str(folder), tokenizer)
    with pytest.raises(InputError) as error:
        all_of(sampler, [([1], "a"), (tokenizer("Tom has 3 boxes" + " w" * 30).input_ids, "b")])
    assert re.search(r"20 tokens at most.*has \d+; remove its problem: 'Tom has 3 boxes w", one_line(error))


def test_logits_that_are_not_finite_are_no_samples(tiny, tokenizer):
    sampler = LocalSampler(Settings(tiny, temperature=0.5), tokenizer)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match="its logits are not finite"):
            sampler._choose(torch.tensor([[0.0, bad]]), [0.5])
    # Some models set tokens that are forbidden to the lowest number there is.
    lowest = torch.finfo(torch.float32).min
    assert sampler._choose(torch.tensor([[lowest, 0.0, lowest, lowest]]), [0.5]).tolist() == [1]


def test_no_pickled_weights_are_read(tiny, tokenizer, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/pytorch_model.bin")
    with pytest.raises(InputError, match="m: "):
        _ = LocalSampler(Settings(str(tmp_path / "m")), tokenizer).model


def test_a_tokenizer_of_another_model_is_refused(tiny, tokenizer):
    with pytest.raises(InputError) as error:
        all_of(local(tiny, tokenizer), [([1], "a"), ([5, len(tokenizer), 1], "b")])
    assert re.search(rf"{re.escape(tiny)}: its tokenizer gives token {len(tokenizer)}, but", one_line(error))


# ----------------------------------------------------------------------------------------------------- server


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server that refuses whatever is not exactly in order, and fails as `faults` says,
    one after the other: a status, with headers in a tuple, what happens to the connection, or the bytes of a
    whole reply. `answer(path, body)` gives the text, `models` what /v1/models replies."""

    daemon_threads, request_queue_size, models = True, 100, None

    def __init__(self, answer, faults=(), key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.faults, self.key, self.lock = answer, list(faults), key, threading.Lock()
        self.served, self.tried, self.now, self.most = [], 0, 0, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, code, body, headers=(), cut=0):
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in dict(headers, **{"Content-Type": "application/json",
                                            "Content-Length": len(text) - cut}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text[:len(text) - cut])

    def do_GET(self):
        self.reply(404 if self.server.models is None else 200, self.server.models)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.tried, server.now = server.tried + 1, server.now + 1
            server.most, fault = max(server.most, server.now), server.faults.pop(0) if server.faults else None
        try:
            reply = self.reply_to(body, fault)
        finally:
            with server.lock:
                server.now -= 1
        if reply:  # sent once all is counted: what a test looks at next does not depend on this thread
            self.reply(*reply)

    def reply_to(self, body, fault):
        server = self.server
        sampling = dict(model=str, temperature=(int, float), max_tokens=int, stream=bool)
        chat = self.path == "/v1/chat/completions"
        fields = sampling | (dict(messages=list) if chat
                             else dict(prompt=list, n=int, top_p=(int, float), seed=int, top_k=int,
                                       min_p=float, repetition_penalty=float, presence_penalty=float,
                                       frequency_penalty=float))
        if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            return 401, dict(error=f"no such key: {self.headers['Authorization']}")
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            return 404, dict(error="no such path")
        if body.keys() != fields.keys() or not all(isinstance(body[name], kind) for name,
                                                   kind in fields.items()):
            return 400, dict(error=f"bad fields {sorted(body)}")
        if isinstance(fault, tuple):
            return fault[0], dict(error="try later"), fault[1]
        if isinstance(fault, bytes):
            return 200, fault
        if isinstance(fault, int):
            return fault, dict(error=f"fault {fault} {self.headers['Authorization']}")
        if fault == "hang":
            return time.sleep(10)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        text = server.answer(self.path, body)
        choice = dict(message=dict(role="assistant", content=text)) if chat else dict(text=text)
        reply = dict(choices=[choice | dict(index=0, finish_reason="stop")],
                     usage=dict(prompt_tokens=1, completion_tokens=len(text.split()), total_tokens=2))
        if fault == "nonsense":
            return 200, dict(hello=1)
        if fault == "truncated":
            return 200, reply, (), 20
        with server.lock:
            server.served.append(body)
        return 200, reply


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0.01), monkeypatch.setattr(client, "TIMEOUT", 30)
    servers = []
    yield lambda *args, **options: servers.append(Server(*args, **options)) or servers[-1]
    for server in servers:
        server.shutdown(), server.server_close()


def solve_on(server, tokenizer, tmp_path, *flags):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "p.jsonl",
                       [dict(prompt=f"Problem {i}?", answer=str(i)) for i in range(20)])
    command_line.main(["solve", "--model", str(tmp_path / "tokenizer"), "--server", server.url,
                       "--server-model=m", "--problems", path, "--out", str(tmp_path / "out"), *flags])


def samples_in(folder) -> list[dict]:
    """The rows of a folder's samples.jsonl, behind the settings."""
    return rows_of(Path(folder) / "samples.jsonl")[1:]


def echo(tokenizer):
    """The right answer for even problems, and always the same text for the same prompt."""
    def answer(path, body):
        number = int(re.findall(r"Problem (\d+)\?", tokenizer.decode(body["prompt"]))[0])
        return f" it is so.\nThe answer is: {number + number % 2}"
    return answer


def test_through_every_fault_of_a_server_nothing_is_lost_and_nothing_doubled(serve, tokenizer, tmp_path,
                                                                             monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    faults = [(429, {"Retry-After": "0.3"}), 500, "reset", "truncated", "hang", 503,
              (429, {"Retry-After": "soon"}), 408, "reset", "truncated", 502]
    monkeypatch.setattr(client, "TIMEOUT", 2)
    server = serve(echo(tokenizer), faults, key="sk-very-secret")
    solve_on(server, tokenizer, tmp_path, "--concurrency=4")
    rows = samples_in(tmp_path / "out")
    assert len(rows) == len({row["key"] for row in rows}) == 40 <= len(server.served)
    assert server.tried >= 40 + len(faults) and server.most <= 5  # one may still hang, the next begin
    assert sum(row["correct"] for row in rows) == 20 and all(row["tokens"] == 7 for row in rows)
    assert len({body["seed"] for body in server.served}) == 40  # samples of one problem differ
    prompt = tokenizer.decode(server.served[0]["prompt"])
    assert prompt.endswith("<|im_start|>assistant\nLet's think step by step.\nStep 1:")
    assert prompt.count("<|im_start|>") == 2
    text = capsys.readouterr()
    assert "sk-very" not in text.out + text.err + (tmp_path / "out/samples.jsonl").read_text()


def test_retry_after_is_waited_for(serve):
    server, began = serve(lambda path, body: "", [(429, {"Retry-After": "0.7"})]), time.monotonic()
    body = dict(model="m", messages=[], max_tokens=1, temperature=0, stream=False)
    assert client.fetch(f"{server.url}/v1/chat/completions", body)["choices"]
    assert time.monotonic() - began > 0.7


@pytest.mark.parametrize("fault, tries, message", [
    (500, 6, "gave up after 6 tries, the last: 500"),
    ("reset", 6, "gave up after 6 tries, the last: Connection"),
    (400, 1, "400 Bad Request: .*fault 400"), (401, 1, "401 Unauthorized: .*fault 401"),
    ("nonsense", 1, "not the reply of an OpenAI-compatible server .*hello"),
])
def test_a_server_that_keeps_failing_is_an_error_that_says_how(
        serve, tokenizer, tmp_path, monkeypatch, capsys, fault, tries, message):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server = serve(echo(tokenizer), [fault] * 99)
    with pytest.raises(SystemExit):
        solve_on(server, tokenizer, tmp_path, "--concurrency=1")
    said = capsys.readouterr().err
    assert re.search(f"(?s)/v1/completions: .*{message}", said)
    assert server.tried == tries  # and no other request was begun
    assert "sk-very" not in said
    server.faults.clear()
    solve_on(server, tokenizer, tmp_path)  # and then the same command continues
    assert len(samples_in(tmp_path / "out")) == 40


def test_no_server_at_all(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(client, "PAUSE", 0.0)
    nowhere = argparse.Namespace(url="http://127.0.0.1:9")
    with pytest.raises(SystemExit):
        solve_on(nowhere, tokenizer, tmp_path)
    assert re.search("gave up after 6 tries, the last: URLError.*refused", capsys.readouterr().err)


def sampler_on(server, tokenizer, **options) -> sampling.ServerSampler:
    return sampling.ServerSampler(Settings("t", server=server.url, server_model="m", **options), tokenizer)


def test_no_field_of_sampling_is_left_to_the_defaults_of_a_server(serve, tokenizer):
    server = serve(lambda path, body: "so")
    all_of(sampler_on(server, tokenizer, temperature=0.5, top_p=0.9, max_new_tokens=7), [([1, 2], "a")])
    (body,) = server.served
    assert body == dict(model="m", prompt=[1, 2], n=1, max_tokens=7, temperature=0.5, top_p=0.9, top_k=-1,
                        min_p=0, repetition_penalty=1, presence_penalty=0, frequency_penalty=0, stream=False,
                        seed=body["seed"])


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_is_too_strict_is_told_apart(serve, tokenizer, status):
    with pytest.raises(InputError) as error:
        all_of(sampler_on(serve(None, [status]), tokenizer), [([1], "a")])
    assert re.search(rf"{status} .*fields sent are model, .*, repetition_penalty, top_k.* \(vLLM takes these,"
                     " best started with `--generation-config vllm`", one_line(error))


def reply_with(**changed) -> bytes:
    return json.dumps(dict(choices=[dict(text=" two words", finish_reason="stop") | changed],
                           usage=dict(completion_tokens=2))).encode()


@pytest.mark.parametrize("reply, message", [
    (b'{"choices": []}', "IndexError"), (b'{"choices": null}', "TypeError"),
    (b'{"choices": {}}', "KeyError"),
    (b"[1]", "TypeError"), (b"null", "TypeError"), (b'"text"', "TypeError"), (b"{}", "KeyError: 'choices'"),
    (b'{"choices": [[1]]}', "TypeError"), (b'{"choices": ["a"]}', "TypeError"),
    (reply_with(text=None), "AttributeError.*NoneType"), (reply_with(text=["a"]), "AttributeError.*list"),
    (reply_with(text="\ud800"), "surrogates not allowed"), (reply_with(finish_reason="abort"), "is 'abort'"),
    (reply_with(finish_reason=None), "finish_reason is None"), (reply_with(finish_reason=[1]), r"is \[1\]"),
    (reply_with(text="x" * 10**7), "text of 10000000 characters, more than max_tokens can be"),
    (b"\xff\xfe\xff", "UnicodeDecodeError"), (b"<html>\n", "JSONDecodeError"), (b"", "JSONDecodeError"),
    (b"[" * 99999, "RecursionError"),
])
def test_an_odd_reply_is_one_line(serve, tokenizer, monkeypatch, reply, message):
    monkeypatch.setattr(client, "PAUSE", 0)
    with pytest.raises(InputError) as error:
        all_of(sampler_on(serve(None, [reply] * 6), tokenizer), [([1], "a")])
    assert re.search(f"v1/completions: (not the reply of|gave up after 6).*{message}", one_line(error))


@pytest.mark.parametrize("usage, counted", [
    (dict(completion_tokens=5), 5), (dict(completion_tokens=0), 0), (None, None), ({}, None), ([1], None),
    (dict(completion_tokens=None), None), (dict(completion_tokens="5"), None), ("absent", None),
    (dict(completion_tokens=5.5), None), (dict(completion_tokens=True), None),
    (dict(completion_tokens=-1), None),
])
def test_tokens_that_a_server_does_not_count_are_counted_here(serve, tokenizer, usage, counted):
    reply = json.loads(reply_with(finish_reason="length"))
    reply["usage"] = usage
    if usage == "absent":
        del reply["usage"]
    (drawn,) = all_of(sampler_on(serve(None, [json.dumps(reply).encode()]), tokenizer), [([1], "a")])
    here = len(tokenizer(" two words").input_ids)
    assert here > 1 and drawn == Continuation(" two words", here if counted is None else counted, True)


@pytest.mark.parametrize("models, identity", [
    (dict(data=[dict(id="m", root="org/model"), dict(id="x", root="y")]), "m (org/model)"),
    (dict(data=[dict(id="m", root="m")]), "m"), (dict(data=[dict(id="m", root=None)]), "m"),
    (dict(data=[dict(id="m")]), "m"), (None, "m"), (b"<html>", "m"), (dict(data=None), "m"), ([1], "m"),
    (dict(error="no"), "m"), (dict(data=[dict(name="m")]), "m"), (dict(data=["m"]), "m"),
    (dict(data=[dict(id=["m"])]), "m"),
])
def test_a_model_on_a_server_is_known_by_what_it_was_loaded_from(serve, monkeypatch, models, identity):
    monkeypatch.setattr(client, "PAUSE", 0)
    server = serve(None)
    server.models = models
    assert Settings("t", server=server.url, server_model="m").identity()["model"] == identity
    assert client.served_model(server.url + "/v1/", "m") == identity


def test_samples_of_a_model_that_was_changed_behind_its_name_are_not_mixed(serve, tokenizer, tmp_path,
                                                                           capsys):
    server = serve(echo(tokenizer))
    server.models = dict(data=[dict(id="m", root="org/one")])
    solve_on(server, tokenizer, tmp_path)
    server.models = dict(data=[dict(id="m", root="org/two")])
    with pytest.raises(SystemExit):
        solve_on(server, tokenizer, tmp_path)
    said = capsys.readouterr().err
    assert r"was made with model = 'm (org/one)', and this is 'm (org/two)'" in said


@pytest.mark.parametrize("ids, listed", [(["a", "b"], "a, b"), ([], "nothing"), ([7], "7")])
def test_a_model_that_a_server_does_not_have_is_an_error_that_lists_those_it_has(serve, ids, listed):
    server = serve(None)
    server.models = dict(data=[dict(id=name) for name in ids])
    with pytest.raises(InputError) as error:
        client.served_model(server.url, "m")
    assert one_line(error) == f"{server.url}: does not serve 'm' (--server-model), but: {listed}"


@pytest.mark.parametrize("key", ["sk-very-secret", 'sk"very/se\\cret', "sk very secret"])
@pytest.mark.parametrize("fault", ['["{0}"]', '{{"choices": [{{"text": ["{0}"]}}]}}', "status", "reason",
                                   "header"])
def test_the_key_is_in_no_message(serve, monkeypatch, tokenizer, key, fault):
    monkeypatch.setenv("OPENAI_API_KEY", f" {key}\n")
    monkeypatch.setattr(client, "PAUSE", 0)
    escaped = json.dumps(key)[1:-1].replace("/", "\\/")
    server = serve(None, [500 if fault == "status" else fault.format(escaped).encode()] * 6)
    if fault in ("reason", "header"):  # what urllib and http.client say of a reply that is no HTTP
        begin = f"HTTP/1.1 403 No: {key}\r\n\r\n" if fault == "reason" else f"{key}\r\n\r\n"
        monkeypatch.setattr(Handler, "reply", lambda self, *_: self.wfile.write(begin.encode()))
    with pytest.raises(InputError) as error:
        all_of(sampler_on(server, tokenizer), [([1], "a")])
    message = one_line(error)
    assert "***" in message
    for part in (key, escaped, key[4:], key[:8]):
        assert part not in message


def test_a_long_message_is_not_cut_within_the_key(serve, monkeypatch, tokenizer):
    key = "sk-" + "secret" * 20
    monkeypatch.setenv("OPENAI_API_KEY", key)
    for before in range(200, 520, 20):
        reply = json.dumps(dict(error="x" * before + key)).encode()
        with pytest.raises(InputError) as error:
            all_of(sampler_on(serve(None, [reply]), tokenizer), [([1], "a")])
        assert "secret" not in one_line(error)


@pytest.mark.parametrize("spelled", ["sk-Very secret", "sk%2DVery%20secret", r"sk\u002dVery\u0020secret",
                                     "SK-VERY SECRET", r"sk\-Very secret"])
def test_the_key_is_masked_however_it_is_spelled(monkeypatch, spelled):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-Very secret")
    assert client.shown(f"no such key: {spelled}!") == "no such key: ***!"


def test_another_host_gets_no_key_and_makes_no_samples(serve, monkeypatch, tokenizer):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    other = serve(echo(tokenizer))
    server = serve(echo(tokenizer), [(302, {"Location": f"{other.url}/v1/completions"})])
    with pytest.raises(client.Refused, match="302 Found"):
        all_of(sampler_on(server, tokenizer), [([1], "a")])
    assert other.tried == 0


def test_a_reply_without_end_ends(serve, monkeypatch, tokenizer):
    monkeypatch.setattr(client, "LARGEST_REPLY", 1000)
    server = serve(echo(tokenizer), [b" " * 10_000] * 6)
    with pytest.raises(client.Refused, match="more than 1000 bytes"):
        all_of(sampler_on(server, tokenizer), [([1], "a")])

    class Dripping:
        def read1(self, size):
            return b" "
    monkeypatch.setattr(client, "LARGEST_REPLY", 10**9)
    monkeypatch.setattr(client, "TIMEOUT", 0.1)
    with pytest.raises(TimeoutError, match="took more than 0.1 s"):
        client.read_all(Dripping())


@pytest.mark.parametrize("key", ["sk-s\u00e9cret", "sk-sec\nret", "sk-sec\x7fret", "\u201csk-secret\u201d"])
def test_a_key_that_cannot_be_one_is_refused_at_once_and_not_printed(tokenizer, tmp_path, monkeypatch, capsys,
                                                                     key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit):
        solve_on(argparse.Namespace(url="http://127.0.0.1:9"), tokenizer, tmp_path)
    said = capsys.readouterr().err
    assert said == "pairs solve: error: OPENAI_API_KEY: holds a character that no key has; set it again\n"


# ------------------------------------------------------------------------------------------------- the stages


class Scripted:
    """A model whose true first error is known. A problem has n steps, each of which goes wrong with the
    problem's own chance; once wrong, later steps are wrong too, but a step repairs all by chance `recovery`.
    The answer is right if the last step is. A word is a token. `stop_at`: KeyboardInterrupt after so many
    batches."""

    recovery, stop_at, drawn, nap = 0.1, math.inf, 0, 0.0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def sample(self, wanted):
        for at in range(0, len(wanted), 16):
            if self.stop_at <= 0:
                raise KeyboardInterrupt
            self.stop_at -= 1
            time.sleep(self.nap)
            batch = [(i, self.go_on(*wanted[i])) for i in range(at, min(at + 16, len(wanted)))]
            self.drawn += len(batch)
            yield batch

    def go_on(self, ids, name):
        text, numbers = self.tokenizer.decode(ids), random.Random(name)
        chance, n = re.findall(r"(\d+) percent of (\d+) steps", text)[-1]
        steps = text.rpartition("Step 1:")[2].split("\n")[:-1] if "\nStep 2:" in text else []
        wrong, lines = bool(steps) and "wrong" in steps[-1], []
        for k in range(len(steps) + 1, int(n) + 1):
            wrong = numbers.random() >= self.recovery if wrong else numbers.random() < int(chance) / 100
            heading = f"Step {k}:" if lines else ""
            way = numbers.randrange(3)
            lines.append(f"{heading} {'wrong' if wrong else 'right'} step {k} way {way}, worked out")
        text = "\n".join([*lines, f"The answer is: {8 if wrong else 7}"])
        return Continuation(text, len(text.split()), False)


def true_error(solution: str) -> int:
    """The first step after which all is wrong: the last run of wrong steps begins there."""
    wrong = ["wrong" in step for step in [step.text for step in find_steps(solution)]]
    return len(wrong) - [*reversed(wrong), False].index(False) + 1


def scripted_problems(folder, count: int = 60) -> str:
    rows = [dict(prompt=f"Problem {i}: {(5, 10, 20, 60)[i % 4]} percent of {3 + i % 6} steps", answer="7")
            for i in range(count)]
    return write_jsonl(Path(folder) / "problems.jsonl", rows)


def run_scripted(folder, tokenizer, sampler, *flags, problems=60, command="build"):
    path = Path(folder) / "problems.jsonl"
    if not path.exists():
        scripted_problems(folder, problems)
    args = command_line.parse([command, "--model=scripted", "--problems", str(path), "--out",
                               str(Path(folder) / "out"), *flags])
    command_line.run(args, sampler=sampler, tokenizer=tokenizer)


def outputs(folder) -> dict:
    return {path.name: path.read_text() for path in (Path(folder) / "out").glob("*.jsonl")
            if path.name.startswith(("located", "pairs"))}


@pytest.fixture(scope="session")
def built(tokenizer, tmp_path_factory):
    """One whole build, without a stop, that others are compared with."""
    folder, sampler = tmp_path_factory.mktemp("built"), Scripted(tokenizer)
    run_scripted(folder, tokenizer, sampler)
    return folder, sampler.drawn


def test_localization_finds_the_true_error_of_a_model_that_can_recover(tokenizer, tmp_path, capsys):
    run_scripted(tmp_path, tokenizer, Scripted(tokenizer), problems=240)
    out = tmp_path / "out"
    located = [row for row in rows_of(out / "located_by_rollouts.jsonl") if row["step"]]
    hits = sum(row["step"] == true_error(row["solution"]) for row in located)
    drawn, pairs = samples_in(out), rows_of(out / "pairs.jsonl")
    length = sum(row["tokens"] for row in drawn[:480]) / 480  # of the solutions, which are drawn first
    cost = sum(row["tokens"] for row in drawn[480:]) / len(located) / length
    good = sum("right" in pair["chosen"] and "wrong" in pair["rejected"] for pair in pairs)
    print(f"\nlocated {len(located)}, exact {hits / len(located):.0%}, cost {cost:.1f} solution lengths "
          f"each, {len(pairs)} pairs, {good / len(pairs):.0%} good")
    assert len(located) >= 45 and hits >= 0.8 * len(located)
    assert cost < 85
    assert len(pairs) >= 40 and good >= 0.85 * len(pairs)


def test_pairs_are_rows_that_training_reads_unchanged(built, tokenizer):
    path = built[0] / "out" / "pairs.jsonl"
    pairs = rows_of(path)
    names = {"answer", "chosen", "dataset", "full_chosen", "full_rejected", "initial_reason_steps", "prompt",
             "rejected"}
    for pair in pairs:
        assert pair.keys() == names and all(isinstance(value, str) for value in pair.values())
        assert re.search(r"\nStep \d+:$", pair["initial_reason_steps"]) and pair["chosen"].startswith(" ")
        assert pair["full_chosen"].startswith(pair["chosen"])
        assert pair["full_rejected"].startswith(pair["rejected"])
        assert is_correct(pair["full_chosen"], pair["answer"])
        assert not is_correct(pair["full_rejected"], pair["answer"])
    assert len(pairs_of(read_rows(str(path)), "training", tokenizer, default_flags())) == len(pairs) > 10
    rejected = Counter((pair["prompt"], pair["initial_reason_steps"], stages.simplified(pair["rejected"]))
                       for pair in pairs)
    assert max(rejected.values()) == 1 and max(Counter(pair["prompt"] for pair in pairs).values()) <= 4


def test_every_solution_is_counted_once(built, tokenizer, capsys):
    folder, _ = built
    run_scripted(folder, tokenizer, None)  # all is there: nothing is sampled, only counted again
    text = capsys.readouterr().out
    count = {name: int(number.replace(",", ""))
             for name, number in re.findall(r"^(\w+) +([\d,]+)$", text, re.M)}
    drops = [int(number) for number in re.findall(r"^ +(-\d+)  \w", text, re.M)]
    assert count["solutions"] == 120 and count["wrong"] + sum(drops) == count["rectified"]
    assert len(rows_of(folder / "out/located_by_rollouts.jsonl")) == count["wrong"]
    assert len(rows_of(folder / "out/pairs.jsonl")) == count["rectified"]
    assert "none of the first 4 samples of the problem passes" in text and "\n0 tokens sampled" in text


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3, 8])
def test_a_build_stopped_after_every_few_batches_ends_as_one_that_was_not(built, tokenizer, tmp_path, every):
    samples = 0
    for _ in range(1000):
        sampler = Scripted(tokenizer)
        sampler.stop_at = every
        try:
            run_scripted(tmp_path, tokenizer, sampler)
            break
        except KeyboardInterrupt:
            samples += sampler.drawn
    assert outputs(tmp_path) == outputs(built[0])
    assert samples + sampler.drawn == built[1]  # and no sample was drawn twice


def _build_in_a_child(folder, tokenizer):
    if os.environ["WORLD_SIZE"] != "1":
        torch.distributed.init_process_group("gloo")
    sampler = Scripted(tokenizer)
    sampler.nap = 0.02
    run_scripted(folder, tokenizer, sampler)


def start_children(folder, tokenizer, ranks) -> list:
    scripted_problems(folder)
    return start_ranks(ranks, folder, _build_in_a_child, folder, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_build_killed_again_and_again_ends_as_one_that_was_not(built, tokenizer, tmp_path, ranks):
    for kills in range(200):
        children = start_children(tmp_path, tokenizer, ranks)
        children[0].join(0.35 + 0.03 * kills)  # longer each time, or a slow machine would never end
        if children[0].exitcode is not None:
            [child.join() for child in children]
            break
        for child in children:
            child.kill()  # which may have ended by itself, as the other is gone
            child.join()
    assert all(child.exitcode == 0 for child in children) and kills >= 3
    assert outputs(tmp_path) == outputs(built[0])


def test_ranks_share_the_work_and_make_the_same_pairs_in_the_same_order(built, tokenizer, tmp_path):
    children = start_children(tmp_path, tokenizer, 3)
    [child.join(60) for child in children]
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert outputs(tmp_path) == outputs(built[0])
    drawn = [rows_of(tmp_path / f"out/samples{rank}.jsonl")[1:] for rank in ("", ".rank1", ".rank2")]
    assert sum(map(len, drawn)) == built[1] and min(map(len, drawn)) > built[1] / 5


def test_another_model_template_or_setting_is_never_mixed_in(built, tokenizer):
    for flag, name in (("--temperature=0.7", "temperature"), ("--seed=1", "seed"),
                       ("--template=alpaca", "template"), ("--model=other", "model"),
                       ("--max-new-tokens=9", "max_new")):
        with pytest.raises(InputError, match=rf"samples\.jsonl: was made with {name}.*same setting"):
            run_scripted(built[0], tokenizer, None, flag)


def test_other_thresholds_use_the_same_samples(built, tokenizer, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/samples.jsonl").write_bytes((built[0] / "out/samples.jsonl").read_bytes())
    sampler = Scripted(tokenizer)
    run_scripted(tmp_path, tokenizer, sampler, "--certainty=0.99", "--max-rollouts=32")
    assert sampler.drawn < built[1] / 10
    assert len(rows_of(tmp_path / "out/pairs.jsonl")) < len(rows_of(built[0] / "out/pairs.jsonl"))


def test_the_chances_of_steps_follow_bayes_rule():
    passed, drawn = [3, 2, 1, 0], [4, 2, 8, 4]
    likelihoods = []
    for k in range(1, 5):  # good to go on from are 0 .. k-1 steps
        grid = [(rate, part) for rate in stages.RATES[:, 0] for part in (0.02, 0.2 / 10**0.5, 0.2)]
        likelihoods.append(sum(math.prod(
            p**passed[j] * (1 - p)**(drawn[j] - passed[j])
            for j, p in enumerate([rate] * k + [part * rate] * (4 - k))) for rate, part in grid))
    expected = np.array(likelihoods) / sum(likelihoods)
    np.testing.assert_allclose(stages.chances_of_steps(passed, drawn, 0.2), expected, rtol=1e-9)
    np.testing.assert_allclose(stages.chances_of_steps([0] * 5, [0] * 5, 0.2), np.full(5, 0.2))
    assert stages.chances_of_steps([40, 0, 38, 1, 0], [64, 0, 64, 64, 0], 0.2).argmax() == 2
    assert stages.chances_of_steps([0], [4], 0.2) == 1  # the only step is the wrong one, whatever was drawn


def make_wrong(text: str, **known) -> stages.Wrong:
    solution = STEPS + "Step 1:" + text
    return stages.Wrong(Problem("d", "p", "7", None), solution, find_steps(solution), **known)


def sample_of(text: str) -> sampling.Sample:
    return sampling.Sample(STEPS + "Step 1:" + text, "7", True, False, 5)


def test_which_wrong_solutions_are_not_searched_and_why():
    problem, end = Problem("d", "p", "7", None), " x\nStep 2: y\nThe answer is: 8"
    wrong = sample_of(end)._replace(predicted="8", correct=False)
    solutions = [wrong, sample_of(end), wrong, wrong._replace(solution=wrong.solution + "!", cut=True),
                 wrong._replace(solution="So I spend $7 in all.", predicted=None),
                 wrong._replace(solution="The answer is: 8"), wrong._replace(solution=wrong.solution + "?")]
    args = command_line.parse(["build", "--model=m", "--problems=p", "--out=o", "--per-problem=1"])
    wrongs = stages.wrong_solutions([(problem, solution) for solution in solutions], args)
    assert [wrong.reason for wrong in wrongs] == [
        "", "the same as another", "cut at --max-new-tokens", "no answer is found in it",
        "not numbered Step 1: to Step n:", "more than --per-problem"]


class Drawn:
    """In place of Samples: pass rates by the text that is gone on from."""

    def __init__(self, rates: dict[str, float], first: list):
        self.rates, self.first, self.asked = rates, first, []

    def draw(self, prefixes, count, first=0, label=""):
        if not self.asked:  # the first samples asked for are those that go on before the wrong step
            self.asked.append(None)
            return [self.first for _ in prefixes]
        self.asked += [prefix for _, prefix in prefixes]
        drawn = []
        for _, prefix in prefixes:
            rate = next(rate for text, rate in self.rates.items() if text in prefix)
            drawn.append([sampling.Sample("", "7", n < rate * count, False, 1) for n in range(count)])
        return drawn


def test_a_chosen_step_must_be_as_good_to_go_on_from_and_of_sane_length():
    end = "\nStep 2: end\nThe answer is: 7"
    texts = [" x", " x", " x", " far too long" * 9, " Wrong  thing", " bad luck here", " bad luck here",
             " fine thing"]
    first = [sample_of(text + end) for text in texts]
    first += [sample_of(" no")._replace(correct=False)] * 12  # 8 of 20 pass
    args = command_line.parse(["build", "--model=m", "--problems=p", "--out=o"])

    row = make_wrong(" wrong thing\nStep 2: end\nThe answer is: 8", step=1)
    drawn = Drawn({"bad luck": 1 / 8, "": 1}, first)  # 1/8 < 8/20
    pairs = stages.rectify([row], drawn, None, args)
    assert [pair["chosen"] for pair in pairs] == [" fine thing"] and not row.status
    assert drawn.asked[1].endswith(" bad luck here\nStep 2:")  # the most frequent first, but not " x"

    row = make_wrong(" wrong thing\nStep 2: end\nThe answer is: 8", step=1)
    assert stages.rectify([row], Drawn({"": 0}, first), None, args) == []
    assert row.status == "rectified: no chosen step passes --check"


def test_a_step_is_rejected_once_unless_more_pairs_are_asked_for_and_then_in_different_ones():
    end = "\nStep 2: end\nThe answer is: 7"
    first = [sample_of(text + end) for text in (" one thing", " one thing", " other thing", " third thing")]
    for most, chosen in ((1, [" one thing"]), (2, [" one thing", " other thing"])):
        args = command_line.parse(["build", "--model=m", "--problems=p", "--out=o",
                                   f"--pairs-per-step={most}"])
        rows = [make_wrong(f" wrong thing\nStep 2: end {i}\nThe answer is: 8", step=1) for i in range(2)]
        pairs = stages.rectify(rows, Drawn({"": 1}, first), None, args)
        assert [pair["chosen"] for pair in pairs] == chosen
        assert [row.status for row in rows] == [
            "", "rectified: the step is already rejected in another pair"]


def test_a_sample_that_was_cut_off_does_not_pass(tokenizer, tmp_path):
    class Cut:
        def sample(self, wanted):
            yield [(0, Continuation(" so\nThe answer is: 7", 5, True)),
                   (1, Continuation(" so\nThe answer is: 7\nAnd on and", 5, True))]

    run_scripted(tmp_path, tokenizer, Cut(), command="solve", problems=1)
    rows = samples_in(tmp_path / "out")
    assert [(row["predicted"], row["correct"]) for row in rows] == [(None, False), ("7", True)]
    assert not sample_of("")._replace(cut=True).passes


def test_if_every_solution_is_right_there_are_no_pairs(tokenizer, tmp_path):
    class Right:
        def sample(self, wanted):
            yield [(i, Continuation(" so\nThe answer is: 7", 5, False)) for i in range(len(wanted))]

    run_scripted(tmp_path, tokenizer, Right(), problems=3)
    assert (tmp_path / "out/pairs.jsonl").read_text() == ""


def test_evaluation_prints_accuracy_with_its_interval(tokenizer, tmp_path, capsys):
    run_scripted(tmp_path, tokenizer, Scripted(tokenizer), "--samples=1", command="solve", problems=200)
    right = sum(row["correct"] for row in samples_in(tmp_path / "out"))
    low, high = wilson_interval(right, 200)
    shown = f"accuracy {right / 200:.1%} ({right} of 200, 95% interval {low:.1%} to {high:.1%}); 0 without"
    assert shown in capsys.readouterr().out
    assert wilson_interval(0, 100) == pytest.approx((0, 0.0370), abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


# ----------------------------------------------------------------------------------------- a judge and people


@pytest.mark.parametrize("reply, steps, found", [
    ("It adds wrongly.\nVerdict:\nStep 1: correct\nStep 2: incorrect", 3, 2),
    ("Verdict:\nStep 1: neutral\nStep 2: correct\nStep 3: neutral", 3, 0),
    ("Verdict: Step 1: correct; Step 2: neutral; Step 3: incorrect.", 3, 3),
    ("Verdict:\n**Step 1: incorrect**\n", 3, 1),
    ("First I thought Verdict:\nStep 1: incorrect\nbut no. Verdict:\nStep 1: correct", 1, 0),
    ("Verdict:\nStep 1: correct\nStep 2: correct", 3, None),  # does not go to the end, and names no error
    ("Verdict:\nStep 1: incorrect\nStep 2: correct", 3, None),
    ("Verdict:\nStep 2: incorrect", 3, None),
    ("Verdict:\nStep 1: correct\nStep 2: maybe incorrect", 3, None),
    ("Verdict:\nStep 1: correct\nStep 2: correct\nStep 3: correct\nStep 4: incorrect", 3, None),
    ("Step 1: correct\nStep 2: incorrect", 3, None), ("", 3, None), ("Verdict:", 3, None),
])
def test_a_verdict_is_read_strictly_or_not_at_all(reply, steps, found):
    assert first_error(reply, steps) == found


def judge_of_right_and_wrong(path, body):
    """Names the first step that says it is wrong, but has no opinion on problem 3."""
    text = body["messages"][0]["content"]
    if "Problem 3:" in text:
        return "Who knows."
    verdict = []
    for k, step in enumerate(re.findall(r"^Step \d+: (right|wrong) step", text, re.M), 1):
        verdict.append(f"Step {k}: {'incorrect' if step == 'wrong' else 'correct'}")
        if step == "wrong":
            break
    return "I see.\nVerdict:\n" + "\n".join(verdict)


def first_step_that_says_it_is_wrong(solution: str) -> int:
    return [step[:6] for step in [step.text for step in find_steps(solution)]].index(" wrong") + 1


def test_a_judge_locates_errors_and_checks_chosen_steps(serve, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-judge")
    server = serve(judge_of_right_and_wrong, [500, "truncated"], key="sk-judge")
    flags = ["--by=judge", "--check=judge", "--judge-url", server.url, "--judge-model=j"]
    run_scripted(tmp_path, tokenizer, Scripted(tokenizer), *flags)
    rows = rows_of(tmp_path / "out/located_by_judge.jsonl")
    located = [row for row in rows if row["step"]]
    assert [row["step"] for row in located] == [
        first_step_that_says_it_is_wrong(row["solution"]) for row in located] and len(located) > 20
    statuses = Counter(row["status"] for row in rows if "Problem 3:" in row["prompt"])
    assert statuses == {"located: verdict not as asked for": sum(statuses.values())} and statuses
    replies = [row["reply"] for row in rows_of(tmp_path / "out/judge.jsonl")[1:]]
    assert "Who knows." in replies  # kept, to be read
    pairs = rows_of(tmp_path / "out/pairs.jsonl")
    assert len(pairs) > 10 and all(" right" in p["chosen"] and " wrong" in p["rejected"] for p in pairs)

    asked, again = server.tried, outputs(tmp_path)
    run_scripted(tmp_path, tokenizer, None, *flags)
    assert server.tried == asked and outputs(tmp_path) == again
    assert "sk-judge" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("message", [dict(content=None), dict(content=[dict(type="text", text="a")]), {},
                                     None])
def test_an_odd_reply_of_a_judge_is_one_line(serve, tmp_path, message):
    reply = json.dumps(dict(choices=[dict(message=message)])).encode()
    judge = Judge(str(tmp_path / "judge.jsonl"), serve(None, [reply]).url, "j", 1)
    with pytest.raises(InputError) as error:
        judge.first_errors([(Problem("d", "p", "7", None), [" a"])])
    assert "v1/chat/completions: not the reply of an OpenAI-compatible server" in one_line(error)


def test_by_both_keeps_errors_on_which_rollouts_and_judge_agree(built, serve, tokenizer, tmp_path, capsys):
    server = serve(judge_of_right_and_wrong)
    run_scripted(tmp_path, tokenizer, Scripted(tokenizer), "--by=both", "--judge-url", server.url,
                 "--judge-model=j")
    by_rollouts = {row["solution"]: row for row in rows_of(built[0] / "out/located_by_rollouts.jsonl")}
    agreed = 0
    for row in rows_of(tmp_path / "out/located_by_both.jsonl"):
        step = by_rollouts[row["solution"]]["step"]
        if step is None:
            assert row == by_rollouts[row["solution"]] | dict(by="both")
            continue
        same = (step == first_step_that_says_it_is_wrong(row["solution"])
                and "Problem 3:" not in row["prompt"])
        assert row["step"] == step
        assert row["status"] == "located" if same else row["status"].startswith("agreed: ")
        agreed += same
    shown = re.search(r"^agreed +(\d+)$", capsys.readouterr().out, re.M)
    assert agreed == int(shown[1]) > 5
    assert len(rows_of(tmp_path / "out/pairs.jsonl")) <= agreed


def test_people_fill_in_a_file_that_the_same_command_goes_on_from(tokenizer, tmp_path, capsys):
    def run(*flags):
        run_scripted(tmp_path, tokenizer, Scripted(tokenizer), *(flags or ["--by=human"]))
        return capsys.readouterr().out

    sheet, pairs = tmp_path / "out/located.jsonl", tmp_path / "out/pairs.jsonl"
    shown = run()
    assert "where step is null, put the number" in shown and not pairs.exists()
    rows = rows_of(sheet)
    assert f"-{len(rows)}  not filled in yet" in shown
    assert len(rows) > 20 and all(list(row)[0] == "step" and row["step"] is None for row in rows)
    for i, row in enumerate(rows[:6]):
        row["step"] = 0 if i == 5 else true_error(row["solution"])
    write_jsonl(sheet, rows[::-1])  # lines may be moved
    filled_in = sheet.read_bytes()
    shown = run()
    assert f"-{len(rows) - 6}  not filled in yet" in shown and "-1  no wrong step" in shown
    assert 1 <= len(rows_of(pairs)) <= 5 and sheet.read_bytes() == filled_in

    run("--by=rollouts")  # another method leaves it alone
    assert sheet.read_bytes() == filled_in
    run("--by=human", "--samples=3")  # and for more solutions it grows
    assert sheet.read_bytes().startswith(filled_in) and len(rows_of(sheet)) > len(rows)

    for bad in (99, -1, "2", True):
        write_jsonl(sheet, [*rows[:2], rows[2] | dict(step=bad), *rows[3:]])
        with pytest.raises(InputError,
                           match=r"located\.jsonl:3: step must be 0 \(none is wrong\) to (\d|the)"):
            run()


@pytest.fixture(scope="session")
def sheet(tokenizer, tmp_path_factory):
    """A folder with a file to fill in, as --by human makes it."""
    folder = tmp_path_factory.mktemp("sheet")
    run_scripted(folder, tokenizer, Scripted(tokenizer), "--by=human", problems=12)
    return folder


def read_sheet(sheet, tmp_path, tokenizer, content: bytes, *flags):
    """The file, after one more command with this content in it."""
    folder = shutil.copytree(sheet, tmp_path / "copy", dirs_exist_ok=True)
    (folder / "out/located.jsonl").write_bytes(content)
    run_scripted(folder, tokenizer, Scripted(tokenizer), "--by=human", *flags)
    return (folder / "out/located.jsonl").read_bytes()


@pytest.mark.parametrize("change, message", [
    *[(dict(step=step), "step must be 0") for step in (True, "3", 1.5, [1], -1, 99)],
    (dict(prompt=7), "must be text; repair"), (dict(solution=["a"]), "must be text; repair"),
    (dict(solution="another", step="3"), "step must be 0"),  # not of this run, and wrong all the same
    *[(name, f"has no '{name}'; repair or remove") for name in ("step", "prompt", "solution")],
    (b"[1]", "must be a JSON object"), (b'{"step": 1', "not valid JSON"), (b"\xff", "not UTF-8"),
    (dict(step=1, dataset="twice"), r"step is \d, and for the same solution \d in .*located\.jsonl:1"),
])
def test_what_people_filled_in_wrongly_is_refused_by_its_line(sheet, tokenizer, tmp_path, change, message):
    rows = rows_of(sheet / "out/located.jsonl")
    rows[0]["step"] = 2
    rows[2] = rows[0].copy() if "twice" in str(change) else rows[2]
    if isinstance(change, dict):
        rows[2] |= change
    elif isinstance(change, str):
        del rows[2][change]
    lines = [json.dumps(row).encode() for row in rows]
    if isinstance(change, bytes):
        lines[2] = change
    content = b"\n".join(lines)
    with pytest.raises(InputError) as error:
        read_sheet(sheet, tmp_path, tokenizer, content)
    assert re.search(rf"located\.jsonl:3: .*{message}", one_line(error))
    assert (tmp_path / "copy/out/located.jsonl").read_bytes() == content


@pytest.mark.parametrize("bom, end", [(b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")])
@pytest.mark.parametrize("last_end", [True, False])
def test_whatever_an_editor_does_to_lines_they_stay_as_they_are(sheet, tokenizer, tmp_path, bom, end,
                                                                last_end):
    rows = rows_of(sheet / "out/located.jsonl")
    rows[0]["step"] = 1
    other = rows[1] | dict(solution="not of this run", step=2)
    kept = [*rows[:3], rows[2], other]  # one is there twice, and the rest has to be added
    content = bom + end.join(json.dumps(row).encode() for row in kept) + end * last_end
    after = read_sheet(sheet, tmp_path, tokenizer, content)
    assert after.startswith(content)
    (tmp_path / "copy.jsonl").write_bytes(after)
    assert [row for _, row in read_rows(str(tmp_path / "copy.jsonl"))] == kept + rows[3:]
    assert read_sheet(sheet, tmp_path, tokenizer, after) == after


def test_an_empty_sheet_is_begun_anew(sheet, tokenizer, tmp_path):
    whole = (sheet / "out/located.jsonl").read_bytes()
    assert read_sheet(sheet, tmp_path, tokenizer, b"").strip() == whole.strip()


@pytest.mark.parametrize("name", ["pairs", "located", "located_by_rollouts", "located_by_judge",
                                  "located_by_both"])
@pytest.mark.parametrize("beside", [None, ""])
def test_files_that_were_not_made_here_are_not_overwritten(tokenizer, tmp_path, name, beside):
    (tmp_path / "out").mkdir()
    if beside is not None:
        (tmp_path / "out/samples.jsonl").write_text(beside)
    (tmp_path / f"out/{name}.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match=rf"{name}\.jsonl: was not made by this command"):
        run_scripted(tmp_path, tokenizer, None)
    assert (tmp_path / f"out/{name}.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("name", ["pairs", "located", "located_by_rollouts"])
@pytest.mark.parametrize("target", ["absent", "foreign", "folder"])
def test_results_are_not_written_over_a_link_or_a_folder(sheet, tokenizer, tmp_path, name, target):
    folder = shutil.copytree(sheet, tmp_path / "copy")
    path = folder / f"out/{name}.jsonl"
    path.unlink(missing_ok=True)
    if target == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "target")
    if target == "foreign":
        (tmp_path / "target").write_text("mine")
    with pytest.raises(InputError) as error:
        run_scripted(folder, tokenizer, None)
    assert re.search(rf"{name}\.jsonl: is not a file that this command wrote; choose", one_line(error))
    assert path.is_dir() or path.is_symlink()
    assert (tmp_path / "target").exists() == (target == "foreign")


@pytest.mark.parametrize("name", ["samples.jsonl", "samples.rank1.jsonl", "judge.jsonl", "located.jsonl",
                                  "located_by_both.jsonl", "pairs.jsonl"])
@pytest.mark.parametrize("spelling", ["out/{}", "out/../out/./{}", "link/{}", "link.jsonl"])
def test_problems_are_not_read_from_a_file_that_is_written(tokenizer, tmp_path, monkeypatch, name, spelling):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    path = write_jsonl(tmp_path / "out" / name, [dict(prompt="a", answer="7")])
    content = Path(path).read_bytes()
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "link.jsonl").symlink_to(path)
    args = command_line.parse(["build", "--model=m", "--problems", spelling.format(name), "--out=out/"])
    with pytest.raises(InputError) as error:
        command_line.run(args, Scripted(tokenizer), tokenizer)
    assert re.search("--problems .*: is a file that this command writes in --out; rename", one_line(error))
    assert Path(path).read_bytes() == content and os.listdir(tmp_path / "out") == [name]


@pytest.mark.parametrize("out, message", [
    ("file", "--out file: is not a folder"), ("file/below", "cannot be written: Not a directory"),
    ("dangling", "--out dangling: is not a folder"), ("/sys/x", "cannot be written: "),
    ("model", "--out model: must not be in the folder of --model model"), ("model/x/y", "must not be in the"),
    ("to_model/x", "must not be in the folder"), ("model/../model", "must not be in the folder"),
])
def test_a_bad_place_for_the_output_is_said_before_anything_is_sampled(
        tiny, tokenizer, tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "to_model").symlink_to("model")
    before = sorted(tmp_path.rglob("*"))
    problems = write_jsonl(tmp_path / "model/p.jsonl", [dict(prompt="a", answer="7")])
    args = command_line.parse(["solve", "--model=model", "--problems", problems, "--out", out])
    with pytest.raises(InputError) as error:
        command_line.run(args)
    assert message in one_line(error)
    os.unlink(problems)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


def _solve_slowly(folder, tokenizer, said):
    keep_stderr(said)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sampler = Scripted(tokenizer)
    sampler.nap = 0.1
    run_command("pairs solve", lambda: run_scripted(folder, tokenizer, sampler, command="solve"))


@pytest.mark.parametrize("how, status, line", [
    (signal.SIGINT, 130, "pairs solve: stopped by Ctrl-C; the same command goes on from what is on disk"),
    (signal.SIGTERM, -signal.SIGTERM, "")])
def test_after_ctrl_c_and_after_sigterm_the_same_command_continues(tokenizer, tmp_path, how, status, line):
    scripted_problems(tmp_path)
    child = CHILDREN.Process(target=_solve_slowly, args=(tmp_path, tokenizer, tmp_path / "said"))
    child.start()
    path = tmp_path / "out/samples.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 17:  # the settings and a batch
        time.sleep(0.01)
    os.kill(child.pid, how)
    child.join()
    assert child.exitcode == status
    said = re.split(r"[\r\n]+", (tmp_path / "said").read_text())
    assert [words for words in said if "/120" not in words and words.strip()] == ([line] if line else [])

    drawn = len(samples_in(tmp_path / "out"))
    sampler = Scripted(tokenizer)
    run_scripted(tmp_path, tokenizer, sampler, command="solve")
    assert sampler.drawn == 120 - drawn and len({row["key"] for row in samples_in(tmp_path / "out")}) == 120


@pytest.mark.slow
def test_a_mistake_that_only_one_process_meets_is_said_in_one_line_and_ends_all(tiny, tmp_path):
    problems = write_jsonl(tmp_path / "p.jsonl", [dict(prompt="a", answer="7")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/samples.rank1.jsonl").symlink_to("nowhere")
    ended = subprocess.run([*TORCHRUN, "2", "-m", "pairs", "solve", "--model", tiny, "--problems", problems,
                            "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=100,
                           cwd=HERE, env=ENVIRONMENT)
    assert ended.returncode
    (said,) = [line for line in ended.stderr.splitlines() if line.startswith("pairs solve: ")]
    assert re.search(r"error: .*samples\.rank1\.jsonl: is a link, and what it leads to is not", said)
    assert "/pairs/cache.py" not in ended.stderr


# ------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("flags, message", [
    (["solve", "--model=m", "--problems=p"], "required: --out"), (["solve", "--mod=m"], "required: --model"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--temp=1"], "unrecognized arguments: --temp=1"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--samples=0"], "--samples: must be from 1 to 10,000"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--top-p=1.5"], "--top-p: must be above 0, at most 1"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--top-p=0"], "--top-p: must be above 0"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--temperature=-1"], "must be 0, or from 0.01 to 100"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--server=http://u"], "--server-model is needed too"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--server=localhost:8000"], "an address like http"),
    (["build", "--model=m", "--problems=p", "--out=o", "--by=both"], "--judge-url is needed too"),
    (["build", "--model=m", "--problems=p", "--out=o", "--by=oracle"], "invalid choice: 'oracle'"),
    (["solve", "--model=m", "--problems=p", "--out=o", "--by=judge"], "unrecognized arguments: --by=judge"),
    ([], "required"), (["sample"], "invalid choice: 'sample'"),
])
def test_usage_errors(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        command_line.parse(flags)
    assert error.value.code == 2 and message in capsys.readouterr().err


COUNTS = ("samples", "concurrency", "screen", "rollouts", "max-rollouts", "check-rollouts", "tries",
          "rectify-samples", "pairs-per-step", "per-problem")


@pytest.mark.parametrize("names, values, must", [
    (COUNTS, (10**12, 10_001, 0, -1), "from 1 to 10,000"),
    (["max-new-tokens"], (10**12, 0), "from 1 to 1,000,000"),
    (["certainty"], (5, -1, "nan"), "from 0 to 1"),
    (["temperature"], ("1e-30", "1e30", "nan"), "0, or from 0.01 to 100"),
    (["max-length-ratio"], (0.5, "inf"), "at least 1"),
    (["judge-url", "server"], ("localhost:1", "ftp://h", "http://"), "an address like http://localhost:8000"),
])
def test_numbers_are_kept_within_bounds(names, values, must, capsys):
    for name in names:
        for value in values:
            with pytest.raises(SystemExit):
                command_line.parse(["build", "--model=m", "--problems=p", "--out=o", f"--{name}={value}"])
            assert f"argument --{name}: must be {must}, got {value}" in capsys.readouterr().err


def test_flags_take_hyphens_or_underscores_and_files(tmp_path):
    (tmp_path / "args").write_text("--max_new_tokens 99  # so\n--problems 'my file'\n\n--no-step-prefix\n")
    args = command_line.parse(["solve", f"@{tmp_path}/args", "--model=m", "--out=o", "--top_p=0.5"])
    assert (args.max_new_tokens, args.problems, args.step_prefix, args.top_p) == (99, "my file", False, 0.5)
    args = command_line.parse(["build", "--model=m", "--problems=p", "--out=o", "--seed=3",
                               "--batch-tokens=9", "--instruction="])
    assert (args.seed, args.batch_tokens, args.instruction, args.temperature) == (3, 9, "", 0.8)
    assert (args.samples, args.rectify_samples, args.rollouts, args.certainty) == (2, 20, 4, 0.9)


@pytest.mark.slow
def test_the_command_line_end_to_end(tiny, tmp_path, capsys):
    """A real (random) model in two processes of their own: samples, counts, no pairs; nothing drawn twice."""
    path = write_jsonl(tmp_path / "p.jsonl", [dict(prompt=f"Problem {i}?", answer="7") for i in range(3)])
    flags = ["build", "--model", tiny, "--problems", path, "--out", str(tmp_path / "out"),
             "--max-new-tokens=16"]
    first = subprocess.run([*TORCHRUN, "2", "-m", "pairs", *flags], capture_output=True, text=True,
                           timeout=300, cwd=HERE, env=ENVIRONMENT)
    assert first.returncode == 0, first.stderr
    assert "accuracy 0.0% (0 of 6 samples of 3 problems)" in first.stdout
    assert "0 pairs of 0 problems" in first.stdout
    kept = [row for path in (tmp_path / "out").glob("samples*.jsonl") for row in rows_of(path)]
    assert f"\n{sum(row.get('tokens', 0) for row in kept)} tokens sampled in" in first.stdout
    command_line.main(flags)
    assert "\n0 tokens sampled" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        command_line.main(["solve", "--model", tiny, "--problems", "nowhere.jsonl", "--out", "o"])
    assert "pairs solve: error: nowhere.jsonl: No such file or directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["solve", "--model", str(tmp_path / "nowhere"), "--problems", path, "--out",
                           str(tmp_path / "o")])
    assert "nowhere: its tokenizer cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    shown = capsys.readouterr().out
    assert "AQuA: question, options, correct" in shown and "torchrun" in shown and "same command" in shown
    with pytest.raises(SystemExit):
        command_line.main(["solve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "must take token ids as prompts, as vLLM, SGLang and llama.cpp do (`transformers serve`" in shown
