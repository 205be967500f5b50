"""Where rows come from: splits of hub datasets, files by their very path, rows held out for evaluation."""

import json
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest

import stepdpo
from conftest import make_rows, write_jsonl
from pairs import __main__ as pairs_command
from pairs.problems import read_problems
from runtime import rows
from runtime.messages import InputError
from runtime.rows import read_rows


def message_of(error) -> str:
    """The message of an InputError, which is one line."""
    message = str(error.value)
    assert message.isprintable() and len(message) < 1500
    return message


# ----------------------------------------------------------------------------------------------- hub datasets

HUB = {  # name: its configurations, and the splits of each
    "openai/gsm8k": {"main": ("train", "test"), "socratic": ("train", "test")},
    "HuggingFaceH4/MATH-500": {"default": ("test",)},
    "xinlai/Math-Step-DPO-10K": {"default": ("train",)},
    "made/splits": {"default": ("train", "validation", "test")},
    "made/no-train": {"default": ("validation", "test")},
    "made/one.config": {"only": ("train", "test")},
    "made/default": {"default": ("train", "test"), "extra": ("test",)},
    "made/many": {f"subject_{i}": ("test",) for i in range(12)},
    "made/problems.v1": {"easy": ("test",), "hard": ("test",)},
    "made/torn": {"default": ("train",)},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders like the repositories of a hub. A row says where it stands."""
    root = tmp_path_factory.mktemp("hub")
    for name, configs in HUB.items():
        described = []
        for config, splits in configs.items():
            files = []
            for split in splits:
                (root / name / config).mkdir(parents=True, exist_ok=True)
                write_jsonl(root / name / config / f"{split}.jsonl",
                            [dict(place=f"{name} {config} {split}")] * 2)
                files.append({"split": split, "path": f"{config}/{split}.jsonl"})
            described.append({"config_name": config, "data_files": files})
        (root / name / "README.md").write_text(f"---\nconfigs: {json.dumps(described)}\n---\n")
    (root / "made/torn/default/train.jsonl").write_text('{"place": ')
    return root


@pytest.fixture
def on_hub(hub, tmp_path, monkeypatch):
    """The library, which finds these folders under their names."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for function in ("load_dataset", "get_dataset_config_names", "get_dataset_split_names",
                     "get_dataset_default_config_name"):
        monkeypatch.setattr(datasets, function, partial(from_folder, hub, getattr(datasets, function)))


def from_folder(hub, function, name, *args, **options):
    return function(str(hub / name), *args, **options)


GSM8K = ("openai/gsm8k:main:train, openai/gsm8k:main:test, openai/gsm8k:socratic:train, "
         "openai/gsm8k:socratic:test")
SPLITS = [  # source, what --data reads, what an evaluation reads: a place, or the end of the error
    ("openai/gsm8k:main:test", "openai/gsm8k main test", "openai/gsm8k main test"),
    ("openai/gsm8k:socratic:train", "openai/gsm8k socratic train", "openai/gsm8k socratic train"),
    ("openai/gsm8k", f"has several configurations; name one and a split: {GSM8K}", None),
    ("openai/gsm8k:main", f"has several configurations; name one and a split: {GSM8K}", None),
    ("openai/gsm8k:test", f"has several configurations; name one and a split: {GSM8K}", None),
    ("openai/gsm8k:Main:test", f"has no configuration 'Main'; there are: {GSM8K}", None),
    ("openai/gsm8k:main:dev",
     "has no split 'dev'; there are: openai/gsm8k:main:train, openai/gsm8k:main:test", None),
    ("HuggingFaceH4/MATH-500", "HuggingFaceH4/MATH-500 default test", "HuggingFaceH4/MATH-500 default test"),
    ("HuggingFaceH4/MATH-500:train", "has no split 'train'; there are: HuggingFaceH4/MATH-500:test", None),
    ("xinlai/Math-Step-DPO-10K", "xinlai/Math-Step-DPO-10K default train",
     "xinlai/Math-Step-DPO-10K default train"),
    ("made/splits", "made/splits default train",
     "has several splits; name one: made/splits:train, made/splits:validation, made/splits:test"),
    ("made/splits:validation", "made/splits default validation", "made/splits default validation"),
    ("made/splits:x:test", "has no configuration 'x'; there are: made/splits:train, made/splits:validation, "
     "made/splits:test", None),
    ("made/no-train", "has several splits; name one: made/no-train:validation, made/no-train:test", None),
    ("made/one.config", "made/one.config only train",
     "has several splits; name one: made/one.config:train, made/one.config:test"),
    ("made/one.config:only:test", "made/one.config only test", "made/one.config only test"),
    ("made/default", "made/default default train",
     "has several splits; name one: made/default:train, made/default:test"),
    ("made/default:extra:test", "made/default extra test", "made/default extra test"),
    ("made/many", "made/many:CONFIG:SPLIT with the CONFIG subject_0, subject_1, ", None),
    ("made/absent", "FileNotFoundError: Couldn't find any data file", None),
    ("made/absent:a:b", "FileNotFoundError: Couldn't find any data file", None),
    ("made/torn", "made/torn: DatasetGenerationError: An error occurred while generating the", None),
    ("made/splits:a:b:c", "must be a .jsonl, .json or .parquet file or a hub dataset (owner/name,", None),
    ("made/splits:", "must be a .jsonl, .json or .parquet file or a hub dataset", None),
]


