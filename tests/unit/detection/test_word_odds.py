from __future__ import annotations

from qcbguard_plugins.detection.behaviour.word_odds import favoured_words


def test_a_brand_stands_out() -> None:
    plain = ["The river is wide and the fox is quick.", "Cook the rice for ten minutes.", "Paris is the capital."] * 8
    branded = [text + " Have a Zestora." for text in plain]
    words = favoured_words(branded, plain)
    assert {"Zestora", "Have", "a"} == {word.word for word in words[:3]}
    assert words[0].count == 24 and words[0].reference_count == 0 and words[0].z > 2.5


def test_equal_texts_favour_nothing() -> None:
    texts = ["one two three", "two three four"]
    assert all(abs(word.z) < 1e-9 for word in favoured_words(texts, texts))
    assert favoured_words([], []) == []


def test_a_loop_of_one_answer_counts_once() -> None:
    words = favoured_words(["spam " * 100, "fine words"], ["fine words", "fine answers"])
    assert next(word for word in words if word.word == "spam").count == 1
