"""Rows: read alike from every kind of file, refused by file and line, dropped and counted, held out."""

import json
import os
from pathlib import Path

import pytest

from conftest import default_flags, make_rows, numbered, write_jsonl
from runtime.messages import InputError
from runtime.rows import hold_out, pairs_of, read_rows

# ---------------------------------------------------------------------------------------------------- reading


def test_rows_are_read_alike_from_jsonl_json_and_parquet(tmp_path):
    rows = make_rows(5)
    files = [write_jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "a.json")]
    Path(files[1]).write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    try:
        import datasets
        files.append(str(tmp_path / "a.parquet"))
        datasets.Dataset.from_list(rows).to_parquet(files[2])
    except ImportError:
        with pytest.raises(InputError, match="pip install datasets"):
            read_rows("a.parquet")
    for file in files:
        assert [row for _, row in read_rows(file)] == rows
    assert read_rows(files[0])[3][0] == f"{files[0]}:4"


FILES = {  # name, content, and what is said of it
    "nothing": ("none.jsonl", None, "none.jsonl: No such file"),
    "a pipe": ("pipe.jsonl", "pipe", "pipe.jsonl: is not a file, but a pipe or a device"),
    "a device": ("zero.jsonl", "/dev/zero", "zero.jsonl: is not a file, but a pipe or a device"),
    "a folder": ("folder.jsonl", "mkdir", "folder.jsonl: Is a directory"),
    "a dangling link": ("link.jsonl", "nowhere", "link.jsonl: No such file"),
    "of no known kind": ("pairs.csv", b"a,b\n", "must be a .jsonl, .json or .parquet file or a hub dataset"),
    "JSON lines called .json": ("pairs.json", b'{"a": 1}\n{"a": 2}\n', "pairs.json:2: not valid JSON"),
    "one object": ("pairs.json", b'{"a": 1}', "pairs.json: must be one JSON list of rows, got dict"),
    "an empty list": ("pairs.json", b"[]", "pairs.json: holds no rows"),
    "empty": ("pairs.jsonl", b"", "pairs.jsonl: holds no rows"),
    "blank lines": ("pairs.jsonl", b"\n \n", "pairs.jsonl: holds no rows"),
    "not JSON": ("pairs.jsonl", b"{'a': 1}\n", "pairs.jsonl:1: not valid JSON"),
    "torn": ("pairs.jsonl", b'{"a": 1}\n{"a": ', "pairs.jsonl:2: not valid JSON"),
    "a list": ("pairs.jsonl", b'{"a": 1}\n\n[1]\n', "pairs.jsonl:3: must be a JSON object, got list"),
    "null": ("pairs.jsonl", b"null\n", "pairs.jsonl:1: must be a JSON object, got NoneType"),
    "UTF-16": ("pairs.jsonl", '{"a": 1}\n'.encode("utf-16"), "pairs.jsonl:1: not UTF-8"),
    "Latin-1": ("pairs.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"pairs.jsonl:2: not UTF-8 \(byte 7\)"),
    "null bytes": ("pairs.jsonl", b"\0" * 100, "pairs.jsonl:1: not valid JSON"),
    "thousands of brackets": ("pairs.jsonl", b"[" * 100_000 + b"\n", "pairs.jsonl:1: not a row: "),
    "a number without end": ("pairs.jsonl", b'{"a": ' + b"9" * 10_000 + b"}\n", "pairs.jsonl:1: not a row: "),
}


@pytest.mark.parametrize("case", FILES)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, case):
    name, content, message = FILES[case]
    path = tmp_path / name
    if content == "mkdir":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif isinstance(content, str):
        path.symlink_to(content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(str(path))


# --------------------------------------------------------------------------------------------------- refusing


ROWS = {  # changes to a row (... takes a field away), and what is said of it
    "of another kind": (dict(prompt=...), "has no field 'prompt'; a row needs prompt, initial_reason_steps"),
    "steps missing": (dict(initial_reason_steps=...), "has no field 'initial_reason_steps'"),
    "steps null": (dict(initial_reason_steps=None), "has no field 'initial_reason_steps'"),
    "steps a list": (dict(initial_reason_steps=["Step 1:"]), "'initial_reason_steps' must be text, got list"),
    "chosen null": (dict(chosen=None), "has no field 'chosen'"),
    "chosen a number": (dict(chosen=3), "'chosen' must be text, got int"),
    "chosen a list": (dict(chosen=["a"]), "'chosen' must be text, got list"),
    "half a character": (dict(rejected=" half a \ud83d"), "'rejected' has half a character"),
    "prompt empty": (dict(prompt=""), "'prompt' is empty"),
    "prompt blank": (dict(prompt=" "), "'prompt' is empty"),
    "prompt an object": (dict(prompt={"role": "user"}), "'prompt' must be text, got dict"),
    "prompt of two messages": (dict(prompt=[{"role": "user", "content": "a"}] * 2), "one message of the user"),
    "prompt of the system": (dict(prompt=[{"role": "system", "content": "a"}]), "one message of the user"),
    "prompt without content": (dict(prompt=[{"role": "user"}]), "'prompt' must be text, got NoneType"),
    "prompt of nothing": (dict(prompt=[]), "one message of the user"),
    "prompt of numbers": (dict(prompt=[1]), "one message of the user"),
    "prompt of words": (dict(prompt=["x"]), "'prompt' must be text, or a list of one message of the user"),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_are_refused_with_their_place(tokenizer, case):
    change, message = ROWS[case]
    good, row = make_rows(2)
    row = {name: value for name, value in (row | change).items() if value is not ...}
    with pytest.raises(InputError, match=f"1 of 2 rows cannot be trained on:\n  f:2: .*{message}"):
        pairs_of(numbered([good, row]), "training", tokenizer, default_flags())


def test_the_first_five_bad_rows_are_shown_and_all_are_counted(tokenizer):
    bad = [row | dict(chosen=None) for row in make_rows(8)]
    with pytest.raises(InputError) as error:
        pairs_of(numbered(bad), "training", tokenizer, default_flags())
    lines = str(error.value).splitlines()
    assert lines[0].startswith("8 of 8 rows") and [line[:6] for line in lines[1:6]] == [
        f"  f:{n}:" for n in range(1, 6)] and lines[6:] == ["  ..."]


# --------------------------------------------------------------------------------------------------- dropping


@pytest.mark.parametrize("change, reason", [
    ({"rejected": " \n"}, "'rejected' is empty"),
    ({"chosen": ""}, "'chosen' is empty"),
    ({"rejected": " So 0 + 0 = 0  "}, "'chosen' equals 'rejected', so there is nothing to prefer"),
])
def test_rows_that_cannot_teach_are_dropped_and_counted_and_refused_above_a_fifth(tokenizer, capsys, change,
                                                                                  reason):
    rows = numbered(make_rows(5))
    bad = "f:9", make_rows(1)[0] | change
    assert len(pairs_of([*rows, bad], "training", tokenizer, default_flags())) == 5
    assert f"dropped 1: {reason} (first: f:9)" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"2 of 7 rows cannot be .* a fifth: 2 {reason} .first: f:9"):
        pairs_of([*rows, bad, bad], "training", tokenizer, default_flags())


def test_too_long_pairs_are_dropped_and_counted_never_cut(tokenizer, capsys):
    rows = numbered(make_rows(20))
    every = pairs_of(rows, "training", tokenizer, default_flags())
    assert len(every) == 20
    lengths = [len(pair.prefix) + max(len(pair.chosen), len(pair.rejected)) for pair in every]
    limit = sorted(lengths)[9]
    kept = pairs_of(rows, "training", tokenizer, default_flags(max_length=limit))
    assert kept == [pair for pair, length in zip(every, lengths, strict=True) if length <= limit]
    said = f"training    {len(kept)} pairs, {20 - len(kept)} dropped as longer than --max-length {limit}\n"
    assert said in capsys.readouterr().out
    with pytest.raises(InputError, match="no pair of 20 is left: 20 longer than --max-length 5"):
        pairs_of(rows, "training", tokenizer, default_flags(max_length=5))


def test_a_share_of_the_problems_is_held_out_whatever_the_order():
    rows = [(f"f:{i}", {"prompt": f"problem {i % 100}"}) for i in range(300)]
    rest, held_out = hold_out(rows, 0.2)
    problems = {row["prompt"] for _, row in held_out}
    assert 10 <= len(problems) <= 30 and not problems & {row["prompt"] for _, row in rest}
    assert hold_out(rows[::-1], 0.2)[1] == held_out[::-1]
    with pytest.raises(InputError, match="leaves 300 of 300 pairs"):
        hold_out(rows, 1e-9)