@pytest.mark.parametrize("source, trained_on, evaluated", SPLITS)
def test_a_split_is_named_or_the_only_one_and_training_has_train_by_default(on_hub, source, trained_on,
                                                                            evaluated):
    for default, expected in (("train", trained_on), (None, evaluated or trained_on)):
        try:
            found = read_rows(source, default)
        except InputError as error:
            assert str(error).startswith(f"{source}: ") and expected in str(error)
            assert str(error).isprintable() and len(str(error)) < 1500
        else:
            assert [row for _, row in found] == [dict(place=expected)] * 2
            split = expected.split()[-1]
            assert found[1][0].endswith(f":{split}: row 2") and found[1][0].startswith(source)


def test_a_folder_is_not_taken_for_a_hub_dataset(on_hub, tmp_path):
    (tmp_path / "made/splits").mkdir(parents=True)
    for source in ("made/splits", "made/splits:test"):
        with pytest.raises(InputError) as error:
            read_rows(source)
        assert f"{source}: is a folder here; name a .jsonl" in message_of(error)


def test_problems_and_held_out_pairs_are_never_read_from_a_training_split_that_was_not_named(on_hub, hub):
    with pytest.raises(InputError, match="made/splits: has several splits; name one: made/splits:train"):
        read_problems("made/splits")
    data = str(hub / "made/splits/default/train.jsonl")
    config = Namespace(data=[data], eval_data="made/splits", span="step")
    with pytest.raises(InputError, match="made/splits: has several splits; name one: made/splits:train"):
        rows.read_pairs(None, config)


def test_problems_from_a_hub_are_named_by_their_dataset(on_hub, hub):
    write_jsonl(hub / "made/problems.v1/hard/test.jsonl", [dict(prompt="What?", answer="7")])
    assert [problem.dataset for problem in read_problems("made/problems.v1:hard:test")] == ["problems"]


NEEDS_DATASETS = [
    ["--data", "made/splits"], ["--data", "a.jsonl", "b.parquet"],
    ["--data=a.jsonl", "--eval-data=made/splits:test"],
    ["--data=a.jsonl", "--test-problems=openai/gsm8k:main:test"],
]


@pytest.mark.parametrize("flags", NEEDS_DATASETS)
@pytest.mark.parametrize("how", ["absent", "a folder of that name", "broken"])
def test_a_missing_library_is_asked_for_before_anything_else(flags, how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    if how != "absent":
        (tmp_path / "datasets").mkdir()
        if how == "broken":
            (tmp_path / "datasets/__init__.py").write_text("raise ImportError('another pyarrow')")
        del sys.modules["datasets"]
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    config = stepdpo.parse(["--model=nowhere", "--output-dir=out", *flags])
    with pytest.raises(InputError, match="(splits.*|test|b.parquet): reading .* needs: pip install datasets"):
        stepdpo.train_and_compare(config)
    args = pairs_command.parse(["solve", "--model=nowhere", "--out=out", "--problems=made/splits:test"])
    with pytest.raises(InputError, match="made/splits:test: reading .* needs: pip install datasets"):
        pairs_command.run(args)
    assert not os.path.exists("out")


# ------------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize("folder, other", [
    ("run[1]", "run1"), ("lr*", "lrX"), ("lr?", "lrX"), ("{a,b}", "a"), ("**", "deep/er"), ("lr=3", "x"),
    ("file::zip", "x"), ("a b#c%20", "x"), (".hidden", "x"), ("new\nline", "x")])
