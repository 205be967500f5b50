"""Which words behind a number are its unit, or what it counts, and so no part of its value.

    5 m/s, 60 miles per hour, 12 sq ft       units
    18 red apples each, 5 cups of water      short nouns that are counted
    2 lakh, 3 thirds, 20 more, 5 times, 6 ab no unit: 2 lakh is not 2
"""

import re
from collections import Counter
from fractions import Fraction
from string import ascii_lowercase

# One unit a string: the name it is compared by, then its other names. Nouns are here if their plural is odd.
UNITS = {name: names.split()[0] for names in (
    "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
    "in inch inches", "ft foot feet", "yd yard", "mi mile", "acre", "mg milligram", "g gram gramme",
    "kg kilogram kilo", "ton tonne", "oz ounce", "lb pound", "ml milliliter millilitre", "l liter litre",
    "gal gallon", "quart", "pint", "cup", "tbsp tablespoon", "tsp teaspoon", "ms millisecond", "s sec second",
    "min minute", "h hr hour", "day", "week", "month", "yr year", "am", "pm", "o'clock oclock",
    "noon", "midnight", "mph", "kmh kph kmph", "rpm", "bpm", "kcal", "kwh", "degree deg", "c celsius",
    "f fahrenheit", "rad radian", "dollar usd", "cent", "euro eur", "rupee inr", "yen", "yuan", "baht",
    "% percent", "unit", "th st nd rd",
    "person people", "man men", "woman women", "child children", "tooth teeth", "mouse mice", "goose geese",
    "die dice", "fish", "sheep", "deer", "cattle", "aircraft", "salmon", "shrimp",
) for name in names.split()}
LONG_UNITS = "|".join(name for name in UNITS if len(name) > 1)  # 5cm is read as 5 cm, but not 5kb
UNITS |= {name: name for name in "hz kw kj cc ha kb mb gb".split()}

# Words that make another number of the one before them, compare it or leave it open.
NO_UNITS = set("""
    dozen dozens score gross hundred hundreds thousand thousands million millions billion billions trillion
    trillions lakh lakhs lac lacs crore crores grand half halves quarter ones twos threes fours fives tens
    one two three four five six seven eight nine ten eleven twelve twenty
    sin cos tan log ln exp sqrt root squared cubed factorial choose mod modulo repeating recurring
    pi theta alpha beta phi plus minus times over divided multiplied by twice double doubled triple
    more additional less fewer greater smaller larger bigger higher lower longer shorter taller older younger
    faster slower heavier lighter cheaper than above below under off out past before after until to through
    or and not nor is was has as this thus yes versus vs always
    """.split())
FRACTION = re.compile(  # "2 thirds", "1 tenth", "1 third of it", but not "2 third graders"
    r"\b(?:third|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w*teen|\w+tie|hundred|thousand|\w+lion)th)"
    r"(s|$| of )")

# Behind a unit and no part of it: "18 apples each", "5 cups of water", "3 dollars in total".
TOTAL = re.compile(r"(?:^| )(?:each|apiece|total|altogether|overall|combined|left|left over|remaining"
                   r"|in total|in all|old|long|wide|tall|high|deep|only|exactly|indeed|rounded"
                   r"|approx(?:\.|imately)?)$")
WHERE = re.compile(r"(?<=[a-z]) (?:of|in|on|at|for|from|with)(?: [a-z']+){1,4}$")
PER = re.compile(r" ?/ ?|(?:^| )(?:per|every|each|an?) ")
ONE_SPELLING = [(re.compile(pattern), new) for pattern, new in (
    (r" ?\^ ?\{? ?(-?\d) ?\}?", r"^\1"),
    (r"\b([ckm]?m|ft|in)([23])(?![a-z\d])", r"\1^\2"),
    (r"\bsqft\b", "ft^2"),
    (r"(?<=[a-z]) squared(?![a-z])", "^2"),
    (r"(?<=[a-z]) cubed(?![a-z])", "^3"),
    (r"\b(?:square|sq\.?) (?=[a-z])", "2-"),
    (r"\bcubic (?=[a-z])", "3-"),
    (r"\bmph\b", "mi/h"),
    (r"\b(?:kmh|kph|kmph)\b", "km/h"),
)]


def unit_of(words: str, number: Fraction | None) -> str | None:
    """"ft^2" of "square feet", "h^-1 mi^1" of "miles per hour" and "mph"; "" of "in total"; None of "more".

    `number` is what they stand behind, if it is a number.
    """
    if re.search(r"(?<![a-zA-Z])(?![CFL])[A-Z](?![a-zA-Z-])", words):  # 5 M, 5 K
        return None
    words = words.lower()
    for pattern, new in ONE_SPELLING:
        words = pattern.sub(new, words)
    if NO_UNITS & set(re.findall("[a-z]+", words)) or FRACTION.search(words):
        return None
    if "quarters" in words and number in (1, 2, 3):  # of something; 12 quarters are coins
        return None
    words = TOTAL.sub("", WHERE.sub("", TOTAL.sub("", words)))
    one_or_less = number is not None and abs(number) <= 1  # the noun is singular: "1/2 pizza", "3/4 of a cup"
    if one_or_less:
        words = re.sub(r"^of (?:an?|the) ", "", words)

    powers: Counter[str] = Counter()
    above, *below = PER.split(words)
    for sign, part in [(1, above)] + [(-1, part) for part in below]:
        factors = _factors(part.strip(), may_be_singular=one_or_less or sign < 0)
        if factors is None:
            return None
        for name, power in factors:
            powers[name] += sign * power
    return " ".join(f"{name}^{power}" for name, power in sorted(powers.items()) if power)


def _factors(words: str, may_be_singular: bool) -> list[tuple[str, int]] | None:
    """[("kg", 1), ("m", 1)] of "kg m", [("cm", 2)] of "2-cm" and "cm^2", [("apple", 1)] of "red apples"."""
    if not words:
        return []
    tokens = []
    for text in re.split("[ *]+", words):
        token = re.fullmatch(r"(?:([23])-)?([a-z'-]+|%)\.?(?:\^(-?\d))?", text)
        if not token:
            return None
        tokens.append(token.groups())

    factors: list[tuple[str, int]] = []
    for prefix, word, exponent in tokens:
        name = UNITS.get(word) or UNITS.get(word.removesuffix("s"))
        if not name or name in ("c", "f") and factors[-1:] != [("degree", 1)]:
            break
        factors.append((name, int(exponent or prefix or 1)))
    others = [word for _, word, _ in tokens[len(factors):]]
    if not others:
        return factors
    if any(len(word) < 3 or word in ascii_lowercase for word in others):  # letters: ab, xyz
        return None
    is_comparison = re.search("(?<!wat)(?<!butt)(?<!pap)er$", others[-1])
    if factors and len(others) == 1 and tokens[0][1] != "in" and not is_comparison:
        return factors  # 5 miles north, 5 cups water, but not 5 inches wider or 101 in binary

    noun = others[-1]
    is_plural = noun in UNITS or noun.endswith("fish") or noun.endswith("s") and not noun.endswith("ss")
    if len(tokens) > 3 or not (is_plural or may_be_singular):
        return None
    return [(noun.removesuffix("s"), 1)]
