"""Making step pairs out of a model's own samples.

    python -m pairs build --model M --problems P.jsonl --out DIR     # the whole pipeline: DIR/pairs.jsonl
    python -m pairs solve --model M --problems P.jsonl --out DIR     # sampling and accuracy only

In reading order: problems.py, problems and numbered steps; grading.py, which answers are right; sampling.py,
one cache of samples; judge.py, a model that judges steps; stages.py, solve, locate and rectify; __main__.py,
the flags.
"""
