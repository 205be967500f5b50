"""What is promised when something goes wrong, case by case: one line that says what and where, exit status 2,
no stack trace, nothing lost, nothing of anybody else's touched.

Each case is a small change to a run that works. (The making of pairs has its own in pairs/test_pairs.py.)
"""

import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import stepdpo
from conftest import ENVIRONMENT, HERE, TORCHRUN, make_rows, start_ranks, train_by_flags, write_jsonl


class Place:
    """A folder with a model, pairs and the flags of a short run, all of which a case may spoil."""

    def __init__(self, folder: Path, model: str):
        self.folder, self.source = folder, model
        self.flags = {"model": folder / "model", "data": folder / "pairs.jsonl", "output-dir": folder / "out",
                      "batch-size": 4, "max-steps": 2, "learning-rate": 1e-3, "dtype": "float32"}
        os.environ["STEPDPO_CACHE"] = str(folder / "cache")
        write_jsonl(folder / "pairs.jsonl", make_rows(8))
        shutil.copytree(model, folder / "model")

    def words(self, *more: str) -> list[str]:
        return [f"--{name}={value}" for name, value in self.flags.items() if value is not None] + list(more)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def edit_json(self, name: str, **changes) -> None:
        path = self.folder / name
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    def edit_weights(self, name: str = "lm_head.weight", change=None, **others) -> None:
        path = self.folder / "model/model.safetensors"
        weights = load_file(path)
        if change:
            weights[name] = change(weights[name])
        save_file(weights | others, path, metadata={"format": "pt"})

    def write_index(self, text: str) -> None:
        (self.folder / "model/model.safetensors").unlink()  # else it would be what counts
        self.write("model/model.safetensors.index.json", text)

    def edit_rows(self, **changes) -> None:
        write_jsonl(self.folder / "pairs.jsonl", [row | changes for row in make_rows(8)])

    def held_out(self) -> str:
        """A file with other pairs."""
        return write_jsonl(self.folder / "held_out.jsonl", make_rows(16)[8:])


@pytest.fixture
def place(tmp_path, tiny):
    before = os.environ.get("STEPDPO_CACHE")
    yield Place(tmp_path, tiny)
    if before is not None:
        os.environ["STEPDPO_CACHE"] = before


def tree(folder: Path) -> dict[str, str]:
    """What there is under a folder, by path: links by their targets, files by their content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and path.name != ".lock" and not name.startswith("cache/"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def start(words: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the trainer. Any exception but its exit escapes."""
    monkeypatch.setattr("sys.argv", ["stepdpo.py", *map(str, words)])
    capsys.readouterr()
    status = 0
    try:
        stepdpo.main()
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    return status, said.out, said.err


def refused(place: Place, message: str, monkeypatch, capsys, *more: str) -> None:
    """The run ends by one line on stderr that matches, and everything on the disk is as it was."""
    before = tree(place.folder)
    status, out, err = start(place.words(*more), monkeypatch, capsys)
    lines = re.split(r"[\r\n]+", err.strip())
    assert status == 2, (status, out, err)
    assert "Traceback" not in err
    beginning = [i for i, line in enumerate(lines) if line.startswith("stepdpo.py: error: ")]
    assert beginning, err
    said = "\n".join(lines[beginning[-1]:])
    assert re.search(message, said, re.S), said
    assert tree(place.folder) == before


# ------------------------------------------------------------------------------- flags and rows, with one line

WORDS = [  # flags, and what is said of them or of what they name; test_flags.py and test_rows.py have more
    (["--beta=zero"], "invalid float value: 'zero'"),
    (["@nowhere"], "nowhere: No such file"),
    (["--max-length=1"], "no pair of 8 is left: 8 longer than --max-length 1"),
    (["--tokens-per-micro-batch=1"], r"pairs.jsonl:\d: takes \d+ tokens, more than --tokens-per-micro-batch 1"),
    (["--data=nowhere.jsonl"], "nowhere.jsonl: No such file"),
    (["--eval-data=0.000001"], "leaves 8 of 8 pairs to train on"),
    (["--eval-data=nowhere.jsonl"], "nowhere.jsonl: No such file"),
    (["--test-problems=nowhere.jsonl"], "nowhere.jsonl: No such file"),
]


