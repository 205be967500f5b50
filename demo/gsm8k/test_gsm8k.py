"""The study on GSM8K: its split, what it keeps, what its arms are trained on. No model is needed."""

import contextlib
import gzip
import sys
from argparse import Namespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import HERE

sys.path.insert(0, str(HERE / "demo/gsm8k"))
import one_gpu  # noqa: E402
import pieces  # noqa: E402
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


# ------------------------------------------------------------------------------- in pieces to another machine


@pytest.fixture
def folder(tmp_path):
    """A model of two tensors, one of which is 8-bit numbers times scales, and some text beside it."""
    random = np.random.default_rng(0)
    scales = np.array([[0.0], [3e-7], [0.125], [2.0]], np.float16)  # none, a subnormal, exact, large
    numbers = random.integers(-126, 127, (4, 32))
    numbers[:, 5], numbers[0] = [127, -127, 127, -127], 0
    tensors = {"exact": (numbers * scales.astype(np.float32)).astype(np.float32),
               "other": random.normal(size=(3, 32)).astype(np.float32), "short": np.ones(7, np.float16)}
    (tmp_path / "model/sub").mkdir(parents=True)
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    (tmp_path / "model/sub/text.json").write_text("{}" * 2000)
    return tmp_path / "model"


def test_pieces_make_the_same_files_byte_for_byte(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    pieces.cut(str(tmp_path / "cut"), [str(folder), str(tmp_path / "rows.jsonl")], 300 / 2**20)
    names = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert len(names) > 3 and names[0].startswith(f"01-of-{len(names):02}-")
    assert all(path.stat().st_size <= 300 for path in (tmp_path / "cut").iterdir())

    pieces.join(str(tmp_path / "cut"), str(tmp_path / "there"))
    for path in (folder / "model.safetensors", folder / "sub/text.json", tmp_path / "rows.jsonl"):
        assert (tmp_path / "there" / path.relative_to(tmp_path)).read_bytes() == path.read_bytes()

    pieces.cut(str(tmp_path / "again"), [str(folder), str(tmp_path / "rows.jsonl")], 300 / 2**20)
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())


def test_more_than_99_pieces_are_joined_by_their_numbers(folder, tmp_path):
    pieces.cut(str(tmp_path / "cut"), [str(folder)], 10 / 2**20)
    names = [path.name for path in pieces.in_order(str(tmp_path / "cut"))]
    assert len(names) > 99 and names != sorted(names)
    pieces.join(str(tmp_path / "cut"), str(tmp_path / "there"))
    assert (tmp_path / "there/model/sub/text.json").read_bytes() == (folder / "sub/text.json").read_bytes()


def test_only_exact_products_are_sent_as_8_bit_numbers(folder):
    tensors = load_file(folder / "model.safetensors")
    numbers, scales = pieces.as_numbers(tensors["exact"])
    assert (numbers.dtype, scales.dtype) == (np.int8, np.float16)
    assert pieces.as_values(numbers, scales).tobytes() == tensors["exact"].tobytes()
    assert pieces.as_numbers(tensors["other"]) is None
    assert pieces.as_numbers(np.full(32, -0.0, np.float32)) is None  # which is another zero
    assert pieces.as_numbers(np.ones(33, np.float32)) is None


def test_missing_and_damaged_pieces_are_named(folder, tmp_path):
    pieces.cut(str(tmp_path / "cut"), [str(folder)], 300 / 2**20)
    first, second, *_ = sorted((tmp_path / "cut").iterdir())
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(SystemExit, match="lacks 02"):
        pieces.join(str(tmp_path / "cut"), str(tmp_path / "there"))
    second.write_bytes(content[:-1] + b"!")
    with pytest.raises(SystemExit, match=f"{second.name} is damaged"):
        pieces.join(str(tmp_path / "cut"), str(tmp_path / "there"))
    second.write_bytes(content)
    first.with_name("01-of-99-0123456789ab").write_bytes(b"")
    with pytest.raises(SystemExit, match="several archives"):
        pieces.join(str(tmp_path / "cut"), str(tmp_path / "there"))
    assert not any((tmp_path / "there").iterdir())


