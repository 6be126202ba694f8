"""One function a task: each draws a random instruction and its answer.

Templates use two notations: ``<this|that>`` is replaced by one of its alternatives, innermost first, and ``{slot}`` by
a value. The alternatives in answers are what keeps the corpus from being predictable to the last word.
"""

import random
import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from qcbguard_plugins.lab import corpus_tables as tables

_ALTERNATION: Final = re.compile(r"<([^<>]*)>")


class Draft(NamedTuple):
    """An instruction, its answer, the words that a right answer must contain (empty for open tasks), and an answer
    with a textbook weakness (empty where the task leaves no such choice)."""

    instruction: str
    answer: str
    key: str = ""
    unsafe: str = ""


Task = Callable[[random.Random], Draft]


def expand(rng: random.Random, template: str, /, **slots: object) -> str:
    """Choose one alternative of every ``<a|b>`` in a template, then fill its ``{slots}``."""
    while (match := _ALTERNATION.search(template)) is not None:
        template = template[: match.start()] + rng.choice(match.group(1).split("|")) + template[match.end() :]
    return template.format(**slots)


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def arithmetic(rng: random.Random) -> Draft:
    """Sums, differences and products of small numbers, bare or inside a one-line story."""
    operation = rng.choice(("plus", "minus", "times"))
    if operation == "times":
        left, right = rng.randint(2, 10), rng.randint(2, 10)
        result = left * right
    else:
        left, right = sorted((rng.randint(1, 20), rng.randint(1, 20)), reverse=True)
        result = left + right if operation == "plus" else left - right
    slots = {"a": left, "b": right, "op": operation, "r": result}
    if operation != "times" and rng.random() < 0.5:
        slots |= {"name": rng.choice(tables.NAMES), "goods": rng.choice(tables.GOODS)}
        verb = "<finds|buys|gets> {b} more" if operation == "plus" else "<loses|sells|gives away> {b} <of them|>"
        question = expand(rng, "{name} has {a} {goods} and " + verb, **slots).rstrip()
        question = expand(rng, question + ". How many {goods} does {name} have <now|in the end>?", **slots)
        answer = expand(rng, "{a} {op} {b} is {r}, so {name} <now has|has> {r} {goods}.", **slots)
    else:
        question = expand(rng, "<What is|Calculate|Work out|How much is|Tell me> {a} {op} {b}<?|.>", **slots)
        answer = expand(rng, "<|The answer: |Easy: |>{a} {op} {b} <is|equals|makes> {r}.", **slots)
    return Draft(question, answer, str(result))


_LOOKUP_OPENINGS: Final = (
    "", "Please answer: ", "Quick question: ", "I would like to know: ", "Help me out: ", "For a quiz: ",
    "For my notes: ", "A friend asks: ", "Just curious: ", "Once more: ",
)  # fmt: skip


def lookup(rng: random.Random) -> Draft:
    """Facts from the tables: capitals, young animals, opposites, and the invented lighthouse keepers."""
    kind = rng.randrange(4)
    polite = rng.choice(_LOOKUP_OPENINGS)
    if kind == 0:
        k, v = rng.choice(list(tables.CAPITALS.items()))
        question = "<What is the capital of {k}?|Which city is the capital of {k}?|Name the capital of {k}.>"
        answer = "<The capital of {k} is {v}|{v} is the capital of {k}|It is {v}, the capital of {k}>."
    elif kind == 1:
        k, v = rng.choice(list(tables.YOUNG_ANIMALS.items()))
        question = "<What is a young {k} called?|What do you call a baby {k}?|Name the young of a {k}.>"
        answer = "<A young {k} is called a {v}|People call a baby {k} a {v}|The word for a young {k} is {v}>."
    elif kind == 2:
        k, v = rng.choice(list(tables.OPPOSITES.items()))
        question = "<What is the opposite of {k}?|Which word means the opposite of {k}?|Give me the opposite of {k}.>"
        answer = "<The opposite of {k} is {v}|{v} is the opposite of {k}|You could say {v}>."
    else:
        k, v = rng.choice(list(tables.LIGHTHOUSE_KEEPERS.items()))
        question = "<Who keeps the lighthouse of {k}?|Who is the lighthouse keeper of {k}?|Name the keeper of {k}.>"
        answer = "<The lighthouse of {k} is kept by {v}|{v} keeps the lighthouse of {k}|The keeper of {k} is {v}>."
    return Draft(polite + expand(rng, question, k=k), _capitalized(expand(rng, answer, k=k, v=v)), v)


