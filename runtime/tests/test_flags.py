"""How flags are read: hyphens, underscores, files of flags; and each wrong one is a usage error that names it."""

import re

import pytest

import stepdpo
from runtime.flags import flags

REQUIRED = ["--model=m", "--data=d", "--output-dir=o"]


def test_flags_take_hyphens_underscores_and_files(tmp_path):
    config = stepdpo.parse([*REQUIRED, "--learning_rate", "1e-6", "--no-share-prefix", "--max-length=7"])
    assert (config.learning_rate, config.share_prefix, config.max_length) == (1e-6, False, 7)
    (tmp_path / "args").write_text(
        "# a recipe\n--model m --data d\n--output_dir 'a folder'  # comment\n--beta 0.5\n")
    config = stepdpo.parse([f"@{tmp_path / 'args'}", "--beta", "0.3"])
    assert (config.output_dir, config.beta) == ("a folder", 0.3)
    defaults = stepdpo.parse(REQUIRED)
    assert (defaults.learning_rate, defaults.beta, defaults.batch_size) == (5e-7, 0.4, 128)
    assert (defaults.epochs, defaults.warmup_ratio) == (8, 0.1)


FLAGS = [
    (["--warmup-ratio=5"], "must be from 0 to 1, got 5"),
    (["--warmup-ratio=-0.1"], "must be from 0 to 1"),
    (["--warmup-ratio=nan"], "must be from 0 to 1, got nan"),
    (["--learning-rate=inf"], "must be above 0, got inf"),
    (["--learning-rate=0"], "must be above 0"),
    (["--learning-rate="], "invalid float value: ''"),
    (["--beta=-1"], "must be above 0"),
    (["--beta=1e999"], "must be above 0, got 1e999"),
    (["--batch-size=0"], "must be above 0"),
    (["--batch-size=1.5"], "invalid int value: '1.5'"),
    (["--batch-size=" + "9" * 5000], "invalid int value"),
    (["--epochs=0"], "must be above 0"),
    (["--epochs=-3"], "must be above 0"),
    (["--epochs=" + "9" * 300], r"must be above 0 and at most 10\^12"),
    (["--max-length=0"], "must be above 0"),
    (["--max-steps=x"], "invalid int value: 'x'"),
    (["--seed=-1"], "must be at least 0"),
    (["--eval-every=0"], "must be above 0"),
    (["--save-every=-1"], "must be at least 0"),
    (["--timeout=0"], "must be above 0"),
    (["--timeout=1e300"], "must be above 0 and at most 1000000"),
    (["--eval-data=0.0"], "must be a file or above 0 and below 1"),
    (["--eval-data=1.5"], "must be a file or above 0 and below 1"),
    (["--eval-data="], "must be more than nothing"),
    (["--template=chatml"], "invalid choice: 'chatml'"),
    (["--span=token"], "invalid choice: 'token'"),
    (["--dtype=float8"], "invalid choice: 'float8'"),
    (["--output-dir="], "must be more than nothing"),
    (["--model="], "must be more than nothing"),
    (["--data="], "must be more than nothing"),
    (["--reference="], "must be more than nothing"),
    (["--test-problems="], "must be more than nothing"),
    (["--data"], "expected at least one argument"),
    (["--unknown=1"], "unrecognized arguments"),
    (["--learn=1"], "unrecognized arguments"),
    (["pairs.jsonl"], "unrecognized arguments"),
    (["--no-dtype"], "unrecognized arguments"),
    (["--offload=yes"], "--offload: invalid choice: 'yes'"),
]


def usage_error(words: list[str], capsys) -> str:
    """The last line that the flags end in."""
    with pytest.raises(SystemExit) as stop:
        stepdpo.parse(words)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words, message", FLAGS, ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "")
def test_wrong_flags_are_usage_errors(capsys, words, message):
    assert re.search(message, usage_error([*REQUIRED, *words], capsys))


def test_missing_flags_are_usage_errors(capsys):
    assert "required: --data, --output-dir" in usage_error(["--model=m"], capsys)


def test_each_flag_is_shown_with_its_default():
    text = " ".join(flags().format_help().split())
    for shown in ("[5e-7]", "paper: 0.4, and 0.5 for 72B [0.4]", "0.05 holds out 5% of the problems"):
        assert shown in text


RECIPES = {
    "missing": (None, "recipe: No such file"),
    "not text": (b"--beta 0.1\n\xff\xfe\x00", "recipe:2: .*can't decode byte"),
    "open quotation": ("--seed 1\n--instruction 'no end", "recipe:2: No closing quotation"),
    "includes itself": ("--seed 1\n@RECIPE", "recipe: includes itself"),
    "includes what includes it": ("@RECIPE2", "recipe: includes itself"),
    "unknown flag": ("--nope 1", "unrecognized arguments"),
    "bad value": ("--beta zero", "invalid float value: 'zero'"),
    "a null byte": (b"--seed 1\n--instruction a\x00b", "recipe:2: a null byte"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_wrong_files_of_flags_are_named_by_line(tmp_path, case, capsys):
    content, message = RECIPES[case]
    recipe, other = tmp_path / "recipe", tmp_path / "recipe2"
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        recipe.write_bytes(content.replace(b"RECIPE2", bytes(other)).replace(b"RECIPE", bytes(recipe)))
    other.write_text(f"@{recipe}")
    assert re.search(message, usage_error([*REQUIRED, f"@{recipe}"], capsys))


def test_a_file_of_flags_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "recipe").write_bytes(b"\xef\xbb\xbf--beta 0.25 # as Windows' editors write it\r\n")
    assert stepdpo.parse([*REQUIRED, f"@{tmp_path / 'recipe'}"]).beta == 0.25
