r"""Which answers are right: text, then exact fractions, then (rarely, if installed) symbols.

Nothing approximates: 0.0005 is not 0.001, 50 is not 0.5, [0,1) is not (0,1), and a text that was cut off
before its answer has none.
"""

import importlib.util
import json
import math
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction

from .extraction import extract_answer

# Longer answers, which nobody writes, are compared as plain text: no rule below must be fast on hostile ones.
LONGEST = 300
SECONDS = 15  # for all formulas of one answer together


def is_correct(solution: str, answer: str) -> bool:
    """Whether the solution's final answer is `answer`. A single letter A-E is graded as multiple choice."""
    guess, answer = extract_answer(solution), extract_answer(answer) or answer
    if guess is None:
        return False
    if re.fullmatch(r"[A-E]|\([A-E]\)", _without_markup(answer)):
        return _chosen_letter(guess) == _chosen_letter(answer)
    if max(len(guess), len(answer)) > LONGEST:
        return _squeezed(guess) == _squeezed(answer)
    return _same(_rewritten(guess), _rewritten(answer), time.monotonic() + SECONDS)


def _without_markup(text: str) -> str:
    return re.sub(r"\\text\w*|\\math\w+|\\mbox|[{}$*]", "", text).strip()


def _chosen_letter(guess: str) -> str | None:
    """"B" of "(B)", "B) 12 km", "option B", "b"; None of "A train"."""
    bare = re.sub(r"^(?:option|choice)\b", "", _without_markup(guess), flags=re.I).strip()
    letter = re.match(r"\(([A-Ea-e])\)|([A-E])(?=\s*[).:,]|$)|([a-e])$", bare)
    return letter[letter.lastindex].upper() if letter else None


# ----------------------------------------------------------------------------------- one way to write a value


# One unit a string: the name it is compared by, then its other names.
UNITS = {name: names.split()[0] for names in (
    "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
    "in inch inches", "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram", "kg kilogram",
    "oz ounce", "lb pound", "ml milliliter millilitre", "l liter litre", "gal gallon",
    "s sec second", "min minute", "h hr hour", "day", "week", "month", "yr year",
    "degree deg", "c celsius", "f fahrenheit", "dollar", "cent", "unit", "th st nd rd",
) for name in names.split()} | {"mph": "mi h", "kmh": "km h", "kph": "km h", "kmph": "km h"}
LONG_UNITS = "|".join(name for name in UNITS if len(name) > 1)
DEGREE = r"(?:\^ ?\{? ?\\circ ?\}?|\\degree(?![a-zA-Z])|\u00b0)"


def _without_separators(found: re.Match) -> str:
    return re.sub("[, ]", "", found[0])


REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\s+", " "),
    # \\ ends a row of a matrix. It gets TeX's other name, so that the rules for "\ " and "\[" do not see it.
    (r"\\\\(?: ?\[[\d.]+ ?[a-z]{2}\])?", r" \\cr "),
    # Marks and spaces without a meaning. The comma of 1,\!234 and 1{,}234 is no comma of a list.
    (r"\\[()\[\]]", " "),
    (r"\\([$%])", r"\1"),
    (r"\\(?:text\w*|math(?:rm|bf|it)|mbox|operatorname) ?\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d) ?(?:\{,\}|, ?\\!) ?(?=\d{3}(?!\d))|\\!", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|q?quad)(?![a-zA-Z])|\\[,;: ]|[~\u00a0]", " "),
    (r"\\begin ?\{array\} ?\{[^{}]*\}", r"\\begin{array}"),
    (rf"{DEGREE} *([CF])(?![a-zA-Z])", r" degrees \1"),
    (DEGREE, " "),
    (r"^ ?\$ ?(-?[\d.,]+)$", r"\1 dollars"),
    (r"\$", ""),
    # Signs that are written in several ways.
    (r"[\u2212\u2013]", "-"),
    (r"\u00b2", "^2"),
    (r"\u00b3", "^3"),
    (r"\u03c0", r"\\pi "),
    (r"\u221e", r"\\infty "),
    (r"\u222a", r"\\cup "),
    (r"\u2208", r"\\in "),
    (r"\u221a ?(\d+|\w)", r"\\sqrt{\1}"),
    (r"\u2264|<=|\\leq?(?:slant)?(?![a-zA-Z])", r"\\le "),
    (r"\u2265|>=|\\geq?(?:slant)?(?![a-zA-Z])", r"\\ge "),
    (r"\u2260|\\neq?(?![a-zA-Z])", r"\\ne "),
    (r"\u00d7|\\cdot(?![a-zA-Z])|\\times", "*"),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\mathbb ?(?:R|\{ ?R ?\})", r"(-\\infty,\\infty)"),
    (r"^([^,]*)\\pm([^,]*)$", r"\1+\2,\1-\2"),
    (r"(^|[(\[,=]) ?\+", r"\1"),
    # Braces: \frac12, \frac\pi{4}, \frac{\sqrt{6}}3, x^{2}, 1011_{2}.
    (r"\\[cdt]frac", r"\\frac"),
    (r"\\(frac|sqrt(?: ?\[[^\[\]]*\])?) ?(\w|\\pi(?![a-zA-Z]))", r"\\\1{\2}"),
    (r"(\\frac ?\{(?:[^{}]|\{[^{}]*\})*\}) ?(\w|\\pi(?![a-zA-Z]))", r"\1{\2}"),
    (r"([_^]) ?\{ ?(\w|\d+) ?\}", r"\1\2 "),
    # \frac{-a}{3} is -\frac{a}{3}, but only without a factor before it: 2\frac{-a}{3} is no difference.
    (r"(^|[(\[,=&]) ?\\frac ?\{ ?- ?((?:[^{}+-]|\{[^{}]*\})*)\}", r"\1-\\frac{\2}"),
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])", _without_separators),  # 1,234, but not (1,234)
    (r"(?<![\d.,_^])\d{1,3}(?: \d{3})+(?!\d| ?/)", _without_separators),
    (rf"(?<=\d)(?=(?:{LONG_UNITS})s?(?![a-zA-Z]))", " "),  # 5cm, but not 2x
    (r"\s+", " "),
)]


def _rewritten(text: str) -> str:
    # Stripped before every rule, because each may bare a space or a full stop at the end.
    for pattern, new in REWRITES:
        text = pattern.sub(new, text.strip().rstrip("."))
    return text.strip()