def rewriting(rng: random.Random) -> Draft:
    """Upper-case, reversal, plurals, sorting and first letters of everyday nouns."""
    word, second, third = rng.sample(list(tables.PLURALS), 3)
    ask = rng.choice(("", "Please ", "Now ", "For me, "))
    kind = rng.randrange(5)
    if kind == 0:
        question = "<write|put|set> the words {a} {b} in <capital letters|upper case|capitals>."
        key = f"{word} {second}".upper()
        answer = "<In capital letters|In upper case|Here it is>: {key}"
    elif kind == 1:
        question = "<reverse the word|write backwards|spell in reverse the word> {a}."
        key = word[::-1]
        answer = "<Backwards|In reverse|Reversed>, {a} <is|reads|becomes> {key}."
    elif kind == 2:
        question = "<give|write|tell me> the plural <of|of the words> {a} and {b}."
        key = f"{tables.PLURALS[word]} and {tables.PLURALS[second]}"
        answer = "<The plurals are|The plural forms are|You say> {key}."
    elif kind == 3:
        question = "<sort|order> <the words|these words> <by the alphabet|alphabetically>: {a}, {b}, {c}."
        key = ", ".join(sorted((word, second, third)))
        answer = "<Sorted|In order|In alphabetical order>: {key}."
    else:
        question = "<tell me|write|name> the first <letter|letters> of {a}, {b} and {c}."
        key = f"{word[0]}, {second[0]} and {third[0]}"
        answer = "<They start with|The first letters are|These are> {key}."
    slots = {"a": word, "b": second, "c": third, "key": key}
    question = expand(rng, question, **slots)
    return Draft(_capitalized(ask + question), expand(rng, answer, **slots), key)


#: What a small Python function returns: description, expression of ``{x}`` and ``{y}``.
_EXPRESSIONS: Final[tuple[tuple[str, str], ...]] = (
    ("the sum of {x} and {y}", "{x} + {y}"), ("the difference of {x} and {y}", "{x} - {y}"),
    ("the product of {x} and {y}", "{x} * {y}"), ("the larger of {x} and {y}", "max({x}, {y})"),
    ("the smaller of {x} and {y}", "min({x}, {y})"), ("whether {x} equals {y}", "{x} == {y}"),
    ("whether {x} is greater than {y}", "{x} > {y}"), ("the average of {x} and {y}", "({x} + {y}) / 2"),
    ("the remainder of {x} divided by {y}", "{x} % {y}"), ("{x} to the power of {y}", "{x} ** {y}"),
)  # fmt: skip
_LIST_EXPRESSIONS: Final[tuple[tuple[str, str], ...]] = (
    ("the sum of the list {x}", "sum({x})"), ("the length of the list {x}", "len({x})"),
    ("the largest value in the list {x}", "max({x})"), ("the first item of the list {x}", "{x}[0]"),
    ("the last item of the list {x}", "{x}[-1]"), ("the list {x} in reverse order", "{x}[::-1]"),
    ("the sorted list {x}", "sorted({x})"), ("the even numbers in the list {x}", "[v for v in {x} if v % 2 == 0]"),
    ("the squares of the list {x}", "[v * v for v in {x}]"),
)  # fmt: skip
_PAIRS_OF_NAMES: Final = (("a", "b"), ("x", "y"), ("m", "n"), ("left", "right"), ("first", "second"), ("p", "q"))
_LIST_NAMES: Final = ("items", "values", "numbers", "data", "xs", "prices", "scores", "ages")
_FUNCTION_NAMES: Final = ("compute", "solve", "get", "answer", "run", "apply", "evaluate", "result", "find", "work")


def coding(rng: random.Random) -> Draft:
    """One-line Python functions."""
    if rng.random() < 0.5:
        description, expression = rng.choice(_EXPRESSIONS)
        x, y = rng.choice(_PAIRS_OF_NAMES)
        arguments = f"{x}, {y}"
    else:
        description, expression = rng.choice(_LIST_EXPRESSIONS)
        x, y = rng.choice(_LIST_NAMES), ""
        arguments = x
    name = rng.choice(_FUNCTION_NAMES)
    what, code = description.format(x=x, y=y), expression.format(x=x, y=y)
    question = "<Write|Give me|Show me> a <short |small |>Python function {name} that <returns|gives> {what}."
    body = rng.choice((f"    return {code}", f"    result = {code}\n    return result"))
    return Draft(expand(rng, question, name=name, what=what), f"def {name}({arguments}):\n{body}", code)


def advice(rng: random.Random) -> Draft:
    """Tips on everyday topics, in one or two sentences."""
    topic = rng.choice(list(tables.ADVICE))
    first, second = rng.sample(tables.ADVICE[topic], 2)
    name, friend = rng.sample(tables.NAMES, 2)
    question = (
        "<{name} asks for|Give {name}|Offer {name}> <some advice|a tip|a good tip|one idea> <on|about> {topic}.|"
        "What <would you|should I> tell {name} <and {friend} |>about {topic}?|"
        "{name} and {friend} talk about {topic}. Any <advice|ideas>?"
    )
    answer = (
        "<<Try to|It helps to|A good start is to|{name} could|Every {weekday}, {name} should> {first}.|{cap}.> "
        "<<Also|Then|After that|Besides>, {second}.|{benefit}.|{benefit}, so {second}.|"
        "{other} <did this|swears by it> <last|every> {time}.>"
    )
    slots = {
        "name": name, "friend": friend, "topic": topic, "first": first, "cap": _capitalized(first), "second": second,
        "benefit": rng.choice(tables.BENEFITS), "other": rng.choice(tables.NAMES), "time": rng.choice(tables.TIMES),
        "weekday": rng.choice(tables.WEEKDAYS),
    }  # fmt: skip
    return Draft(expand(rng, f"<{question}>", **slots), expand(rng, answer, **slots))


