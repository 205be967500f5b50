r"""Which answers are right: text, then exact fractions, then (rarely, if installed) symbols.

Nothing approximates: 0.0005 is not 0.001, 50 is not 0.5, [0,1) is not (0,1), and a text that was cut off
before its answer has none.
"""

import functools
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

from .extraction import ABOUT, extract_answer
from .units import LONG_UNITS, unit_of

# Longer answers, which nobody writes, are compared as plain text: no rule below must be fast on hostile ones.
LONGEST = 300
SECONDS = 15  # for all formulas of one answer together
cached = functools.lru_cache(maxsize=1000)  # because each member of a list is compared with each of another


def is_correct(solution: str, answer: str) -> bool:
    """Whether the solution's final answer is `answer`. A single letter A-E is graded as multiple choice."""
    guess, answer = extract_answer(solution), extract_answer(answer) or answer
    if guess is None:
        return False
    if re.fullmatch(r"[A-E]|\([A-E]\)", _without_markup(answer)):
        return _chosen_letter(guess) == _chosen_letter(answer)
    if max(len(guess), len(answer)) > LONGEST:
        return _squeezed(guess) == _squeezed(answer)
    left, right = _like(guess, answer), _like(answer, guess)
    return _same(_rewritten(left), _rewritten(right), time.monotonic() + SECONDS)


def _like(text: str, other: str) -> str:
    """100,200,300 is a number; beside the list 100, 200, 300 it is a list too."""
    may_be_both = re.fullmatch(r"\d{1,3}(?:,[1-9]\d\d)+", text.strip(" $"))
    if may_be_both and len(_listed(_rewritten(other))) > 1:
        return text.replace(",", ", ")
    return text


def _without_markup(text: str) -> str:
    text = re.sub(r"\\(?:[,;: ]|q?quad)", " ", text)
    return re.sub(r"\\text\w*|\\math\w+|\\mbox|[{}$*]", "", text).strip()


# A letter that is chosen, and a second one next to it ("A, C", "(A) or (C)") or further on ("A) 3, C) 5").
LETTER = re.compile(r"\(([A-Ea-e])\)|([A-E])(?=\s*[).:,(]| is\b| - |$)|([a-e])(?=\)|$)")
NEXT_LETTER = re.compile(r"[\s().:,;/&]*(?:(?:and|or|to|option|choice)\b[\s,]*)*(?:\([A-Ea-e]\)|[A-HJ-Z]\)?)"
                         r"(?=\s*(?:[).:,;/&]|(?:and|or)\b|$))")
FURTHER_LETTER = re.compile(r"(?<!\w)\([A-E]\)|[,;] ?[A-E]\)")


def _chosen_letter(guess: str) -> str | None:
    """"B" of "(B)", "B) 12 km", "option B", "b"; None of "A train" and of "A, B, C"."""
    bare = _without_markup(guess)
    bare = re.sub(r"^(?:the )?(\(?)(?:option|choice|answer|letter)\b ?", r"\1", bare, flags=re.I).strip()
    letter = LETTER.match(bare)
    if not letter:
        return None
    rest = bare[letter.end():]
    if NEXT_LETTER.match(rest) or FURTHER_LETTER.search(rest):
        return None
    return letter[letter.lastindex].upper()


# ----------------------------------------------------------------------------------- one way to write a value


DEGREE = r"(?:\^ ?\{? ?\\circ ?\}?|\\degree(?![a-zA-Z])|\u00b0)"
CURRENCIES = {"$": "dollars", "\u20ac": "euros", "\u00a3": "pounds", "\u20b9": "rupees", "\u00a5": "yen",
              "\u00a2": "cents"}
SYMBOLS = "".join(CURRENCIES)
# "5 million" is another number than 5, not 5 of some unit.
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
             "trillion": 10**12, "lakh": 10**5, "lac": 10**5, "crore": 10**7}
MULTIPLE = f"(?:{'|'.join(MULTIPLES)})s?(?![a-zA-Z])"


def _without_separators(found: re.Match) -> str:
    return re.sub("[, ]", "", found[0])


def _currency_last(found: re.Match) -> str:
    """"5 dollars" of "$5"; "-2 million euros" of "-\u20ac2 million"."""
    sign, symbol, number = found.groups()
    return f"{sign}{number} {CURRENCIES[symbol]}"


def _multiplied(found: re.Match) -> str:
    """"2500000" of "2.5 million"."""
    number, *words = found[0].split()
    return str(Fraction(number) * math.prod(MULTIPLES[word.removesuffix("s")] for word in words))


BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # {...}, with braces two deep in it
COLOUR = r"(?: ?\[\w+\])? ?\{[^{}]*\}"
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\s+", " "),
    (r"<<[^<>]*>>", ""),  # GSM8K's calculator: 9*2 = <<9*2=18>>18
    # Colour and other ornament: \color{red}{18}, {\color{red} 18}, \underline{18}, \large 18.
    (rf"\\(?:(?:text)?color{COLOUR}|colorbox{COLOUR}|underline|boldsymbol|bm) ?{BRACED}", r" \1 "),
    (rf"\{{ ?\\color{COLOUR}((?:[^{{}}]|{BRACED})*)\}}", r" \1 "),
    (rf"\\color{COLOUR}|\\(?:[lL]arge|LARGE|[hH]uge|therefore)(?![a-zA-Z])", " "),
    (r"^ ?\{([^{},]*)\} ?$", r"\1"),
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
    # Currencies go behind their number. The dollars of $x$ have no meaning.
    (r"\bRs\.? ?(?=\d)", "\u20b9"),
    (r"\bUSD?(?: ?\$| (?=\d))", "$"),
    (rf"^ ?(-?)([{SYMBOLS}]) ?(-?[\d.,]+(?: {MULTIPLE})*)(?=$| ?/| [a-zA-Z]{{2}}| a )(?![^$]*\$)",
     _currency_last),
    (r"(?<=\d) ?([\u20ac\u00a3\u20b9\u00a5\u00a2])", lambda found: " " + CURRENCIES[found[1]]),
    (rf"[{SYMBOLS}]", ""),
    # Signs that are written in several ways.
    (r"[\u2212\u2013]", "-"),
    (r"\u2019", "'"),
    (r"\u00b2", "^2"),
    (r"\u00b3", "^3"),
    (r"\u03c0|(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"\u221e", r"\\infty "),
    (r"\u222a", r"\\cup "),
    (r"\u2208", r"\\in "),
    (r"\u221a ?(\d+|\w)", r"\\sqrt{\1}"),
    (r"\u2264|<=|\\leq?(?:slant)?(?![a-zA-Z])", r"\\le "),
    (r"\u2265|>=|\\geq?(?:slant)?(?![a-zA-Z])", r"\\ge "),
    (r"\u2260|\\neq?(?![a-zA-Z])", r"\\ne "),
    (rf"\u2248|\\sim(?:eq)?(?![a-zA-Z])|(?<![\\a-zA-Z])\(?{ABOUT}\)? +(?=[-\d.\\])", r"\\approx "),
    (r"\u2261", r"\\equiv "),
    (r"\u00d7|\\cdot(?![a-zA-Z])|\\times|(?<=\d) x (?=\d)", "*"),
    (r"\u2236|\\colon(?![a-zA-Z])|\\mathbin ?\{ ?: ?\}", ":"),
    (r"\( *\\?b?mod(?:ulo)? *([^()]*)\)|\\p?mod(?![a-zA-Z]) ?\{? ?(\d+) ?\}?", r" mod \1\2"),
    # Words: 10 a.m., 5 per cent, 18 (apples), 2 and a half.
    (r"\b([ap])\.m\b\.?", r"\1m"),
    (r"\bper cent\b", "percent"),
    (r"(?<=[\d}]) \( ?([a-zA-Z][a-zA-Z' .-]*)\)$", r" \1"),
    (r"(?<=\d) and (?:a|one) half(?![a-zA-Z])", " 1/2"),
    # Sets and lists.
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
    (rf"(?<![\w.])\d{{1,60}}(?:\.\d{{1,60}})?(?: {MULTIPLE})+", _multiplied),
    (rf"(?<=\d)(?=(?:{LONG_UNITS})s?(?![a-zA-Z]))", " "),  # 5cm, but not 2x
    (r"\s+", " "),
)]


def _rewritten(text: str) -> str:
    # Stripped before every rule, because each may bare a space or a full stop at the end.
    for pattern, new in REWRITES:
        text = pattern.sub(new, text.strip().rstrip("."))
    return text.strip()


@cached
def _squeezed(text: str) -> str:
    """Without case and spaces; but one between digits stays, for 1 1/2 is not 11/2."""
    text = " ".join(text.lower().split())
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


@cached
def _singular(text: str) -> str:
    return re.sub(r"(?<=[a-z]{3})s\b", "", text)  # 7 apple is 7 apples


@cached
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


def _split_unit(text: str) -> tuple[str, str]:
    """("12.5", "h^-1 mi^1") of "12.5 miles per hour"; ("20 more than Tom", "") of itself."""
    modulus = re.fullmatch(r"(\d{1,60}) ?(?:\\b)?mod (\d{1,60})", text)
    if modulus and int(modulus[1]) < int(modulus[2]):
        return modulus[1], f"mod {modulus[2]}"

    end = r"(?:\d|\\pi(?=[)}]* (?:[ckm]m|[a-zA-Z]{2})))[)}]*"  # 2\pi r is a product
    found = re.fullmatch(rf"(.*{end})(?: ?(%)| ([a-zA-Z].*))", text)
    if not found:
        return text, ""
    number = _number(found[1])
    unit = unit_of(found[2] or found[3], number)
    return (text, "") if unit is None else (found[1], unit)