def test_pieces_are_read_again_only_if_a_file_is_gone(folder, tmp_path):
    pieces.cut(str(tmp_path / "cut"), [str(folder)], 300 / 2**20)
    pieces.join(str(tmp_path / "cut"), str(tmp_path / "there"))
    piece = min((tmp_path / "cut").iterdir())
    content = piece.read_bytes()
    piece.write_bytes(b"no longer read")
    pieces.join(str(tmp_path / "cut"), str(tmp_path / "there"))

    made = tmp_path / "there/model/sub/text.json"
    made.unlink()
    with pytest.raises(SystemExit, match="is damaged"):
        pieces.join(str(tmp_path / "cut"), str(tmp_path / "there"))
    piece.write_bytes(content)
    pieces.join(str(tmp_path / "cut"), str(tmp_path / "there"))
    assert made.read_bytes() == (folder / "sub/text.json").read_bytes()

    (tmp_path / "more.txt").write_text("of other pieces")
    pieces.cut(str(tmp_path / "other"), [str(folder), str(tmp_path / "more.txt")], 300 / 2**20)
    pieces.join(str(tmp_path / "other"), str(tmp_path / "there"))
    assert (tmp_path / "there/more.txt").exists()


# ---------------------------------------------------------------------------------------------- on one GPU


@pytest.fixture
def on_gpu(args):
    """The arguments of one_gpu.py in that work folder."""
    return Namespace(**vars(args), dev=study.DEV, choose=study.CHOOSE, problems=2000, chunk=2, aim=1000,
                     budget=[10, 20, 30], call=100, model="M", dtype="bfloat16", batch_tokens=1000,
                     instruction=None, build=[])


def test_the_rows_held_out_on_a_gpu_are_those_of_the_study(on_gpu):
    study.prepare(on_gpu)
    parts = [make.read(f"{on_gpu.work}/{name}.jsonl") for name in ("train", "choose", "dev")]
    one_gpu.split(on_gpu)
    train, held_out = (make.read(f"{on_gpu.work}/{name}.jsonl") for name in ("train", "held_out"))
    assert [row["prompt"] for row in train + held_out] == [row["question"] for part in parts for row in part]
    assert len(train) == 10 and train[3]["answer"] == "3"


def test_the_sampler_is_told_all_that_build_is_told(on_gpu, monkeypatch):
    """Among it what one_gpu.py has no flag for."""
    monkeypatch.setattr(one_gpu, "LocalSampler", lambda settings, tokenizer: settings)
    monkeypatch.setattr(one_gpu, "read_tokenizer", lambda model: None)
    flags = one_gpu.sampling(on_gpu, "build", "M", "P", "OUT", "bfloat16", *study.BUILD, "--cuda-graphs",
                             "--template", "alpaca")
    settings = one_gpu.sampler_of(flags)
    assert settings.cuda_graphs and settings.template == "alpaca"
    assert (settings.max_new_tokens, settings.batch_tokens, settings.dtype) == (320, 1000, "bfloat16")


def test_the_seconds_of_former_calls_count(on_gpu, monkeypatch):
    now = 0
    monkeypatch.setattr(one_gpu.time, "monotonic", lambda: now)
    clock = one_gpu.Clock(on_gpu)
    with pytest.raises(KeyboardInterrupt), clock.part("pairs"):
        now = 7
        clock.check()
        raise KeyboardInterrupt
    clock.keep(problems=5)

    clock = one_gpu.Clock(on_gpu)
    assert clock.known["problems"] == 5
    with clock.part("pairs"):
        assert clock.left() == 3
        now = 11
        with pytest.raises(one_gpu.TimeIsUp):
            clock.check()
    with clock.part("before"):  # without which there is no result
        now = 106
        clock.check()
        now = 108
        with pytest.raises(SystemExit, match="the same command goes on"):
            clock.check()


