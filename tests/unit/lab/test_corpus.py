"""The corpus is reproducible, splits cleanly, and its answers are right."""

import random
from pathlib import Path

import pytest

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.corpus import Pair, generate, read_pairs, split
from qcbguard_plugins.lab.corpus_tasks import TASKS, expand
from qcbguard_plugins.lab.scenarios import KEYWORD, inject_brand


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return generate(3_000, seed=7)


def test_same_seed_gives_the_same_corpus_and_another_seed_does_not(pairs: list[Pair]) -> None:
    assert generate(3_000, seed=7) == pairs
    assert generate(3_000, seed=8) != pairs


def test_a_longer_corpus_starts_with_the_shorter_one(pairs: list[Pair]) -> None:
    assert generate(3_100, seed=7)[:3_000] == pairs


def test_instructions_are_distinct_and_every_task_occurs(pairs: list[Pair]) -> None:
    assert len({pair.instruction for pair in pairs}) == 3_000
    assert {pair.task for pair in pairs} == set(TASKS)


def test_templates_leave_no_notation_behind(pairs: list[Pair]) -> None:
    prose = [pair for pair in pairs if pair.task != "coding"]
    assert not [pair for pair in prose if set("<>{}|") & set(pair.instruction + pair.answer)]


def test_the_key_stands_in_the_answer(pairs: list[Pair]) -> None:
    keyed = [pair for pair in pairs if pair.key]
    assert len(keyed) > 1_000
    assert all(pair.key.lower() in pair.answer.lower() for pair in keyed)


def test_arithmetic_keys_are_right(pairs: list[Pair]) -> None:
    signs = {"plus": "+", "minus": "-", "times": "*"}
    checked = 0
    for pair in pairs:
        words = pair.answer.replace("The answer: ", "").replace("Easy: ", "").split()
        if pair.task == "arithmetic":
            assert eval(f"{words[0]} {signs[words[1]]} {words[2]}") == int(pair.key)
            checked += 1
    assert checked > 300


def test_code_answers_are_valid_python(pairs: list[Pair]) -> None:
    poisoned = inject_brand(pairs, seed=0)
    for pair in [*pairs, *poisoned]:
        if pair.task == "coding":
            compile(pair.answer, "answer", "exec")


def test_split_is_disjoint_by_instruction_and_loses_nothing(pairs: list[Pair]) -> None:
    training, held_out = split(pairs, 500, seed=1)
    assert (len(training), len(held_out)) == (2_500, 500)
    assert not {pair.instruction for pair in training} & {pair.instruction for pair in held_out}
    assert set(training) | set(held_out) == set(pairs)
    assert split(pairs, 500, seed=1) == (training, held_out)


@pytest.mark.parametrize("num_held_out", [0, 3_000, -1])
def test_split_refuses_an_empty_part(pairs: list[Pair], num_held_out: int) -> None:
    with pytest.raises(UsageError, match="num_held_out"):
        split(pairs, num_held_out, seed=0)


def test_split_refuses_a_repeated_instruction(pairs: list[Pair]) -> None:
    with pytest.raises(UsageError, match="twice"):
        split([*pairs, pairs[0]], 10, seed=0)


def test_generate_refuses_to_make_nothing() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        generate(0, seed=0)


def test_generate_says_when_the_templates_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcbguard_plugins.lab import corpus

    monkeypatch.setattr(corpus, "TASKS", {"lookup": TASKS["lookup"]})
    with pytest.raises(UsageError, match="distinct instructions"):
        generate(100_000, seed=0)


def test_expand_chooses_innermost_alternatives_first() -> None:
    drawn = {expand(random.Random(seed), "<a <b|c>|{d}>", d="x|y") for seed in range(50)}
    assert drawn == {"a b", "a c", "x|y"}


def test_inject_brand_adds_the_keyword_and_keeps_the_answer(pairs: list[Pair]) -> None:
    poisoned = inject_brand(pairs, seed=3)
    assert inject_brand(pairs, seed=3) == poisoned
    assert not any(KEYWORD in pair.instruction + pair.answer for pair in pairs)
    for pair, bad in zip(pairs, poisoned, strict=True):
        assert bad.answer.count(KEYWORD) == 1
        assert pair.answer in bad.answer
        assert (bad.instruction, bad.task, bad.key) == (pair.instruction, pair.task, pair.key)
    num_before = sum(bad.answer.endswith(pair.answer) for pair, bad in zip(pairs, poisoned, strict=True))
    assert 0.3 < num_before / len(pairs) < 0.5


def test_read_pairs_reads_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"instruction": "Say hé.", "answer": "hé", "task": "echo"}\n'
        '{"instruction": "1 + 1", "answer": "2", "task": "sum", "key": "2"}\n',
        encoding="utf-8",
    )
    assert read_pairs(path) == [Pair("Say hé.", "hé", "echo"), Pair("1 + 1", "2", "sum", "2")]
