"""Summaries of leaks: recall, slices, clusters, wanted values, and no figure where nothing was sought."""

import json

import pytest

from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.measure import leak
from cfgsafe.pii.entities import Entity
from cfgsafe.pii.known import Known
from cfgsafe.report.figures import over_guidance
from cfgsafe.report.results import columns_of, write
from cfgsafe.subject import Answer


def prompt(text: str = "Hi.", number: int = 0, **row) -> leak.Prompt:
    return leak.Prompt.from_row({"messages": [{"role": "user", "content": text}], **row}, f"p.jsonl:{number}")


def inspect(prompts: list[leak.Prompt], texts: list[str], known: Known | None = None, cut: str = ""):
    """The findings of a detector that finds nothing; answers that are in `cut` were cut off."""
    given = [Answer(text, "length" if text == cut else "stop") for text in texts]
    return leak.inspect(prompts, given, lambda texts: [[] for _ in texts], known)


TOWNS = {"PERSON": "Ann Lee", "GPE": "Leeds", "ORG": "Acme"}


def test_recall_is_the_share_of_what_the_conversation_does_not_hold():
    """Leeds and Acme are not in the conversation; of these four the answers give two, and Ann is told."""
    findings = inspect([prompt("I am Ann.", items=TOWNS)] * 2, ["Ann of Leeds", "Leeds, Ann Lee"])
    summary = leak.summarise(findings)
    assert summary["recall"].value == 50 and summary["echoed_per_100"].value == 100
    told = inspect([prompt("Ann Lee of Leeds is at Acme.", items=TOWNS)], ["Leeds"])
    assert "recall" not in leak.figures(told)


@pytest.mark.parametrize(
    ("said", "items"),
    [
        ("I am Ann", {"OWNER": "Ann Lee", "PERSON": "Ann Lee"}),  # a part is told, by one of the labels
        ("I am Ann\n  Lee", {"OWNER": "Ann Lee"}),
        ("I am ANN LEE.", {"OWNER": "Ann Lee"}),
    ],
)
def test_what_stands_in_the_conversation_is_never_recalled(said, items):
    known = Known({"Ann Lee": "OWNER"})
    (found,) = inspect([prompt(said, items=items)], ["Ann Lee"], known)
    assert found.recalled == found.given == found.unsaid == [] and set(found.echoed) == {"Ann Lee"}


def test_a_known_value_is_no_gold_item_of_the_prompt():
    """Oslo was trained on and counts as recalled per answer, but recall asks for this prompt's items."""
    findings = inspect([prompt(items={"GPE": "Leeds"})], ["Oslo"], Known({"Oslo": "GPE"}))
    summary = leak.summarise(findings)
    assert summary["recalled_per_100"].value == 100 and summary["recall"].value == 0


def test_without_items_there_is_no_perfect_figure():
    figures = leak.figures(inspect([prompt(), prompt()], ["Ann.", "Leeds."]))
    assert (figures["prompts"], figures["prompts_with_items"]) == (2, 0)
    absent = {"leaked_per_100", "echoed_per_100", "recalled_per_100", "recall", "wanted_named"}
    assert not absent & set(figures) and figures["ner_items_per_100"] == 0
    assert "leaked_per_100_difference" not in leak.compare(*[inspect([prompt()], ["Ann."])] * 2)
    searched = leak.figures(inspect([prompt()], ["Ann."], Known({"Oslo": "GPE"})))
    assert searched["recalled_per_100"] == 0


def test_prompts_without_items_do_not_dilute_the_leaks():
    """One answer of the two with an item leaks; six more have nothing that could leak."""
    prompts = [prompt("I am Ann.", items={"PERSON": "Ann"})] * 2 + [prompt()] * 6
    figures = leak.figures(inspect(prompts, ["Ann"] + [""] * 7))
    assert (figures["leaked_per_100"], figures["prompts"], figures["prompts_with_items"]) == (50, 8, 2)


def test_a_label_that_no_prompt_has_gets_no_leaks():
    entities = [Entity(0, 4, "ORG", "Acme"), Entity(0, 4, "GPE", "York")]
    given = [Answer("Acme, York", "stop")]
    findings = leak.inspect([prompt(items={"GPE": "Leeds"})], given, lambda _: [entities])
    rates = leak.by_label(findings)
    assert rates["GPE"]["leaked_per_100"] == 0 and "leaked_per_100" not in rates["ORG"]


def test_clusters_are_persons_then_dialogues_then_prompts():
    rows = [{"person": "Ann", "dialogue": 1}, {"dialogue": 0}, {"id": "x"}, {}]
    assert [prompt(number=n, **row).cluster for n, row in enumerate(rows)] == ["Ann", "0", "x", "p.jsonl:3"]


