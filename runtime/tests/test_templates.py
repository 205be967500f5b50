"""What is text and what is control: the tokenizer's own file, a fixed date, one end of an answer."""

import json
import os
import shutil
import time
from argparse import Namespace
from pathlib import Path
from unicodedata import normalize

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
import stepdpo
from conftest import CHATML, make_rows, make_tokenizer, write_jsonl
from pairs.sampling import Samples, Settings
from runtime import rows, templates
from runtime.messages import InputError

TEXTS = ["Step 1: 12 + 345 = 357.\nStep 2: so it's 357", "  three   spaces\n\n\nand 1,000,000 lines",
         "naïve: 3×4=12"]


def flags(**changes) -> Namespace:
    return Namespace(**{"template": "chat", "instruction": None, "template_args": None, "span": "step",
                        "max_length": 1024, **changes})


def pairs_of(found: list[dict], tokenizer, **changes) -> list[data.Pair]:
    numbered = [(f"f:{n}", row) for n, row in enumerate(found, 1)]
    return rows.pairs_of(numbered, "training", tokenizer, flags(**changes))


# ---------------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer",
                                  "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_text_is_cut_as_tokenizer_json_says_whatever_the_class(tmp_path, kind, part):
    digits = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}|\s+|."), "isolated"),
                                      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    other = {"pre_tokenizer": digits, "normalizer": normalizers.NFD()}[part]
    tokenizer = make_tokenizer()
    setattr(tokenizer.backend_tokenizer, part, other)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": kind}))

    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = templates.read_tokenizer(str(tmp_path))
    expected = [file.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert data.tokenize(ours, TEXTS, "chat", TEXTS) == expected
    assert [normalize("NFC", text) for text in ours.batch_decode(expected)] == TEXTS


def test_a_tokenizer_that_loses_text_is_refused_by_place(tokenizer):
    lossy = make_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match=r"^f:1: the tokenizer of .* loses part .*What.* becomes .*what"):
        pairs_of(make_rows(2), lossy)


# ---------------------------------------------------------------------------------------------- template args


THINKING = CHATML + "{% if enable_thinking is defined and not enable_thinking %}NO THOUGHTS\n{% endif %}"
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + CHATML


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_variables_of_the_chat_template_reach_it():
    tokenizer = with_template(THINKING)
    assert "NO THOUGHTS" not in data.open_turn(tokenizer, "2 + 2?", "chat")
    assert "NO THOUGHTS" in data.open_turn(tokenizer, "2 + 2?", "chat", None, {"enable_thinking": False})
    config = stepdpo.parse(["--model", "m", "--data", "d", "--output-dir", "o", "--template-args",
                            '{"enable_thinking": false}'])
    assert config.template_args == {"enable_thinking": False}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"strftime_now": "today"}', '{"strftime_now": 3}'])
def test_template_args_must_be_an_object(text, capsys):
    with pytest.raises(SystemExit):
        stepdpo.parse(["--model", "m", "--data", "d", "--output-dir", "o", "--template-args", text])
    assert "--template-args: must be a JSON object like" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- today's date


@pytest.fixture
def day(monkeypatch):
    """Moves the date: two places of the world that never have the same."""
    def move(place: str) -> None:
        monkeypatch.setenv("TZ", place)
        time.tzset()

    yield move
    monkeypatch.undo()
    time.tzset()


FIRST_DAY, SECOND_DAY = "Etc/GMT+12", "Etc/GMT-14"


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", 'strftime_now( "%d %b %Y" )'])
def test_what_a_template_prints_of_today_is_fixed(call):
    tokenizer = with_template("{% if strftime_now is defined %}{{ " + call + " }}{% endif %}" + CHATML)
    text = data.open_turn(tokenizer, "2?", "chat", "", {"strftime_now": "2024-07-26"})
    assert text.startswith("26 Jul 2024")


def test_a_date_that_cannot_be_fixed_is_refused():
    tokenizer = with_template("{% set how = '%d' %}{{ strftime_now(how) }}" + CHATML)
    with pytest.raises(InputError, match="its date cannot be fixed"):
        data.open_turn(tokenizer, "2?", "chat", "", {"strftime_now": "2024-07-26"})


def test_only_templates_that_print_the_date_get_one():
    assert templates.with_date(None, with_template(CHATML), "chat", None) is None
    assert templates.with_date(None, with_template(DATED), "alpaca", None) is None
    own = {"strftime_now": "2024-07-26"}
    assert templates.with_date(own, with_template(DATED), "chat", {"strftime_now": "2025-01-01"}) == own
    assert templates.with_date({"a": 1}, with_template(DATED), "chat", own) == {"a": 1, **own}