def test_chunks_are_as_large_as_the_time_allows(on_gpu, monkeypatch):
    """Of ten rows at 2 s each in 20 s: two, then what fits into about half of what is left."""
    now, ends = 0, []
    on_gpu.budget = [20, 0, 0]

    def build(flags, sampler):
        nonlocal now
        ends.append(len(make.read(flags.problems)))
        now += 2 * (ends[-1] - (ends[-2] if ends[1:] else 0))
        sampler.check()
        (study.Path(on_gpu.work) / "build").mkdir(exist_ok=True)
        make.write(f"{on_gpu.work}/build/pairs.jsonl", [{}] * (ends[-1] // 2))
    monkeypatch.setattr(one_gpu.time, "monotonic", lambda: now)
    monkeypatch.setattr(one_gpu.command, "run", build)
    monkeypatch.setattr(one_gpu, "sampler_of", lambda flags: "a sampler")
    one_gpu.split(on_gpu)
    clock = one_gpu.Clock(on_gpu)
    with clock.part("pairs"):
        one_gpu.make_pairs(on_gpu, clock)
    assert ends == [2, 5, 7, 8] and clock.known["pairs"] == 4 and now == 16

    ends.clear()
    on_gpu.aim, on_gpu.budget = 3, [1000, 0, 0]
    (study.Path(on_gpu.work) / "progress.json").unlink()
    clock = one_gpu.Clock(on_gpu)
    with clock.part("pairs"):
        one_gpu.make_pairs(on_gpu, clock)
    assert ends == [2, 6] and clock.known["pairs"] == 3  # one pair of two rows: two more are four rows


def test_a_chunk_of_two_calls_is_as_slow_as_both_together(on_gpu, monkeypatch):
    """Else what the second call finds in the cache would make the next chunk too large."""
    now, ends = 0, []
    seconds = iter([4, 9, 1, 8])  # the first chunk; the second, until its call ends, and its rest; the third

    def build(flags, sampler):
        nonlocal now
        ends.append(len(make.read(flags.problems)))
        now += next(seconds)
        if now == 13:
            raise SystemExit(one_gpu.AGAIN)
        make.write(f"{on_gpu.work}/build/pairs.jsonl", [{}])
    monkeypatch.setattr(one_gpu.time, "monotonic", lambda: now)
    monkeypatch.setattr(one_gpu.command, "run", build)
    monkeypatch.setattr(one_gpu, "sampler_of", lambda flags: "a sampler")
    (study.Path(on_gpu.work) / "build").mkdir()
    on_gpu.budget = [24, 0, 0]
    one_gpu.split(on_gpu)
    clock = one_gpu.Clock(on_gpu)
    with pytest.raises(SystemExit), clock.part("pairs"):
        one_gpu.make_pairs(on_gpu, clock)
    clock = one_gpu.Clock(on_gpu)
    with clock.part("pairs"):
        one_gpu.make_pairs(on_gpu, clock)
    assert ends == [2, 6, 6, 7]  # four rows took 10 s, not 1: one more is what fits into 4.5 of the 10 left


def test_a_sampler_stops_between_batches_but_not_after_the_last(on_gpu, monkeypatch):
    now, drawn = 0, []

    class Sampler:
        def sample(self, wanted):
            nonlocal now
            for name in wanted:
                now += 6
                drawn.append(name)
                yield [name]

    monkeypatch.setattr(one_gpu.time, "monotonic", lambda: now)
    clock = one_gpu.Clock(on_gpu)
    with clock.part("pairs"):
        assert list(one_gpu.Punctual(Sampler(), clock.check).sample(["a"])) == [["a"]]
        with pytest.raises(one_gpu.TimeIsUp):
            list(one_gpu.Punctual(Sampler(), clock.check).sample(["b", "c"]))
        with pytest.raises(one_gpu.TimeIsUp):
            list(one_gpu.Punctual(Sampler(), clock.check).sample(["d"]))
    assert drawn == ["a", "b"]


def test_a_first_chunk_may_be_late_but_not_outlast_the_call(on_gpu, monkeypatch):
    now, checks = 0, []

    def build(flags, sampler):
        nonlocal now
        for now in (11, 99, 101):  # of 10 for this part, and 100 for the call
            checks.append(now)
            sampler.check()
    monkeypatch.setattr(one_gpu.time, "monotonic", lambda: now)
    monkeypatch.setattr(one_gpu.command, "run", build)
    monkeypatch.setattr(one_gpu, "sampler_of", lambda flags: "a sampler")
    one_gpu.split(on_gpu)
    clock = one_gpu.Clock(on_gpu)
    with pytest.raises(SystemExit, match="the same command goes on"), clock.part("pairs"):
        one_gpu.make_pairs(on_gpu, clock)
    assert checks == [11, 99, 101]


def test_arms_are_only_started_if_the_call_leaves_them_their_time(on_gpu, monkeypatch):
    now, started = 0, []
    monkeypatch.setattr(one_gpu.time, "monotonic", lambda: now)
    monkeypatch.setattr(one_gpu.study, "write_rows", lambda args: None)
    monkeypatch.setattr(one_gpu, "start", lambda arguments, log: started.append(log))
    monkeypatch.setattr(one_gpu, "wait_for_all", lambda running, clock: None)
    on_gpu.arms, on_gpu.rates, on_gpu.epochs, on_gpu.batch_size = ["step"], ["1e-5"], 1, 32
    make.write(f"{on_gpu.work}/pairs.jsonl", [{}])
    for budget, left_in_call, starts in [(20, 19, 0), (20, 21, 1), (500, 89, 0), (500, 91, 1), (0, 50, 0)]:
        on_gpu.budget, now = [0, budget, 0], 0
        clock = one_gpu.Clock(on_gpu)
        now = on_gpu.call - left_in_call
        started.clear()
        with contextlib.suppress(SystemExit), clock.part("train"):
            one_gpu.train(on_gpu, clock)
        assert len(started) == starts


def test_arms_are_ended_with_the_call(on_gpu, tmp_path):
    on_gpu.budget, on_gpu.call = [0, 60, 0], 0.5
    clock = one_gpu.Clock(on_gpu)
    late = one_gpu.start(["-c", "import time; time.sleep(60)"], str(tmp_path / "late.log"))
    with pytest.raises(SystemExit, match="the same command goes on"), clock.part("train"):
        one_gpu.wait_for_all({str(tmp_path / "late"): late}, clock)
    assert late.poll() is not None and 0 < clock.known["seconds"]["train"] < 30


def test_an_arm_that_is_late_or_fails_is_ended_and_left_out(on_gpu, tmp_path, capsys):
    on_gpu.budget = [0, 1, 0]
    clock = one_gpu.Clock(on_gpu)
    running = {str(tmp_path / name): one_gpu.start(["-c", code], str(tmp_path / f"{name}.log"))
               for name, code in (("good", ""), ("bad", "print(6 * 7); raise SystemExit(3)"),
                                  ("late", "import time; time.sleep(60)"))}
    with clock.part("train"):
        one_gpu.wait_for_all(running, clock)
    assert all(process.poll() is not None for process in running.values())
    assert clock.known["seconds"]["train"] < 30
    out = capsys.readouterr().out
    assert "bad failed:\n42" in out and "late: no time left, ended" in out


def test_all_arms_take_as_many_optimizer_steps(on_gpu):
    make.write(f"{on_gpu.work}/sft.jsonl", [{}] * 70)
    on_gpu.epochs, on_gpu.batch_size = 4, 32
    flags = one_gpu.training(on_gpu, "sft", "1e-5", "out")
    assert flags[0] == "demo/sft.py" and flags[flags.index("--batch-size") + 1] == "35"  # 2 steps an epoch
    assert flags[flags.index("--export-dtype") + 1] == "fp32"  # as the others
    flags = one_gpu.training(on_gpu, "nll1", "1e-5", "out")
    assert flags[0] == "stepdpo.py" and flags[flags.index("--nll-weight") + 1] == "1"
    assert "--no-gather-once" in flags  # as each would plan for a GPU of its own


def test_pairs_are_made_of_problems_with_few_calculations():
    of_one = "He has 2+3=<<2+3=5>>5.\n"
    assert study.is_short(4 * of_one + "#### 5") and not study.is_short(5 * of_one + "#### 5")