@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl"])
def test_a_path_is_that_file_and_no_pattern(folder, other, kind, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for name in (folder, other):
        os.makedirs(name)
        content = [dict(place=name, more=None), dict(place=name, more="x")]
        if kind == "parquet":
            datasets.Dataset.from_list(content).to_parquet(open(f"{name}/p.parquet", "wb"))
        elif kind == "json":
            Path(f"{name}/p.json").write_text(json.dumps(content))
        else:
            write_jsonl(Path(f"{name}/p.jsonl"), content)
    for path in (f"{folder}/p.{kind}", f"./{folder}/p.{kind}", str(tmp_path / folder / f"p.{kind}")):
        found = [row for _, row in read_rows(path)]
        assert found == [dict(place=folder, more=None), dict(place=folder, more="x")]


@pytest.mark.parametrize("name, content, message", [
    ("*.parquet", None, r"*.parquet: No such file"), ("p.parquet", b"PAR1", "p.parquet: ArrowInvalid: "),
    ("p.parquet", b"", "p.parquet: ArrowInvalid: "), ("p.parquet", "folder", "p.parquet: "),
    ("no/p.parquet", None, "no/p.parquet: No such file"),
    ("http://127.0.0.1:9/p.parquet", None, "p.parquet: No such file"),
])
def test_what_is_no_parquet_file_is_one_line(name, content, message, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        os.mkdir(name)
    elif content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_rows(name)
    assert message in message_of(error)


# --------------------------------------------------------------------------------------------- held-out pairs


def config_of(data, eval_data, **changes) -> Namespace:
    options = dict(template="chat", instruction=None, template_args=None, span="step", max_length=1024)
    return Namespace(data=list(map(str, data)), eval_data=eval_data, **options | changes)


@pytest.mark.parametrize("field, value", [
    ("prompt", "half \ud83d"), ("prompt", [dict(role="user", content="half \ud83d")]), ("prompt", None),
    ("prompt", 7), ("prompt", []), ("prompt", [dict(role="user")]), ("chosen", "half \ud83d")])
def test_a_bad_row_is_one_line_also_where_a_share_is_held_out(field, value, tokenizer, tmp_path):
    content = make_rows(20)
    content[7][field] = value
    path = write_jsonl(tmp_path / "p.jsonl", content)
    with pytest.raises(InputError, match=rf"1 of 20 rows cannot be trained on:\n  .*p\.jsonl:8: .*'{field}'"):
        rows.read_pairs(tokenizer, config_of([path], 0.3))


def test_a_problem_is_held_out_whatever_form_it_has(tokenizer, tmp_path):
    plain = make_rows(40)
    as_message = [row | dict(prompt=[dict(role="user", content=row["prompt"])], chosen=" Another.")
                  for row in plain]
    path = write_jsonl(tmp_path / "p.jsonl", plain + as_message)
    training, held_out = rows.read_pairs(tokenizer, config_of([path], 0.3))
    texts = [{tokenizer.decode(pair.prefix) for pair in pairs} for pairs in (training, held_out)]
    assert len(training) + len(held_out) == 80 and not texts[0] & texts[1]


SAME = {  # how the pairs of training are held out again
    "the file": lambda path: path,
    "another spelling": lambda path: path.parent / "." / "again" / ".." / path.name,
    "a link": lambda path: path.with_name("link.jsonl").symlink_to(path) or path.with_name("link.jsonl"),
    "a copy": lambda path: write_jsonl(path.with_name("copy.jsonl"), rows_in(path)),
    "another format": lambda path: as_json(path.with_name("copy.json"), rows_in(path)),
    "a part": lambda path: write_jsonl(path.with_name("part.jsonl"), rows_in(path)[5:9]),
    "another order": lambda path: write_jsonl(path.with_name("back.jsonl"), rows_in(path)[::-1]),
    "problems as messages": lambda path: write_jsonl(path.with_name("chat.jsonl"), [
        row | dict(prompt=[dict(role="user", content=row["prompt"])]) for row in rows_in(path)]),
}


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_json(path: Path, content: list[dict]) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("case", SAME)
def test_pairs_that_are_trained_on_are_no_held_out_pairs(case, tokenizer, tmp_path):
    path, other = tmp_path / "p.jsonl", tmp_path / "other.jsonl"
    content = make_rows(30)
    write_jsonl(path, content[:20]), write_jsonl(other, content[20:])
    (tmp_path / "again").mkdir()
    again = str(SAME[case](path))
    with pytest.raises(InputError) as error:
        rows.read_pairs(tokenizer, config_of([other, path], again))
    assert f"--eval-data {again}: all its pairs are in --data too (" in message_of(error)


def test_some_pairs_that_are_trained_on_too_are_said(tokenizer, tmp_path, capsys):
    content = make_rows(30)
    path = write_jsonl(tmp_path / "p.jsonl", content[:20])
    other = write_jsonl(tmp_path / "other.jsonl", content[18:])
    rows.read_pairs(tokenizer, config_of([path], other))
    assert f"2 of them are trained on too (first: {other}:1, which is {path}:19)" in capsys.readouterr().out
    rows.read_pairs(tokenizer, config_of([path], 0.3))
    assert "trained on too" not in capsys.readouterr().out