def test_a_run_goes_on_tomorrow_with_the_date_of_its_first_start(tiny, tmp_path, day, capsys, monkeypatch):
    monkeypatch.setenv("STEPDPO_CACHE", str(tmp_path / "cache"))
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "chat_template.jinja").write_text(DATED)
    file = write_jsonl(tmp_path / "pairs.jsonl", make_rows(4))

    def train(out: str, *more: str) -> None:
        words = ["--model", str(model), "--data", file, "--output-dir", str(tmp_path / out), "--resume"]
        schedule = ["--batch-size", "2", "--epochs", "2", "--save-every", "1"]
        stepdpo.train(stepdpo.parse([*words, *schedule, *more]))

    day(FIRST_DAY)
    train("whole")
    train_step = stepdpo.train_step

    def stop_at_the_third(step, *others):
        if step == 2:
            raise KeyboardInterrupt
        return train_step(step, *others)

    monkeypatch.setattr(stepdpo, "train_step", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train("stopped")
    monkeypatch.setattr(stepdpo, "train_step", train_step)
    day(SECOND_DAY)
    train("stopped")

    assert "resuming    after optimizer step 2" in capsys.readouterr().out
    weights = [(tmp_path / out / "model/model.safetensors").read_bytes() for out in ("whole", "stopped")]
    assert weights[0] == weights[1]
    with pytest.raises(InputError, match="--template-args"):
        train("stopped", "--template-args", '{"strftime_now": "2024-07-26"}')


def test_samples_of_two_days_are_drawn_on_the_first(tiny, tmp_path, day):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "chat_template.jinja").write_text(DATED)
    settings = Settings(str(model))

    args = []
    for place in (FIRST_DAY, SECOND_DAY):
        day(place)
        samples = Samples(str(tmp_path / "samples.jsonl"), settings)
        args.append(samples.settings.template_args)
        del samples  # gives up the lock
    assert args[0] == args[1] and "strftime_now" in args[0]
    with pytest.raises(InputError, match="was made with template_args"):
        other = Settings(str(model), template_args={"strftime_now": "2024-07-26"})
        Samples(str(tmp_path / "samples.jsonl"), other)


# ----------------------------------------------------------------------- control tokens, the end of an answer


@pytest.mark.parametrize("field, text", [
    ("prompt", "What is 2?<|im_end|>\n<|im_start|>assistant\n"),
    ("initial_reason_steps", "<|im_start|>Step 1:"),
    ("chosen", " It is 2.<|im_end|>"), ("rejected", " It is<s> 3."),
    ("prompt", [{"role": "user", "content": "<s>"}]),
])
def test_control_tokens_in_the_text_of_rows_are_dropped_and_counted(tokenizer, field, text, capsys):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<s>"]})
    good = make_rows(9)
    kept = pairs_of([*good, {**good[0], field: text}], tokenizer)
    assert [pair.where for pair in kept] == [f"f:{n}" for n in range(1, 10)]
    assert f"dropped 1: {field!r} holds the control token" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"a fifth: 3 {field!r} holds the control token .*first: f:10"):
        pairs_of([*good, *[{**good[0], field: text}] * 3], tokenizer)


def test_problems_with_control_tokens_are_not_sampled(tiny, tmp_path):
    from pairs.problems import read_problems
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "2 + 2?<|im_end|>", "answer": "4"}])
    samples = Samples(str(tmp_path / "samples.jsonl"), Settings(tiny, max_new_tokens=4))
    samples.control_tokens = ["<|im_end|>"]
    with pytest.raises(InputError, match=r"the problem '2 \+ 2\?<\|im_end\|>' holds the control token"):
        samples.draw([(problem, "Step 1:") for problem in read_problems(file)], 1)


TURN_ENDS = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama 2": ("{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else "
                "' ' + m['content'] + ' </s>' }}{% endfor %}", "</s>"),
    "gemma": ("{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
              "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}", "<end_of_turn>"),
    "none": ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "<eos>"),
}


@pytest.mark.parametrize("form", TURN_ENDS)
@pytest.mark.parametrize("written", ["", "{end}", "{end}\n"])
def test_a_solution_ends_once_as_the_template_ends_a_turn(form, written):
    template, end = TURN_ENDS[form]
    tokenizer = with_template(template)
    tokenizer.add_special_tokens({"eos_token": "<eos>", "additional_special_tokens": [
        "<|im_start|>", "<|im_end|>", "</s>", "<start_of_turn>", "<end_of_turn>"]})
    (row,) = make_rows(1)
    row |= {"full_chosen": row["full_chosen"] + written.format(end=end)}
    (pair,) = pairs_of([row], tokenizer, span="solution")
    last = tokenizer.convert_tokens_to_ids(end)
    assert pair.chosen[-1] == pair.rejected[-1] == last
    assert (pair.chosen + pair.rejected).count(last) == 2
    (step,) = pairs_of([row], tokenizer)
    assert last not in step.chosen + step.rejected


def test_without_a_chat_template_a_solution_ends_with_eos(tokenizer):
    (pair,) = pairs_of(make_rows(1), tokenizer, span="solution", template="alpaca")
    assert pair.chosen[-1] == tokenizer.eos_token_id


def test_the_embedded_model_is_cut_as_its_file_says():
    folder = Path(__file__).parents[2] / "demo/model"
    plain, ours = AutoTokenizer.from_pretrained(folder), templates.read_tokenizer(str(folder))
    text = (folder.parent / "pairs.jsonl").read_text()[:20_000]
    assert ours(text).input_ids == plain(text).input_ids
    assert os.path.isfile(folder / "tokenizer.json")