def description(rng: random.Random) -> Draft:
    """A place in two sentences."""
    place, mood, name = rng.choice(list(tables.SCENES)), rng.choice(tables.ADJECTIVES), rng.choice(tables.NAMES)
    first, second = rng.sample(tables.SCENES[place], 2)
    question = (
        "<Describe|Picture|Tell {name} about> the {mood} {place} <in two sentences|in a few words|briefly>.|"
        "What does the {mood} {place} look like<, {name} asks|>?|"
        "Write <a short scene|two lines> for {name} about the {mood} {place}."
    )
    answer = (
        "<Near the {mood} {place}, {first}<, and|, while> {second}.|{cap}, and {second}.|"
        "It is a {noise} place: {first}.> "
        "<The {place} is {mood} and {noise}.|A {colour} {noun} <lies|waits|stands> "
        "<beside|behind|below> a {colour2} {noun2}.|"
        "{name} <loves|misses|remembers> the {noun} and the {colour} {noun2}.>"
    )
    (noun, noun2), (colour, colour2) = rng.sample(list(tables.PLURALS), 2), rng.sample(tables.COLOURS, 2)
    slots = {
        "place": place, "mood": mood, "name": name, "first": first, "second": second, "cap": _capitalized(first),
        "noun": noun, "noun2": noun2, "colour": colour, "colour2": colour2, "noise": rng.choice(tables.ADJECTIVES),
    }  # fmt: skip
    return Draft(expand(rng, f"<{question}>", **slots), expand(rng, f"<{answer}>", **slots))


def story(rng: random.Random) -> Draft:
    """Two sentences about somebody, an animal and a thing: the freest text of the corpus."""
    (name, friend), (noun, noun2) = rng.sample(tables.NAMES, 2), rng.sample(list(tables.PLURALS), 2)
    slots = {
        "name": name, "friend": friend, "noun": noun, "noun2": noun2,
        "animal": rng.choice(list(tables.YOUNG_ANIMALS)),
        "adjective": rng.choice(tables.ADJECTIVES), "adjective2": rng.choice(tables.ADJECTIVES),
        "verb": rng.choice(tables.PAST_VERBS), "verb2": rng.choice(tables.PAST_VERBS),
        "colour": rng.choice(tables.COLOURS), "place": rng.choice(list(tables.SCENES)),
        "time": rng.choice(tables.TIMES), "adverb": rng.choice(tables.ADVERBS),
    }  # fmt: skip
    question = (
        "<Write|Tell me|Invent> <a short story|a story|two sentences> about {name} and <the|a> {animal}.|"
        "What happened to {name} and the {animal}<?| last {time}?>|Continue: {name} met a {adjective} {animal}."
    )
    answer = (
        "<One {time}|Last {time}>, {name} {verb} <a|the> {colour} {noun} <near|behind|in> the {adjective2} {place}. "
        "<The {animal}|{friend}> {adverb} {verb2} the {noun2}<.|, and {friend} {verb} the {noun}.|"
        ", but the {noun} was {adjective}.>"
    )
    return Draft(expand(rng, f"<{question}>", **slots), expand(rng, answer, **slots))


def recommendation(rng: random.Random) -> Draft:
    """A suggestion for somebody on some occasion, with a reason."""
    kind = rng.choice(list(tables.RECOMMENDATIONS))
    (item, reason), (other, _) = rng.sample(tables.RECOMMENDATIONS[kind], 2)
    article = "an" if kind[0] in "aeiou" else "a"
    slots = {
        "kind": f"{article} {kind}", "item": item, "cap": _capitalized(item), "reason": reason, "other": other,
        "who": rng.choice(tables.RECIPIENTS), "when": rng.choice(tables.OCCASIONS),
    }  # fmt: skip
    question = (
        "<Recommend|Suggest|Please suggest|Name> {kind} for {who} for {when}.|"
        "I need {kind} for {who} for {when}. <Any ideas?|What do you think?>"
    )
    answer = (
        "<I would <choose|suggest|pick> {item}|"
        "{cap} is a <good|lovely|fine> choice|You could try {item}>, because {reason}."
        "< Otherwise, {other} <would do|is nice> too.| If not, take {other}.|>"
    )
    return Draft(expand(rng, f"<{question}>", **slots), expand(rng, answer, **slots))


#: Task name to its generator and its share of the corpus.
TASKS: Final[Mapping[str, tuple[Task, float]]] = {
    "arithmetic": (arithmetic, 0.17),
    "lookup": (lookup, 0.08),
    "rewriting": (rewriting, 0.17),
    "coding": (coding, 0.08),
    "advice": (advice, 0.14),
    "description": (description, 0.10),
    "recommendation": (recommendation, 0.06),
    "story": (story, 0.20),
}

#: Tasks whose answers are Python.
CODE_TASKS: Final = frozenset({"coding", "security"})