@pytest.mark.parametrize("words, message", WORDS, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_flags(place, words, message, monkeypatch, capsys):
    refused(place, message, monkeypatch, capsys, *words)


ROWS = {  # content of pairs.jsonl, or changes to all its rows
    "torn": (b'{"a": 1}\n{"a": ', "pairs.jsonl:2: not valid JSON"),
    "chosen null": (dict(chosen=None), "8 of 8 rows .* has no field 'chosen'"),
    "chosen empty": (dict(chosen=""), "8 of 8 rows .* more than a fifth: 8 'chosen' is empty"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(place, case, monkeypatch, capsys):
    content, message = ROWS[case]
    if isinstance(content, bytes):
        place.write("pairs.jsonl", content)
    else:
        place.edit_rows(**content)
    refused(place, message, monkeypatch, capsys)


# ---------------------------------------------------------------------------------------------- model folders


def never_ending() -> str:
    return "{{ messages[0]['content'] }}" + "{% for a in range(10) %}{{ a.b.c }}{% endfor %}"


def other_model(place: Place, **changes) -> None:
    """Another model in the folder, beside the same tokenizer."""
    folder = place.folder / "model"
    config = transformers.AutoConfig.from_pretrained(folder)
    config.update(changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


MODELS = {
    "no such folder": (lambda p: p.flags.update(model="/nowhere/at/all"), "/nowhere/at/all: no such folder"),
    "a file": (lambda p: p.flags.update(model=p.folder / "pairs.jsonl"), "pairs.jsonl: no such folder"),
    "empty": (lambda p: (shutil.rmtree(p.folder / "model"), (p.folder / "model").mkdir()), "model/config.json"),
    "no config": (lambda p: (p.folder / "model/config.json").unlink(), "model/config.json"),
    "config not JSON": (lambda p: p.write("model/config.json", "{"), "model/config.json"),
    "config a list": (lambda p: p.write("model/config.json", "[]"), "model/config.json"),
    "config null": (lambda p: p.write("model/config.json", "null"), "model/config.json"),
    "config binary": (lambda p: p.write("model/config.json", b"\xff\x00"), "model"),
    "config without type": (lambda p: p.edit_json("model/config.json", model_type=...), "model/config.json"),
    "an unknown type": (lambda p: p.edit_json("model/config.json", model_type="nope"), "model/config.json.*nope"),
    "an encoder": (lambda p: p.edit_json("model/config.json", model_type="t5"), "cannot build it from .*model/config.json"),
    "hidden size a text": (lambda p: p.edit_json("model/config.json", hidden_size="big"), "model/config.json"),
    "hidden size negative": (lambda p: p.edit_json("model/config.json", hidden_size=-4), "cannot build it from .*model/config.json"),
    "no heads": (lambda p: p.edit_json("model/config.json", num_attention_heads=0), "cannot build it from .*model/config.json"),
    "heads that do not divide": (lambda p: p.edit_json("model/config.json", num_key_value_heads=3), "must be"),
    "no layers": (lambda p: p.edit_json("model/config.json", num_hidden_layers=0), "model/config.json"),
    "one layer too many": (lambda p: p.edit_json("model/config.json", num_hidden_layers=3, layer_types=...),
                           "one to one.*missing: .*layers.2"),
    "rope unknown": (lambda p: p.edit_json("model/config.json", rope_scaling={"rope_type": "nope"}), "cannot build it from .*model/config.json"),
    "activation unknown": (lambda p: p.edit_json("model/config.json", hidden_act="nope"), "cannot build it from .*model/config.json"),
    "quantized": (lambda p: p.edit_json("model/config.json", quantization_config={"quant_method": "gptq"}),
                  "quantiz"),
    "own code": (lambda p: p.edit_json("model/config.json", model_type="mine", auto_map={
        "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}), "model/config.json"),
    "short of positions": (lambda p: p.edit_json("model/config.json", max_position_embeddings=16),
                           r"pairs.jsonl:\d: has \d+ tokens, but Qwen2ForCausalLM has no positions beyond 16"),
    "a billion layers": (lambda p: p.edit_json("model/config.json", num_hidden_layers=10**9, layer_types=...),
                         "config.json: num_hidden_layers must be at most 10000"),
    "a trillion tokens": (lambda p: p.edit_json("model/config.json", vocab_size=10**12), "vocab_size must be at most"),
    "a billion labels": (lambda p: p.edit_json("model/config.json", num_labels=10**9), "num_labels must be at most"),
    "name an object": (lambda p: p.edit_json("model/config.json", architectures={"a": 1}), "model"),
    "scale a text": (lambda p: p.edit_json("model/config.json", logit_scale="x"), "model: "),
    "tied, and not the same": (lambda p: p.edit_json("model/config.json", tie_word_embeddings=True),
                               "differs from what it is tied to"),
    "a pipe for a file": (lambda p: os.mkfifo(p.folder / "model/added.json"), "added.json: is not a file, but a pipe"),
    "a pipe for weights": (lambda p: ((p.folder / "model/model.safetensors").unlink(),
                                      os.mkfifo(p.folder / "model/model.safetensors")), "only safetensors weights"),
    "length a text": (lambda p: p.edit_json("model/tokenizer_config.json", model_max_length="x"), "model: its tokenizer"),
    "no weights": (lambda p: (p.folder / "model/model.safetensors").unlink(), "only safetensors weights"),
    "weights torn": (lambda p: p.write("model/model.safetensors", b"\x10\0\0\0\0\0\0\0{"), "model"),
    "weights empty": (lambda p: p.write("model/model.safetensors", b""), "model"),
    "weights garbage": (lambda p: p.write("model/model.safetensors", os.urandom(1000)), "model"),
    "a header without end": (lambda p: p.write("model/model.safetensors", struct.pack("<Q", 2**60)), "model"),
    "a tensor missing": (lambda p: p.edit_weights(change=lambda w: w, extra=torch.ones(2)), "left over: .*extra"),
    "not a number": (lambda p: p.edit_weights(change=lambda w: w * float("nan")),
                     "lm_head.weight holds numbers that are not finite"),
    "infinite": (lambda p: p.edit_weights(change=lambda w: w / 0), "lm_head.weight holds numbers that are not"),
    "int8": (lambda p: p.edit_weights(change=lambda w: w.to(torch.int8)), "stored as I8: quantized weights"),
    "fp8": (lambda p: p.edit_weights(change=lambda w: w.to(torch.float8_e4m3fn)), "stored as F8_E4M3: quantiz"),
    "of another shape": (lambda p: p.edit_weights(change=lambda w: w[:7].clone()), "lm_head.weight must be"),
    "a scalar": (lambda p: p.edit_weights(change=lambda w: w[0, 0].clone()), "lm_head.weight must be"),
    "index a list": (lambda p: p.write_index("[]"), 'must have a "weight_map"'),
    "index of numbers": (lambda p: p.write_index('{"weight_map": {"a": 1}}'), 'must have a "weight_map"'),
    "index torn": (lambda p: p.write_index('{"weight'), "index.json:1: not valid"),
    "index leaves the folder": (lambda p: p.write_index('{"weight_map": {"a": "../b.safetensors"}}'),
                                "must be a file inside that folder"),
    "index names no file": (lambda p: p.write_index('{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors"),
    "no tokenizer": (lambda p: (p.folder / "model/tokenizer.json").unlink(), "model: has no tokenizer"),
    "tokenizer torn": (lambda p: p.write("model/tokenizer.json", "{"), "its tokenizer cannot be read"),
    "tokenizer a list": (lambda p: p.write("model/tokenizer.json", "[]"), "its tokenizer cannot be read"),
    "tokenizer's settings torn": (lambda p: p.write("model/tokenizer_config.json", "{"), "its tokenizer cannot be read"),
    "no template": (lambda p: (p.folder / "model/chat_template.jinja").unlink(), "pass --template alpaca"),
    "template not closed": (lambda p: p.write("model/chat_template.jinja", "{% for"), "its chat template fails"),
    "template unknown filter": (lambda p: p.write("model/chat_template.jinja", "{{ 1 | nope }}"), "template fails"),
    "template divides by zero": (lambda p: p.write("model/chat_template.jinja", "{{ 1 / 0 }}"), "template fails"),
    "template raises": (lambda p: p.write("model/chat_template.jinja", "{{ raise_exception('no system') }}"),
                        "its chat template fails .*no system"),
    "template reads too far": (lambda p: p.write("model/chat_template.jinja", never_ending()), "template fails"),
    "template drops the problem": (lambda p: p.write("model/chat_template.jinja", "hello"),
                                   "its chat template changes or drops the problem"),
    "template shouts": (lambda p: p.write("model/chat_template.jinja", "{{ messages[0]['content'] | upper }}"),
                        "its chat template changes or drops the problem"),
    "template is nosy": (lambda p: p.write(
        "model/chat_template.jinja", "{{ messages.__class__.__mro__[1].__subclasses__() }}"), "template fails"),
    "fewer embeddings than tokens": (lambda p: other_model(p, vocab_size=150), r"pairs.jsonl:\d: has token \d+, but .*model has 150 embeddings"),
    "reference of another vocabulary": (lambda p: (shutil.copytree(p.source, p.folder / "reference"), p.write(
        "reference/tokenizer.json", (p.folder / "model/tokenizer.json").read_text().replace('"<s>"', '"<t>"')),
        p.flags.update(reference=p.folder / "reference")), "--reference .*: its vocabulary is not that of"),
    "reference nowhere": (lambda p: p.flags.update(reference="/nowhere/at/all"), "/nowhere/at/all: no such"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(place, case, monkeypatch, capsys):
    spoil, message = MODELS[case]
    spoil(place)
    refused(place, message, monkeypatch, capsys)


# --------------------------------------------------------------------------------------------- output folders

OUTPUTS = {
    "a file": (lambda p: p.write("out", "mine"), "--output-dir .*out: is not a folder"),
    "below a file": (lambda p: (p.write("file", "mine"), p.flags.update({"output-dir": p.folder / "file/out"})),
                     "file/out/.lock: cannot be written: Not a directory"),
    "a dangling link": (lambda p: (p.folder / "out").symlink_to("nowhere"), "out: is not a folder"),
    "the model's folder": (lambda p: p.flags.update({"output-dir": p.folder / "model"}), "must not be in"),
    "in the model's folder": (lambda p: p.flags.update({"output-dir": p.folder / "model/a/b"}), "must not be in"),
    "the model's, by a link": (lambda p: (p.folder / "out").symlink_to("model"), "must not be in"),
    "above the model": (lambda p: p.flags.update({"output-dir": p.folder}), "model: is not of a run"),
    "somebody's model": (lambda p: p.write("out/model/weights", "mine"), "out/model: is not of a run"),
    "somebody's checkpoints": (lambda p: p.write("out/checkpoints/best/w", "mine"), "checkpoints: is not of a run"),
    "somebody's metrics": (lambda p: p.write("out/metrics.jsonl", "mine"), "metrics.jsonl: is not of a run"),
    "somebody's export": (lambda p: p.write("out/model.unfinished/w", "mine"), "unfinished: is not of a run"),
    "somebody's answers": (lambda p: p.write("out/before.jsonl", "mine"), "before.jsonl: is not of a run"),
    "somebody's run.json": (lambda p: p.write("out/run.json", "{}"), "already holds a run"),
    "a link for metrics": (lambda p: (p.write("out/x", "mine"), (p.folder / "out/metrics.jsonl").symlink_to("x")),
                           "metrics.jsonl: is not of a run"),
    "resumes somebody's run.json": (lambda p: (p.write("out/run.json", "{}"), p.flags.update(resume=None)),
                                    "run.json: is not the record of a run"),
    "resumes a list": (lambda p: (p.write("out/run.json", "[]"), p.flags.update(resume=None)),
                       "run.json: is not the record of a run"),
    "resumes a torn run.json": (lambda p: (p.write("out/run.json", '{"config'), p.flags.update(resume=None)),
                                "run.json:1: not valid JSON"),
    "resumes no text": (lambda p: (p.write("out/run.json", b"\xff"), p.flags.update(resume=None)),
                        "run.json: not UTF-8"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_output_folders(place, case, monkeypatch, capsys):
    spoil, message = OUTPUTS[case]
    spoil(place)
    more = ["--resume"] if place.flags.pop("resume", "") is None else []
    refused(place, message, monkeypatch, capsys, *more)


# ------------------------------------------------------------------------------------- checkpoints, going on

STEPS = {"max-steps": 4, "save-every": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny):
    """A folder with `whole`, a run of four optimizer steps, and `out`, one that ended before its fourth."""
    place, train_step = Place(tmp_path_factory.mktemp("runs"), tiny), stepdpo.train_step
    place.flags |= STEPS
    stepdpo.train(stepdpo.parse([*place.words(), f"--output-dir={place.folder / 'whole'}"]))

    def end_before_the_fourth(step, *others):
        if step == 3:
            raise RuntimeError("as good as killed")
        return train_step(step, *others)

    stepdpo.train_step = end_before_the_fourth
    with pytest.raises(RuntimeError, match="as good as killed"):
        stepdpo.train(stepdpo.parse(place.words()))
    stepdpo.train_step = train_step
    return place.folder


@pytest.fixture
def stopped(place, runs):
    for name in ("whole", "out"):
        shutil.copytree(runs / name, place.folder / name)
    place.flags |= STEPS
    return place


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def goes_on(place: Place, monkeypatch, capsys) -> str:
    """The run with --resume ends as the undisturbed one did. Returns what it printed."""
    status, out, err = start(place.words("--resume"), monkeypatch, capsys)
    assert status == 0, err
    assert losses(place.folder / "out") == losses(place.folder / "whole")
    ended = [place.folder / name / "model/model.safetensors" for name in ("out", "whole")]
    assert ended[0].read_bytes() == ended[1].read_bytes()
    return out


def forget_a_flag(place: Place, name: str) -> None:
    """Make run.json like one of an older trainer, which had no such flag."""
    config = json.loads((place.folder / "out/run.json").read_text())["config"]
    del config[name]
    place.edit_json("out/run.json", config=config)


CHECKPOINT = "out/checkpoints/step-000003"
HARMLESS = {
    "nothing": lambda p: None,
    "metrics torn": lambda p: p.write("out/metrics.jsonl", '{"step": 0, "lo'),
    "metrics gone": lambda p: (p.folder / "out/metrics.jsonl").unlink(),
    "metrics binary": lambda p: p.write("out/metrics.jsonl", b"\xff\x00"),
    "a save that was killed": lambda p: p.write("out/checkpoints/step-000004.unfinished/weights.0", "torn"),
    "a removal that was killed": lambda p: p.write("out/checkpoints/step-000002.unfinished/weights.0", "torn"),
    "an export that was killed": lambda p: p.write("out/model.unfinished/config.json", "torn"),
    "a newer one with torn state": lambda p: p.write("out/checkpoints/step-000004/state.json", '{"step'),
    "a newer one with other state": lambda p: p.write("out/checkpoints/step-000004/state.json", "[1]"),
    "a newer one without its files": lambda p: p.write(
        "out/checkpoints/step-000004/state.json", json.dumps({"sha256": {"weights.0.safetensors": "0"}})),
    "other things beside it": lambda p: p.write("out/checkpoints/best/weights", "mine"),
    "checkpoints gone": lambda p: shutil.rmtree(p.folder / "out/checkpoints"),
    "a record from before a flag was there": lambda p: forget_a_flag(p, "nll_weight"),
    "all gone": lambda p: shutil.rmtree(p.folder / "out"),
    "the data moved": lambda p: (shutil.move(p.folder / "pairs.jsonl", p.folder / "moved.jsonl"),
                                 p.flags.update(data=p.folder / "moved.jsonl")),
    "the model moved": lambda p: (shutil.move(p.folder / "model", p.folder / "moved"),
                                  p.flags.update(model=p.folder / "moved")),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_a_run_gets_over(stopped, case, monkeypatch, capsys):
    HARMLESS[case](stopped)
    out = goes_on(stopped, monkeypatch, capsys)
    assert ("is damaged" in out) == ("a newer one" in case)
    assert not list((stopped.folder / "out/checkpoints").glob("*.unfinished"))
    if case == "other things beside it":
        assert (stopped.folder / "out/checkpoints/best/weights").read_text() == "mine"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGED = {
    "a flipped bit in the weights": (lambda p: flip_a_byte(p.folder / CHECKPOINT / "weights.0.safetensors"),
                                     "weights.0.safetensors has changed"),
    "a flipped bit in a moment": (lambda p: flip_a_byte(p.folder / CHECKPOINT / "exp_avg.0.safetensors"),
                                  "exp_avg.0.safetensors has changed"),
    "a torn file": (lambda p: os.truncate(p.folder / CHECKPOINT / "exp_avg_sq.0.safetensors", 100), "has changed"),
    "a file gone": (lambda p: (p.folder / CHECKPOINT / "weights.0.safetensors").unlink(), "No such file"),
    "a state gone": (lambda p: (p.folder / CHECKPOINT / "state.json").unlink(), "step-000003: is no checkpoint"),
    "a checkpoint without content": (lambda p: (p.folder / "out/checkpoints/step-000004").mkdir(),
                                     "step-000004: is no checkpoint, as it has no state.json; move it away"),
    "a checkpoint by a link": (lambda p: (p.folder / "out/checkpoints/step-000004").symlink_to("step-000003"),
                               "step-000004: is no checkpoint"),
    "a state of another step": (lambda p: p.edit_json(f"{CHECKPOINT}/state.json", step=2), "state.json: has changed"),
    "a state of no shards": (lambda p: p.edit_json(f"{CHECKPOINT}/state.json", shards=0), "has changed"),
    "a state without hashes": (lambda p: p.edit_json(f"{CHECKPOINT}/state.json", sha256={}), "has changed"),
    "a state that leaves its folder": (lambda p: p.edit_json(
        f"{CHECKPOINT}/state.json", sha256={"../../../etc/passwd": "0"}), "has changed"),
    "a state with a text for a number": (lambda p: p.edit_json(f"{CHECKPOINT}/state.json", step="3"), "has changed"),
    "a record of lists": (lambda p: p.edit_json("out/run.json", config=[], content=[]), "is not the record of a run"),
    "checkpoints by a link": (lambda p: (shutil.move(p.folder / "out/checkpoints", p.folder / "elsewhere"),
                                         (p.folder / "out/checkpoints").symlink_to(p.folder / "elsewhere")),
                              "checkpoints: is not of a run of this trainer"),
    "somebody's empty model": (lambda p: (p.folder / "out/model").mkdir(), "out/model: is not of a run"),
    "somebody's model by a link": (lambda p: (p.folder / "out/model").symlink_to(p.folder / "model"),
                                   "out/model: is not of a run"),
    "a state torn": (lambda p: os.truncate(p.folder / CHECKPOINT / "state.json", 30), "state.json:1: not valid"),
    "another flag": (lambda p: p.flags.update(beta=0.3), "another --beta 0.4 -> 0.3"),
    "another value of a flag that was not there yet": (
        lambda p: (forget_a_flag(p, "nll_weight"), p.flags.update({"nll-weight": 0.5})), "another --nll-weight 0.0 -> 0.5"),
    "another schedule": (lambda p: p.flags.update({"max-steps": 9}), "another --max-steps 4 -> 9"),
    "another row": (lambda p: p.edit_rows(chosen=" So we get 5."), "content of --data"),
    "another number in a norm": (lambda p: p.edit_weights("model.norm.weight", lambda w: w + torch.eye(len(w))[3]),
                                 "content of --model"),
    "another number in the head": (lambda p: p.edit_weights(change=lambda w: w.index_fill(0, torch.tensor(3), 0.5)),
                                   "content of --model"),
    "another template": (lambda p: p.write("model/chat_template.jinja", "{{ messages[0]['content'] }}:"),
                         "content of --data"),
    "held-out pairs": (lambda p: p.flags.update({"eval-data": p.held_out()}), "content of --eval-data"),
    "a reference": (lambda p: p.flags.update(reference=p.source), "content of --reference"),
    "no --resume": (lambda p: None, "already holds a run; continue it with --resume"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_a_run_does_not_go_on_from(stopped, case, monkeypatch, capsys):
    spoil, message = DAMAGED[case]
    spoil(stopped)
    refused(stopped, message, monkeypatch, capsys, *(["--resume"] if case != "no --resume" else []))


def test_a_finished_run_is_told_from_another(stopped, monkeypatch, capsys):
    stopped.flags["output-dir"] = stopped.folder / "whole"
    before = tree(stopped.folder)
    assert "finished    already" in start(stopped.words("--resume"), monkeypatch, capsys)[1]
    assert tree(stopped.folder) == before
    stopped.flags["beta"] = 0.1
    refused(stopped, "another --beta 0.4 -> 0.1", monkeypatch, capsys, "--resume")


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/a-payload-ran",)


def test_no_pickle_is_read(stopped, monkeypatch, capsys):
    for path in [*(stopped.folder / CHECKPOINT).iterdir(), stopped.folder / CHECKPOINT / ".metadata"]:
        path.write_bytes(pickle.dumps(Payload()))
    status, _, err = start(stopped.words("--resume"), monkeypatch, capsys)
    assert status == 2 and "no checkpoint can be read" in err and not os.path.exists("/tmp/a-payload-ran")


def test_links_are_not_followed_when_files_are_written(place, monkeypatch, capsys):
    place.write("out/precious", "mine")
    for name in ("run.json.unfinished", "run.json.writing", "run.json.tmp"):
        (place.folder / "out" / name).symlink_to(place.folder / "out/precious")
    assert start(place.words(), monkeypatch, capsys)[0] == 0
    assert (place.folder / "out/precious").read_text() == "mine"


def test_a_second_start_waits_for_nobody(place, monkeypatch, capsys):
    (place.folder / "out").mkdir()
    code = ("import sys, time; from runtime.files import lock; held = lock(sys.argv[1]); print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, place.folder / "out/.lock"], cwd=HERE,
                              stdout=subprocess.PIPE, env=ENVIRONMENT)
    try:
        holder.stdout.readline()
        refused(place, "out/.lock: another process writes there", monkeypatch, capsys)
    finally:
        holder.kill()
        holder.wait()
    assert start(place.words(), monkeypatch, capsys)[0] == 0


# ---------------------------------------------------------------------------------------- the cache, the disk


CACHES = {
    "torn": lambda path: os.truncate(path, path.stat().st_size - 3),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(200)),
    "a flipped bit": flip_a_byte,
    "of other pairs": lambda path: save_file({"tensor": torch.zeros(2, 3)}, path),
    "not a number": lambda path: save_file({"tensor": torch.full((2, 8), math.nan)}, path),
    "of another type": lambda path: save_file({"tensor": torch.zeros(2, 8, dtype=torch.int8)}, path),
    "of another kind": lambda path: save_file({"x": torch.zeros(2, 8)}, path),
}


@pytest.mark.parametrize("case", CACHES)
def test_a_damaged_cache_is_computed_again_and_says_so(place, case, monkeypatch, capsys):
    assert "computed, kept in" in start(place.words(), monkeypatch, capsys)[1]
    (kept,) = (place.folder / "cache").iterdir()
    sound = kept.read_bytes()
    CACHES[case](kept)
    place.flags["output-dir"] = place.folder / "again"
    status, out, _ = start(place.words(), monkeypatch, capsys)
    assert status == 0 and f"{kept} is damaged: computed again" in out
    assert losses(place.folder / "again") == losses(place.folder / "out")
    assert kept.read_bytes() == sound


def test_a_run_goes_on_without_a_cache_and_says_so(place, monkeypatch, capsys):
    place.write("cache", "a file")
    status, out, _ = start(place.words(), monkeypatch, capsys)
    assert status == 0 and "cannot be written" in out


@pytest.mark.parametrize("room, save_every, message", [
    (20, 1, "out/run.json: cannot be written: File too large"),
    (4000, 0, "out/model.unfinished: cannot be written: File too large"),
    (20000, 1, r"step-000001.unfinished/weights.0.safetensors: cannot be written: .*File too large"),
])
def test_a_full_disk_is_named_and_the_run_goes_on_with_more_room(place, runs, room, save_every, message,
                                                                 monkeypatch, capsys):
    """By a limit on the size of files, which needs no rights; the system's words differ, nothing else."""
    monkeypatch.setenv("STEPDPO_CACHE", "/dev/null/cache")
    shutil.copytree(runs / "whole", place.folder / "whole")
    place.flags |= STEPS | {"save-every": save_every}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    try:
        status, out, err = start(place.words(), monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert status == 2 and re.search(message, err) and "Traceback" not in err, err
    goes_on(place, monkeypatch, capsys)


def test_a_disk_without_room_for_the_model_is_refused_at_once(place, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    refused(place, "out: 0.0 GB will be written there, and 0.0 GB are free", monkeypatch, capsys)


# ------------------------------------------------------------------------------------------------- other ends


def test_numbers_that_are_no_longer_finite_are_not_exported(place, monkeypatch, capsys):
    place.flags |= {"max-steps": 1, "learning-rate": 1e38, "eval-data": place.held_out()}
    status, _, err = start(place.words(), monkeypatch, capsys)
    assert status == 2 and re.search("step 1: held-out loss nan; nothing was exported", err)
    place.flags |= {"eval-data": None, "output-dir": place.folder / "again"}
    status, _, err = start(place.words(), monkeypatch, capsys)
    assert status in (0, 2) and "Traceback" not in err
    place.flags |= {"max-steps": 2, "output-dir": place.folder / "third"}
    status, _, err = start(place.words(), monkeypatch, capsys)
    assert status == 2 and re.search("\nstepdpo.py: error: step 1: loss nan", err)  # not glued to the bar
    for name in ("out", "again", "third"):
        for line in (place.folder / name / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda word: pytest.fail(word))  # NaN is not JSON


def test_a_schedule_of_a_billion_epochs_begins_at_once(place, monkeypatch, capsys):
    assert start(place.words("--epochs=1000000000", "--max-steps=1"), monkeypatch, capsys)[0] == 0


def test_resume_on_a_fresh_folder_starts(place, monkeypatch, capsys):
    assert start(place.words("--resume"), monkeypatch, capsys)[0] == 0
    assert len(losses(place.folder / "out")) == 2


def test_code_that_comes_with_a_model_is_not_run(place, monkeypatch, capsys):
    ran = place.folder / "ran"
    place.write("model/evil.py", f"open({str(ran)!r}, 'w')")
    place.edit_json("model/config.json", model_type="mine", auto_map={"AutoConfig": "evil.Config"})
    place.edit_json("model/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a library that asks would be told yes
    assert start(place.words(), monkeypatch, capsys)[0] == 2 and not ran.exists()


# -------------------------------------------------------------------------------------------- several processes

WITH_TROUBLE = """import os, sys, time
sys.path.insert(0, {here!r})
import stepdpo
from runtime.messages import InputError
train_step, rank = stepdpo.train_step, os.environ["RANK"]
def with_trouble(step, *others):
    if step == 1 and rank == "1":
        {trouble}
    return train_step(step, *others)
stepdpo.train_step = with_trouble
stepdpo.main()
"""


def start_two(place: Place, trouble: str, *more: str) -> subprocess.Popen:
    script = place.write("trouble.py", WITH_TROUBLE.format(here=str(HERE), trouble=trouble))
    return subprocess.Popen([*TORCHRUN, "2", str(script), *place.words(*more)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT)


@pytest.mark.slow
def test_a_mistake_that_one_rank_meets_is_said_once(place):
    child = start_two(place, "raise InputError('the disk of this node is odd')")
    output, _ = child.communicate(timeout=100)
    assert child.returncode != 0 and output.count("stepdpo.py: error: the disk of this node is odd\n") == 1, output
    assert 'trouble.py", line' not in output  # no stack trace of ours


@pytest.mark.slow
def test_a_mistake_that_all_ranks_meet_is_said_once(place):
    place.write("pairs.jsonl", "{")
    child = start_two(place, "pass")
    output, _ = child.communicate(timeout=100)
    assert output.count("pairs.jsonl:1: not valid JSON") == 1 and 'trouble.py", line' not in output, output


@pytest.mark.slow
def test_a_rank_that_hangs_is_an_error_in_the_end(place):
    child = start_two(place, "time.sleep(1000)", "--timeout=0.05")
    output = ""
    for line in child.stdout:
        output += line
        if "error: waited in vain for another process" in line:
            break
    child.kill()
    assert "error: waited in vain for another process" in output, output


@pytest.mark.slow
def test_nobody_writes_on_when_torchrun_is_gone(place):
    child = start_two(place, "time.sleep(1000)")
    while "loading" not in child.stdout.readline():
        assert child.poll() is None
    workers = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    child.kill()
    child.wait()
    for worker in workers:
        for _ in range(100):
            if not os.path.exists(f"/proc/{worker}"):
                break
            time.sleep(0.1)
        assert not os.path.exists(f"/proc/{worker}")


# --------------------------------------------------------------------------- unusual, and right: these must work


def in_shards(place: Place) -> None:
    weights = load_file(place.folder / "model/model.safetensors")
    (place.folder / "model/model.safetensors").unlink()
    where = {name: f"{'ab'[i % 2]}/model.safetensors" for i, name in enumerate(weights)}
    for path in set(where.values()):
        (place.folder / "model" / path).parent.mkdir()
        save_file({name: weights[name] for name in weights if where[name] == path}, place.folder / "model" / path)
    place.write("model/model.safetensors.index.json", json.dumps({"weight_map": where}))


def in_a_hub_cache(place: Place) -> None:
    for path in (place.folder / "model").iterdir():
        shutil.move(path, place.folder / f"blob-{path.name}")
        path.symlink_to(f"../blob-{path.name}")


def as_halves(place: Place) -> None:
    weights = load_file(place.folder / "model/model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()},
              place.folder / "model/model.safetensors", metadata={"format": "pt"})


WORKS = {
    "several files": lambda p: p.flags.update({"data": None}),
    "a share held out": lambda p: p.flags.update({"eval-data": 0.3}),
    "one pair": lambda p: write_jsonl(p.folder / "pairs.jsonl", make_rows(1)),
    "a batch above all pairs": lambda p: p.flags.update({"batch-size": 1000}),
    "Windows' line ends": lambda p: p.write(
        "pairs.jsonl", b"\xef\xbb\xbf" + (p.folder / "pairs.jsonl").read_bytes().replace(b"\n", b"\r\n")),
    "one list": lambda p: (p.write("pairs.json", json.dumps(make_rows(8))),
                           p.flags.update(data=p.folder / "pairs.json")),
    "spaces and accents": lambda p: p.flags.update({"output-dir": p.folder / "mein Läuf (1)/out"}),
    "files in folders": in_shards,
    "links as in the hub's cache": in_a_hub_cache,
    "16 bit": as_halves,
    "a folder with other things": lambda p: p.write("out/notes.txt", "mine"),
    "a link to a folder": lambda p: ((p.folder / "real").mkdir(), (p.folder / "out").symlink_to("real")),
}


@pytest.mark.parametrize("case", WORKS)
def test_what_works(place, case, monkeypatch, capsys):
    WORKS[case](place)
    pairs = place.folder / "pairs.jsonl"
    more = ["--data", pairs, pairs] if case == "several files" else []
    status, out, err = start(place.words(*more), monkeypatch, capsys)
    assert status == 0, err
    exported = Path(place.flags["output-dir"]) / "model"
    assert {path.relative_to(exported) for path in exported.rglob("*") if path.is_file()} == {
        path.relative_to(place.folder / "model") for path in (place.folder / "model").rglob("*") if path.is_file()}
    expected = {"several files": "training    16 pairs", "a share held out": "held-out    "}.get(case, "training")
    assert expected in out


def test_weights_in_a_folder_of_the_model_count_too(place, monkeypatch, capsys):
    place.flags |= STEPS
    in_shards(place)
    monkeypatch.setattr(stepdpo.weights, "export", lambda *_: None)
    assert start(place.words(), monkeypatch, capsys)[0] == 0
    path = place.folder / "model/a/model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    refused(place, "content of --model", monkeypatch, capsys, "--resume")


def _train_with(name: str, value: str, words: list[str]) -> None:
    for other in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(other, None)
    os.environ[name] = value
    train_by_flags(words)


@pytest.mark.parametrize("name, value", [("RANK", "0"), ("LOCAL_RANK", "x"), ("LOCAL_WORLD_SIZE", "-1")])
def test_an_environment_that_torchrun_did_not_make(place, name, value):
    (child,) = start_ranks(1, place.folder, _train_with, name, value, place.words())
    child.join(100)
    said = (place.folder / "said-0").read_text()
    assert child.exitcode == 2
    assert re.fullmatch(f"stepdpo.py: error: .*{name}.* in the environment must be .*", said.strip()), said


@pytest.mark.slow
def test_an_old_locale_ends_no_run(place):
    place.edit_rows(chosen=" that is \u2713 right.")
    ended = subprocess.run([sys.executable, HERE / "stepdpo.py", *place.words()], capture_output=True,
                           env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}, timeout=100)
    assert ended.returncode == 0, ended.stderr


def test_errors_reach_the_terminal_as_one_line(place):
    place.write("pairs.jsonl", "{")
    ended = subprocess.run([sys.executable, HERE / "stepdpo.py", *place.words()], capture_output=True, text=True,
                           env=ENVIRONMENT, timeout=100)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"stepdpo.py: error: {place.folder}/pairs.jsonl:1: not valid JSON")
