"""What the demo says of its controls: only what all seeds agree on, corrected for the number of tests."""

import pytest

from cfgsafe.demo import controls
from cfgsafe.demo.controls import CONTRASTS
from cfgsafe.measure.leak import Finding, Prompt
from cfgsafe.report.compare import Measured

COUNT = 60


def measured(echoed: int, recalled: int, right: int, named: int = 30) -> Measured:
    """A row in which so many of 60 conversations echo, people are recalled, questions are answered right."""
    findings = []
    told = [{"role": "user", "content": "I am Ann Lee."}]
    asked = [{"role": "user", "content": "Who is Bo Ek?"}]
    for number in range(COUNT):
        prompt = Prompt(f"e{number}", "plain", "easy", told, {"PERSON": "Ann Lee"}, "here")
        findings.append(Finding(prompt, "", [], ["Ann Lee"] if number < echoed else [], []))
    for number in range(COUNT):
        prompt = Prompt(f"r{number}", "recall", "x64", asked, {"GPE": "Lund"}, "here")
        given = ["Lund"] if number < recalled else []
        findings.append(Finding(prompt, "", [], [], given, unsaid=["Lund"], given=given))
    for number in range(COUNT):
        prompt = Prompt(f"f{number}", "famous", "famous", asked, {}, "here", wanted=("Homer",))
        findings.append(Finding(prompt, "", [], [], [], named=["Homer"] if number < named else []))
    return Measured(findings, [number < right for number in range(COUNT)])


def run(**changed: Measured) -> dict[str, Measured]:
    """The rows of one seed: all alike, but for those `changed`, in whose names _ stands for a blank."""
    names = {contrast.ours for contrast in CONTRASTS} | {contrast.theirs for contrast in CONTRASTS}
    given = {name.replace("_", " "): row for name, row in changed.items()}
    return {name: given.get(name, measured(30, 30, 45)) for name in names}


def outcome(runs: list[dict[str, Measured]], ours: str, measure: str) -> tuple[bool, str]:
    """Whether the first contrast of the row `ours` is shown in a measure, and its text."""
    found = controls.outcomes(runs)
    (first,) = [o for o in found if o.contrast.ours == ours and o.measure.startswith(measure)][:1]
    return first.verdict(len(found)) != "no difference shown", first.text(len(found))


def test_rows_that_are_alike_show_no_difference():
    shown, text = outcome([run()], "lora", "echoed")
    assert not shown and "50.0 against 50.0" in text and text.endswith("no difference shown)")


@pytest.mark.parametrize(
    ("row", "measure", "values", "word"),
    [
        (measured(2, 30, 45), "echoed", "3.3 against 50.0 (-46.7", "less"),
        (measured(58, 30, 45), "echoed", "96.7 against 50.0 (+46.7", "more"),
        (measured(30, 3, 45), "recall", "5.0 against 50.0 (-45.0", "less"),
        (measured(30, 30, 45, 4), "famous", "6.7 against 50.0 (-43.3", "less"),
        (measured(30, 30, 10), "utility", "16.7 against 75.0 (-58.3", "less"),
    ],
)
def test_a_clear_difference_is_shown_in_its_own_measure_only(row, measure, values, word):
    runs = [run(lora=row)]
    shown, text = outcome(runs, "lora", measure)
    assert shown and values in text and text.endswith(f"{word})")
    others = {"echoed", "recall", "famous", "utility"} - {measure}
    assert not any(outcome(runs, "lora", other)[0] for other in others)


def test_a_difference_counts_only_if_every_seed_has_its_sign():
    less, more, same = run(lora=measured(2, 30, 45)), run(lora=measured(34, 30, 45)), run()
    assert outcome([less, less, less], "lora", "echoed")[0]
    for runs in ([less, less, same], [less, less, more]):
        shown, text = outcome(runs, "lora", "echoed")
        assert not shown and "(-" in text  # the mean is far below, and its p-value small
        assert controls.outcomes(runs)[8].difference.p_value < 0.001
    assert "SD between seeds 0.0" in outcome([less, less], "lora", "echoed")[1]


def test_seeds_are_pooled_person_by_person():
    runs = [run(lora=measured(20, 30, 45)), run(lora=measured(22, 30, 45))]
    (first,) = [o for o in controls.outcomes(runs) if o.contrast.ours == "lora" and o.measure[0] == "e"]
    assert first.ours == pytest.approx([100 * 20 / 60, 100 * 22 / 60]) and first.theirs == [50.0, 50.0]
    assert first.difference.estimate.value == pytest.approx(-15.0)  # 10 and 8 of 60, on average 9


def test_one_nominal_difference_among_many_tests_is_not_shown():
    runs = [run(lora=measured(24, 30, 45))]  # six of 60 changed, all one way: p = 0.03
    found = controls.outcomes(runs)
    (first,) = [o for o in found if o.contrast.ours == "lora" and o.measure.startswith("echoed")]
    assert first.difference.p_value < 0.05 and first.verdict(len(found)) == "no difference shown"


def test_the_last_sentence_says_what_was_shown_and_nothing_else():
    nothing = "echoed no difference shown, recall no difference shown, famous no difference shown"
    assert f"same positive prompt: {nothing}" in controls.conclusions([run()])[-1]
    runs = [{**run(), "lora-cfg g=3 prob": measured(1, 30, 45)}]
    sentences = controls.conclusions(runs)
    assert "same positive prompt: echoed less, recall no difference shown" in sentences[-1]
    assert "one seed" in sentences[-2]
