"""A judge: a model on a server that reads a solution and names the first wrong step."""

import re

from runtime.files import content_key

from .cache import Cache
from .problems import Problem
from .server import post_all


class Judge:
    """Verdicts of one judge. Its replies are kept as samples are: to be read, and not to be paid twice."""

    def __init__(self, path: str, server: str, model: str, concurrency: int):
        self.cache = Cache(path, {"judge_model": model}, {"reply": str})
        self.server, self.model, self.concurrency = server, model, concurrency

    def first_errors(self, solutions: list[tuple[Problem, list[str]]]) -> list[int | None]:
        """The first wrong step of each solution, or beginning of one, given as the texts of its steps.

        It is 0 if none is wrong, and None if the judge does not answer exactly in the form asked for.
        Collective.
        """
        questions = {}  # by their key in the cache; equal ones are asked once
        for problem, steps in solutions:
            text = question(problem, steps)
            questions[content_key(text)] = text
        missing = [key for key in questions if key not in self.cache.rows]
        own = missing[self.cache.rank::self.cache.ranks]

        common = {"model": self.model, "temperature": 0, "max_tokens": 2048, "stream": False}
        bodies = []
        for key in own:
            bodies.append({**common, "messages": [{"role": "user", "content": questions[key]}]})
        for i, reply in post_all(self.server, "chat/completions", bodies, self.concurrency,
                                 lambda reply: "" + reply["choices"][0]["message"]["content"]):
            self.cache.add([{"key": own[i], "question": questions[own[i]], "reply": reply}])
        self.cache.share()

        verdicts = []
        for problem, steps in solutions:
            row = self.cache.rows[content_key(question(problem, steps))]
            verdicts.append(first_error(row["reply"], len(steps)))
        return verdicts


def question(problem: Problem, steps: list[str]) -> str:
    """What the judge is asked about a solution, given as the texts of its steps."""
    numbered = [f"Step {k}:{text}" for k, text in enumerate(steps, 1)]
    return "\n".join([
        "A student works on a problem, step by step. Find the first wrong step.",
        "\n### Problem", problem.prompt,
        f"\n### Reference {'solution' if problem.reference else 'answer'}",
        problem.reference or problem.answer,
        "\n### The student's steps", *numbered,
        "\nGo through the steps in order and stop at the first wrong one. A step is `incorrect` if it "
        "miscalculates, claims something false or misreads the problem; `neutral` if it only plans or "
        "restates; else `correct`, also where it goes another way than the reference. Explain briefly. "
        "Then end with a line `Verdict:` and one line for each step you went through, like these:\n"
        "Verdict:\nStep 1: correct\nStep 2: incorrect"])


def first_error(reply: str, steps: int) -> int | None:
    """The first wrong step by a judge's verdict, 0 if none is; None if it is not exactly as asked for."""
    before, mark, verdict = reply.rpartition("Verdict:")
    if not mark:
        return None

    words = []
    for line in re.split(r"[\n;]+", verdict.strip("\n ;")):
        found = re.fullmatch(r"Step (\d+): (correct|neutral|incorrect)\.?", line.strip("* \t"))
        if not found or int(found[1]) != len(words) + 1:
            return None
        words.append(found[2])

    if "incorrect" in words:  # it should have stopped there
        stopped = words.index("incorrect") == len(words) - 1 and len(words) <= steps
        return len(words) if stopped else None
    return 0 if len(words) == steps else None