# What "=" gives a value to: x, AB, \theta, a_{10}, f(2), A^{-1}, (x,y). With 2x or x+y it is an equation.
NAME = re.compile(r"((?:[a-zA-Z' ]|\\[a-zA-Z]+(?![a-zA-Z])|_(?:\d+|\w|\{[^{}]*\})|\^\{-1\}|\([\w, ]*\))*?)"
                  r" ?(?:=+|\\(?:in|approx|equiv)(?![a-zA-Z])) ?")


def _split_name(text: str) -> tuple[str, str]:
    r"""("x", "5") of "x = 5"; ("x", "[0,1]") of "x \in [0,1]"; ("", "5") of "5" and of "\approx 5"."""
    name = NAME.match(text)
    return (_squeezed(name[1]), text[name.end():]) if name else ("", text)


@cached
def _split(text: str) -> tuple[str, str, str]:
    """(name, value, unit); in a list each member has its own."""
    if len(_listed(text)) > 1:
        return "", text, ""
    name, text = _split_name(text)
    first, *others = _parts(text, " ?=+ ?")
    if others and (name or not _has_unknowns(first)):  # 256 + 37 = 293, x = 3 + 4 = 7, but not 2x = 4
        text = others[-1]
        if re.fullmatch("[a-zA-Z]", text):  # 5 = x
            name, text = text.lower(), first
    return name, *_split_unit(text)


def _has_unknowns(text: str) -> bool:
    """Whether there are letters that are no function, unit or word: in 2x, not in 5!, 2 apples + 3 apples."""
    if re.search(r"\\(?:sum|prod|int|lim)(?![a-zA-Z])", text):  # these have variables of their own
        return False
    functions = r"\\(?:frac|sqrt|sin|cos|tan|log|ln|pi|binom|div|approx)(?![a-zA-Z])"
    words = rf"(?<![\w\\])(?:[a-zA-Z]{{3,}}|of|per|{LONG_UNITS})(?![a-zA-Z])"
    operators = r"(?<=\d)[xCP](?=\d)"  # 3x6, 5C2
    return bool(re.search("[a-zA-Z]", re.sub(f"{functions}|{words}|{operators}", " ", text)))


def _listed(text: str) -> list[str]:
    """The parts of a list, a union or alternatives."""
    return _parts(text, r", ?(?:and |or )?| (?:and|or) |\\cup(?![a-zA-Z])")


def _parts(text: str, separator: str) -> list[str]:
    """What stands between the separators, stripped. What stands in brackets is not split."""
    parts, depth = [""], 0
    for found in re.finditer(rf"({separator})|\\[a-zA-Z]+|.", text):
        if found[0] in ("(", "[", "{", r"\begin"):
            depth += 1
        elif found[0] in (")", "]", "}", r"\end"):
            depth -= 1
        if depth == 0 and found[1]:
            parts.append("")
        else:
            parts[-1] += found[0]
    return [part.strip() for part in parts]


@cached
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
    if _squeezed(_singular(guess)) == _squeezed(_singular(answer)):
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
    if r"\approx" in guess + answer:  # of \sqrt{68} \approx 8.24 either is right
        left, right = (_parts(text, r"\\approx(?![a-zA-Z])") for text in (guess, answer))
        return len(left) + len(right) == 3 and any(_same_value(a, b, until) for a in left for b in right)
    if ":" in guess + answer:
        return _same_ratio(guess, answer)
    left, right = _number(guess), _number(answer)
    if left is not None and right is not None:
        return left == right
    # Words and numerals of other bases are not formulas: "east" and "seat" would be one product of letters.
    bare = re.sub(r"\\[a-zA-Z]+", "", guess + answer)
    if re.search(r"[a-zA-Z]{3}|\d \d|[_%=<>']|[^\x00-\x7f]", bare):
        return False
    seconds = until - time.monotonic()
    return seconds > 0 and _same_formula(guess, answer, seconds)


def _same_ratio(guess: str, answer: str) -> bool:
    """Whether 6:4 is 3:2, or 07:30 is 7:30. A ratio is no quotient, and a time (10:30) no ratio."""
    ratio = r"\d{1,60}(?:\.\d{1,60})?(?: ?: ?\d{1,60}(?:\.\d{1,60})?)+"
    if not re.fullmatch(ratio, guess) or not re.fullmatch(ratio, answer):
        return False
    left, right = ([Fraction(part) for part in text.replace(" ", "").split(":")] for text in (guess, answer))
    if left == right:
        return True
    may_be_time = any(re.fullmatch(r"\d{1,2}(?: ?: ?[0-5]\d)+", text) for text in (guess, answer))
    proportional = all(a * right[0] == b * left[0] for a, b in zip(left, right, strict=False))
    return len(left) == len(right) and not may_be_time and left[0] > 0 and right[0] > 0 and proportional


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