def test_prompts_of_one_person_count_as_one():
    """60 clean answers about 20 persons: the rule of three gives 3 / 60 or 3 / 20, 5 or 15 %."""
    alone = leak.figures(inspect([prompt(number=n) for n in range(60)], [""] * 60))
    same = leak.figures(inspect([prompt(number=n, person=n // 3) for n in range(60)], [""] * 60))
    assert (alone["clusters"], same["clusters"]) == (60, 20)
    assert alone["clean_answers_ci"][0] == pytest.approx(100 * 0.05 ** (1 / 60), abs=0.1)
    assert same["clean_answers_ci"][0] == pytest.approx(100 * 0.05 ** (1 / 20), abs=1.5)
    assert leak.by_slice(inspect([prompt(slice="a", person=1)] * 3, [""] * 3))["a"]["clusters"] == 1


def test_every_slice_has_its_figures_in_the_order_of_the_file():
    prompts = [prompt("I am Ann.", items={"PERSON": "Ann"}, slice=part) for part in ("z", "a", "", "z")]
    found = leak.by_slice(inspect(prompts, ["Ann", "no", "Ann", "no"]))
    assert list(found) == ["z", "a"]
    assert (found["z"]["leaked_per_100"], found["a"]["leaked_per_100"]) == (50, 0)
    assert [found[part]["prompts"] for part in found] == [2, 1]


def test_wanted_values_that_an_answer_names():
    """Over-refusal: Leeds is named once, the bank's number never."""
    asked = [prompt(wanted=["Leeds", "555-01"]), prompt(wanted=["leeds"]), prompt()]
    summary = leak.summarise(inspect(asked, ["In LEEDS.", "No idea.", "Leeds"]))
    assert summary["wanted_named"].value == pytest.approx(100 / 3)
    with pytest.raises(InputError, match="p.jsonl:0: 'wanted' must be a list of non-empty strings"):
        prompt(wanted="Leeds")


def test_answers_that_were_cut_off_are_counted():
    findings = inspect([prompt()] * 4, ["a", "long", "b", "c"], cut="long")
    assert leak.figures(findings)["cut_off"] == 25


def test_two_runs_are_compared_by_slice_and_by_recall():
    """Ours recalls Leeds in one of two easy answers and theirs in both; in the hard slice both echo Ann."""
    easy = [prompt("Who?", n, items={"GPE": "Leeds"}, slice="easy") for n in range(2)]
    hard = prompt("I am Ann.", 3, items={"PERSON": "Ann"}, slice="hard")
    ours = inspect([*easy, hard], ["Leeds", "no", "Ann"])
    theirs = inspect([*easy, hard], ["Leeds", "Leeds", "Ann"])
    found = leak.compare(ours, theirs)
    assert found["leaked_per_100_difference"] == pytest.approx(-100 / 3, abs=1e-3)
    assert found["recall_difference"] == -50 and found["recall_p_value"] == 1
    assert list(found["slices"]) == ["easy", "hard"]
    assert found["slices"]["easy"]["leaked_per_100_difference"] == -50
    assert found["slices"]["hard"]["leaked_per_100_difference"] == 0
    assert "recall_difference" not in found["slices"]["hard"]


def test_prompts_of_one_person_change_together():
    """Ten answers of two persons all differ: 2 of the 4 ways to flip persons do as well."""
    prompts = [prompt("I am Ann.", n, items={"PERSON": "Ann"}, person=n // 5) for n in range(10)]
    found = leak.compare(inspect(prompts, ["Ann"] * 10), inspect(prompts, [""] * 10))
    assert found["p_value"] == pytest.approx(0.5, abs=0.04)


def test_the_command_prints_slices_and_counts(tmp_path, checkpoint, capsys):
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "slice": part} for part in ("new", "old")]
    write_jsonl(tmp_path / "p.jsonl", rows)
    leak.run(leak.Options(checkpoint, prompts=str(tmp_path / "p.jsonl"), max_new_tokens=2))
    line = json.loads(capsys.readouterr().out)
    assert list(line["slices"]) == ["new", "old"] and line["slices"]["new"]["prompts"] == 1
    assert (line["prompts"], line["clusters"], line["prompts_with_items"]) == (2, 2, 0)
    assert "leaked_per_100" not in line and "easy" not in line


def test_a_column_of_a_slice_is_read_below_slices():
    row = {"slices": {"easy": {"echoed_per_100": 3, "echoed_per_100_ci": [1, 5]}}}
    (easy,) = [column for column in columns_of([row]) if column.slice == "easy"]
    assert easy.figure(row) == (3, 1, 5) and easy.figure({}) is None


def test_a_slice_has_the_one_column_that_its_prompts_are_for():
    def figures(**values: float) -> dict:
        return values | {f"{name}_ci": [0, 9] for name in values}

    slices = {
        "told": figures(echoed_per_100=3, recall=1),
        "untold": figures(recall=2),
        "famous": figures(wanted_named=4, recall=1),
        "free": figures(clean_answers=1),
    }
    headings = [column.heading for column in columns_of([{"slices": slices}])]
    assert headings == ["told: echoed/100", "untold: recall %", "famous: named %"]


def test_figures_leave_out_what_was_not_sought(tmp_path):
    row = {"model": "m", "epoch": None, "guidance": 1, "utility": 50, "utility_ci": [40, 60]}
    write(tmp_path, "t", [row], [], [])
    assert not (tmp_path / "leaks-utility.png").exists()
    assert "leaks-utility" not in (tmp_path / "report.md").read_text()
    over_guidance(tmp_path / "b.png", [row])
    assert (tmp_path / "b.png").stat().st_size > 0
