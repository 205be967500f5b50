"""Making step pairs out of a model's own samples: `python -m pairs --help`.

In reading order: problems.py, problems and numbered steps; grading.py, which answers are right, with
extraction.py, where a text says its answer, and units.py, which words are a unit; sampling.py, samples that
are kept in cache.py, drawn as settings.py says, by server.py or by local.py in this process, whose batch.py
and keyvalues.py hold what a model has read; judge.py, a model that judges steps; stages.py, solve, locate and
rectify; __main__.py, the flags.
"""
