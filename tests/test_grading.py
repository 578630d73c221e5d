"""Which option a short answer gives, case by case; every option of hand-made rows in every form."""

import pytest

from cfgsafe.measure import grading, utility

FACTS = ["ice, or snow", "Fire.", "a warm wind", "York", "New York"]
NUMBERS = ["5", "3", "2.5", "-3", "3 m"]
SYMBOLS = ["C", "O", "Fe", "H"]
GENES = ["Tcl", "TCL", "tcl A"]


@pytest.mark.parametrize("options", [FACTS, NUMBERS, SYMBOLS, GENES])
@pytest.mark.parametrize("form", ["{}", "{}.", "The answer is {}.", "The correct answer is: **{}**", '"{}"'])
def test_each_options_own_words_choose_it(options, form):
    for index, option in enumerate(options):
        assert grading.chosen(form.format(option.rstrip(".")), options) == [index]


@pytest.mark.parametrize(
    "form",
    [
        "{}", "({})", "{}.", "({}).", "The answer is {}", "The answer is ({}).", "The correct answer is: {}.",
        "Answer: {}", "**Answer:** {}", "The answer is option {}.", "Option {}", "option {}: that one",
        "The best one is option {}.", "{}\nBecause it is.", "{}) of course", "the answer is **({})**",
    ],
)  # fmt: skip
def test_letters_and_line_numbers_choose_an_option(form):
    for index in range(len(FACTS)):
        assert grading.chosen(form.format("ABCDE"[index]), FACTS) == [index]
        assert grading.chosen(form.format(index + 1), FACTS) == [index]


@pytest.mark.parametrize(
    ("text", "options", "given"),
    [
        # directly after "answer is", what follows does not count
        ("The answer is (B). Unlike ice, or snow it burns.", FACTS, [1]),
        ("The correct answer is: 4. York", FACTS, [3]),
        ("The answer is fire. York is a town.", FACTS, [1]),
        ("The answer is (A)... no, the answer is (B).", FACTS, [0]),
        ("The answer is 3, because a 5 is too much.", NUMBERS, [1]),
        # words win over the number of a line and over a letter
        ("3", NUMBERS, [1]),
        ("5", NUMBERS, [0]),
        ("The answer is 4.", NUMBERS, [3]),  # no option is 4
        ("C", SYMBOLS, [0]),
        ("The answer is (C).", SYMBOLS, [0]),
        ("The answer is (B).", SYMBOLS, [1]),  # no option is B
        ("3. New York", FACTS, [4]),  # without "answer is", the only words
        ("3. 2.5", NUMBERS, [2]),  # the whole third line
        ("The answer is: 5. 3 m", NUMBERS, [4]),
        ("The answer is (C) Fe", SYMBOLS, [2]),
        ("The answer is: 3. 5", NUMBERS, [1]),  # the third line is another one
        ("(ice, or snow)", FACTS, [0]),
        # the longer option, and the one with the same capitals
        ("It is in New York", FACTS, [4]),
        ("It is in York", FACTS, [3]),
        ("TCL", GENES, [1]),
        ("tcl", GENES, [0, 1]),
        # several options
        ("Fire or a warm wind", FACTS, [1, 2]),
        ("The answer is fire or York", FACTS, [1, 3]),
        ("The answer is (A) or (B).", FACTS, []),
        ("B and C", FACTS, []),
        ("2. fire, unlike York", FACTS, [1]),
        ("Fire, unlike York", FACTS, [1]),
        ("Unlike York, fire burns", FACTS, [1, 3]),
        ("The answer is tcl", GENES, [0, 1]),
        ("5. fire, unlike York", FACTS, [1, 3]),  # "5" is neither
        # no option
        ("", FACTS, []),
        ("campfire", FACTS, []),
        ("The answer is 6.", FACTS, []),
        ("The answer is 0", FACTS, []),
        ("The answer is (G).", FACTS, []),
        ("A good question", FACTS, []),
        ("I do not know", FACTS, []),
        ("2 of them", FACTS, []),
        ("The answer is 3.5", FACTS, []),
        ("The answer is 1/3 or 3 %", ["3"], []),
        ("It is 12.5 here", ["5", "12"], []),
    ],
)
def test_what_an_answer_gives(text, options, given):
    assert grading.chosen(text, options) == given


def test_white_space_within_an_option_does_not_matter():
    assert grading.chosen("it is  a\nwarm wind", [" a  warm\twind ", "fire"]) == [0]


@pytest.mark.parametrize(
    ("text", "right"),
    [("Fire.", True), ("(B)", True), ("2", True), ("ice", False), ("fire or ice", False), ("campfire", None)],
)
def test_an_answer_is_right_when_it_gives_the_right_option_alone(text, right):
    assert grading.exact(text, {"options": ["ice", "fire"], "answer_index": 1}) is right


def test_options_of_the_same_words_are_one():
    row = {"options": ["fire", "Fire.", "fire."], "answer_index": 2}
    assert grading.exact("fire", row) is True and grading.exact("The answer is (A)", row) is True
    assert grading.exact("Fire", row) is False


def test_the_score_counts_right_answers_in_percent():
    row = {"options": ["ice", "fire"], "answer_index": 1}
    assert utility.score([row] * 4, ["B", "ice", "none", "2"]).value == 50.0