def _squeezed(text: str) -> str:
    """Without case and spaces; but one between digits stays, for 1 1/2 is not 11/2."""
    text = " ".join(text.lower().split())
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction, mixed number or a * b^c; None for anything else."""
    n = r"(-?(?:\d{1,60}\.?\d{0,60}|\.\d{1,60}))"  # bounded, because longer ones take long
    text = re.sub(rf"\\frac\s*\{{\s*{n}\s*\}}\s*\{{\s*{n}\s*\}}", r" \1/\2", text)
    text = re.sub(r"^- ", "-", " ".join(text.split()))

    mixed = re.fullmatch(r"(-?)(\d{1,60}) (\d{1,60}) ?/ ?(0*[1-9]\d{0,60})", text)
    if mixed:
        sign, whole, above, below = mixed.groups()
        value = int(whole) + Fraction(int(above), int(below))
        return -value if sign else value

    power = re.fullmatch(rf"(?:{n} ?\* ?)?([1-9]\d{{0,8}}) ?\^ ?\{{?(-?\d\d?)\}}?", text)
    if power:
        return Fraction(power[1] or 1) * Fraction(power[2]) ** int(power[3])

    ratio = re.fullmatch(rf"{n}(?: ?/ ?{n})?", text)
    if not ratio:
        return None
    below = Fraction(ratio[2] or 1)
    return Fraction(ratio[1]) / below if below else None


# "5 million" is another number than 5, not 5 of some unit.
NOT_UNITS = {"dozen", "score", "hundred", "thousand", "million", "billion", "trillion", "half", "third",
             "quarter", "dozens", "hundreds", "thousands", "millions", "thirds", "sin", "cos", "tan", "log",
             "or", "and", "not"}


def _split_unit(text: str) -> tuple[str, str]:
    """("12.5", "h mi") of "12.5 miles per hour"; ("5 million", "") of "5 million"."""
    unit = r"(?:[a-zA-Z]{2,}|[mghslL])(?:[ /]+[a-zA-Z]+){0,3}(?: ?\^ ?[23])?"
    end = r"(?:\d|\\pi(?=[)}]* (?:[ckm]m|[a-zA-Z]{3})))[)}]*"  # 2\pi rh is a product
    found = re.fullmatch(rf"(.*{end})(?: ?(%|percent)| ({unit}))", text)
    if not found or NOT_UNITS & set(found[0].lower().split()):
        return text, ""
    return found[1], _unit(found[3] or "%")


def _unit(words: str) -> str:
    """"2 ft" of "square feet" and "ft^2", "h mi" of "miles per hour" and "mph": their order is lost."""
    words = re.sub(r"\bper\b", "", words.lower())
    words = re.sub(r"\b(?:square|sq)\b", "2", words)
    words = re.sub(r"\bcubic\b", "3", words)
    names = []
    for word in re.findall(r"[a-z]+|[23%]", words):
        singular = word.rstrip("s")
        names.append(UNITS.get(word) or UNITS.get(singular, singular))
    return " ".join(sorted(" ".join(names).split()))


# What "=" gives a value to: x, AB, \theta, a_{10}, f(2), A^{-1}, (x,y). With 2x or x+y it is an equation.
NAME = re.compile(r"((?:[a-zA-Z' ]|\\[a-zA-Z]+(?![a-zA-Z])|_(?:\d+|\w|\{[^{}]*\})|\^\{-1\}|\([\w, ]*\))*?)"
                  r" ?(?:=|\\(?:in|approx)(?![a-zA-Z])) ?")


def _split_name(text: str) -> tuple[str, str]:
    r"""("x", "5") of "x = 5"; ("x", "[0,1]") of "x \in [0,1]"; ("", "5") of "5" and of "\approx 5"."""
    name = NAME.match(text)
    return (_squeezed(name[1]), text[name.end():]) if name else ("", text)


def _split(text: str) -> tuple[str, str, str]:
    """(name, value, unit); in a list each member has its own."""
    if len(_listed(text)) > 1:
        return "", text, ""
    name, text = _split_name(text)
    return name, *_split_unit(text)


def _listed(text: str) -> list[str]:
    """The parts of a list, a union or alternatives. What stands in brackets is not split."""
    parts, depth = [""], 0
    token = r"(, ?(?:and |or )?| (?:and|or) |\\cup(?![a-zA-Z]))|\\[a-zA-Z]+|."
    for found in re.finditer(token, text):
        if found[0] in ("(", "[", "{", r"\begin"):
            depth += 1
        elif found[0] in (")", "]", "}", r"\end"):
            depth -= 1
        if depth == 0 and found[1]:
            parts.append("")
        else:
            parts[-1] += found[0]
    return [part.strip() for part in parts]


def _members(text: str) -> tuple[str, list[str]]:
    """(kind, members) of a tuple, interval, matrix or set (a bare list is one); ("", [text]) of a value."""
    parts = _listed(text)
    if len(parts) > 1:
        return "{}", parts

    matrix = re.fullmatch(r"[(\[]? ?\\begin\{(array|[pbBvV]?matrix)\}(.*)\\end\{\1\} ?[)\]]?", text)
    if matrix:
        return _entries(matrix[1], matrix[2])

    text = re.sub(r"\\([{}])", r"\1", text)
    if re.fullmatch(r"[(\[{].*,.*[)\]}]", text):
        inner = _listed(text[1:-1])
        if len(inner) > 1:
            return text[0] + text[-1], inner
    in_parentheses = re.fullmatch(r"\([^()]*\)", text)
    return "", [text[1:-1] if in_parentheses else text]


def _entries(environment: str, body: str) -> tuple[str, list[str]]:
    """(shape, entries row by row) of a matrix; one of a determinant, |A|, has another shape."""
    rows = [row.split("&") for row in re.split(r"\\cr(?![a-zA-Z])", body) if row.strip()]
    kind = "determinant" if environment in ("vmatrix", "Vmatrix") else "matrix"
    lengths = [len(row) for row in rows]
    return f"{kind} {lengths}", [entry.strip() for row in rows for entry in row]


# -------------------------------------------------------------------------------------------- the same value?


def _same(guess: str, answer: str, until: float) -> bool:
    """Whether two answers, rewritten, are the same value. A unit or a name on one side only is ignored.

    `until`: when formulas are no longer compared, in time.monotonic()'s seconds.
    """
    if _squeezed(guess) == _squeezed(answer):
        return bool(guess)
    guess_name, guess, guess_unit = _split(guess)
    answer_name, answer, answer_unit = _split(answer)
    if guess_unit and answer_unit and guess_unit != answer_unit:
        return False
    if guess_name and answer_name and guess_name != answer_name:
        return False

    kind, left = _members(guess)
    wanted_kind, right = _members(answer)
    if kind != wanted_kind or len(left) != len(right):
        return False
    if kind == "{}":
        return _same_in_any_order(left, right, until)
    if kind:
        return all(_same(a, b, until) for a, b in zip(left, right, strict=True))
    return _same_value(left[0], right[0], until)


def _same_in_any_order(left: list[str], right: list[str], until: float) -> bool:
    """Whether each member has a partner of its own on the other side: 1,1,2 is not 1,2,2."""
    right = list(right)
    for a in left:
        partner = next((i for i, b in enumerate(right) if _same(a, b, until)), None)
        if partner is None:
            return False
        del right[partner]
    return True


def _same_value(guess: str, answer: str, until: float) -> bool:
    if _squeezed(guess) == _squeezed(answer):
        return bool(guess)
    left, right = _number(guess), _number(answer)
    if left is not None and right is not None:
        return left == right
    # Words and numerals of other bases are not formulas: "east" and "seat" would be one product of letters.
    bare = re.sub(r"\\[a-zA-Z]+", "", guess + answer)
    if re.search(r"[a-zA-Z]{3}|\d \d|[_%=<>']|[^\x00-\x7f]", bare):
        return False
    seconds = until - time.monotonic()
    return seconds > 0 and _same_formula(guess, answer, seconds)


# math-verify ends endless computations (9^{9^9}) by SIGALRM, which works in a main thread only. So it runs
# in a process of its own, which is ended here if even that does not help.
WORKER = """import dataclasses, json, sys
from math_verify import LatexExtractionConfig, parse, verify
replies, sys.stdout = sys.stdout, sys.stderr  # a warning of the package is no reply
# By default it drops "units", such as the ab of 2ab, reads "5-" as 5, and rounds to 6 digits.
latex = LatexExtractionConfig()
without_units = dataclasses.replace(latex.normalization_config, units=False)
latex = dataclasses.replace(latex, normalization_config=without_units)
options = dict(extraction_config=[latex], fallback_mode="no_fallback", parsing_timeout=3)
for line in sys.stdin:
    answer, guess = (parse("$" + text + "$", **options) for text in json.loads(line))
    same = answer and guess and verify(answer, guess, float_rounding=15, timeout_seconds=3)
    print(json.dumps(bool(same)), file=replies, flush=True)"""
_worker, _worker_lock = None, threading.Lock()


def _same_formula(guess: str, answer: str, seconds: float) -> bool:
    """By math-verify. False without that package, which is said once."""
    global _worker
    with _worker_lock:
        if _worker is None:
            _worker = _start_worker()
        if not _worker:
            return False
        with suppress(BrokenPipeError):
            _worker.stdin.write(json.dumps([answer, guess]).encode() + b"\n")
            _worker.stdin.flush()
            has_answered = select.select([_worker.stdout], [], [], seconds)[0]
            line = _worker.stdout.readline() if has_answered else b""
            if line:
                return line == b"true\n"
        _worker.kill()
        _worker.communicate()
        _worker = None  # the next comparison starts a new one
        return False


def _start_worker() -> subprocess.Popen | bool:
    if importlib.util.find_spec("math_verify") is None:
        print("pairs: answers are compared as text and numbers only, not as formulas (that would need: "
              "pip install math-verify antlr4-python3-runtime==4.13.2)", file=sys.stderr)
        return False
    return subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL)


# ----------------------------------------------------------------------------------------------- how certain?


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share, by Wilson's formula, which also holds near 0 and 1."""
    share = right / n
    middle = share + z * z / 2 / n
    spread = z * math.sqrt(share * (1 - share) / n + z * z / 4 / n / n)
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def paired_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Difference of two accuracies on the same problems and its 95% interval, paired by problem."""
    changes = [a - b for a, b in zip(after, before, strict=True)]
    mean = sum(changes) / len(changes)
    spread = 1.96 * math.sqrt(sum((change - mean) ** 2 for change in changes)) / len(changes)
    return mean, mean - spread, mean + spread
