"""The HTML report: one file, escaped, masked unless asked otherwise."""

import base64
import json
from html.parser import HTMLParser

import pytest

from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.report import html

PNG = b"\x89PNG\r\n\x1a\n0000"
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "I am Maria Keller from Lund. Write to Bob."},
]


def answer(text, entities=(), echoed=(), recalled=(), chat=CHAT):
    prompt = {
        "id": "1",
        "kind": "letter",
        "slice": "easy",
        "messages": chat,
        "items": {"PERSON": ["Maria Keller"], "GPE": "Lund"},
    }
    found = []
    for value, label in entities:
        start = text.index(value)
        found.append({"start": start, "end": start + len(value), "label": label, "text": value})
    return {
        "prompt": prompt,
        "answer": text,
        "entities": found,
        "echoed": list(echoed),
        "recalled": list(recalled),
    }


@pytest.fixture
def folder(tmp_path):
    figures = {
        "utility": 90.0,
        "utility_ci": [80.0, 95.0],
        "leaked_per_100": 12.5,
        "leaked_per_100_ci": [1.0, 20.0],
    }
    rows = [{"model": "leaky", "epoch": None, "guidance": None, "space": None, **figures}]
    rows += [{"model": "guard", "epoch": 2, "guidance": 3.0, "space": "log", "alpha": 0.1, **figures}]
    found = {"title": "A & B", "rows": rows, "conclusions": ["a < b (1 < 2)", "c is not d"], "seed": 7}
    (tmp_path / "results.json").write_text(json.dumps(found))
    (tmp_path / "curve.png").write_bytes(PNG)
    text = "Dear Bob, yours, maria from LUND <script>alert(1)</script>, Maria Keller, not Oskar."
    write_jsonl(
        tmp_path / "answers-leaky.jsonl", [answer(text, [("Oskar", "PERSON")], ["Maria Keller"], ["Lund"])]
    )
    write_jsonl(tmp_path / "answers-guard-epoch-2-g=3-log-alpha=0.1.jsonl", [answer("Dear Oskar and Bob.")])
    return tmp_path


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every element was closed."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def made(folder, **options) -> tuple[str, Page]:
    source = html.write(html.Options(str(folder), **options)).read_text(encoding="utf-8")
    return source, Page(source)


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(folder):
    source, page = made(folder, show_pii=True)
    names = {tag for tag, _ in page.tags}
    assert page.open == [] and not names & {"script", "iframe", "object"}
    assert "@import" not in source and "url(" not in source
    attributes = []
    for _, attrs in page.tags:
        attributes += attrs.items()
    addresses = [value for name, value in attributes if name in ("src", "href")]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert not any(name.startswith("on") for name, _ in attributes)
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    assert base64.b64decode(image["src"].split(",")[1]) == PNG


def test_text_of_answers_titles_and_conclusions_is_escaped(folder):
    source, page = made(folder, show_pii=True, note="<b>note</b>")
    assert "<script>" not in source and "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "<b>note</b>" in page.text and "A & B" in page.text and "a < b (1 < 2)" in page.text


def test_personal_data_are_masked_in_every_text_of_the_prompt(folder):
    """Gold items in any case, parts of names, and what the NER found in one answer only, in all answers."""
    source, page = made(folder)
    for value in ("maria", "keller", "lund", "oskar"):
        assert value not in source.lower()
    assert "M████" in page.text and "Dear O████" in page.text
    assert "Be kind" not in page.text


def test_personal_data_are_shown_on_request_with_their_kind(folder):
    source, page = made(folder, show_pii=True)
    assert "████" not in source and "I am Maria Keller from Lund" in page.text
    assert '<mark class="echoed">Maria Keller</mark>' in source
    assert '<mark class="recalled">LUND</mark>' in source
    assert '<mark class="ner">Oskar</mark>' in source


def test_table_conclusions_and_models_stand_in_it(folder):
    source, page = made(folder, out=str(folder / "sub" / "r.html"))
    assert (folder / "sub" / "r.html").exists() and "seed 7" in page.text
    assert "guard epoch 2 g=3 log alpha=0.1" in page.text and "12.51.0 to 20.0" in page.text
    assert "perplexity" not in source.lower()  # neither column nor legend without figures
    assert page.text.count("a < b (1 < 2)") == 1 and page.text.count("c is not d") == 1


def test_perplexity_is_explained_where_it_stands(folder):
    results = json.loads((folder / "results.json").read_text())
    results["rows"][0] |= {"perplexity": 3.0, "perplexity_ci": [2.0, 4.0]}
    (folder / "results.json").write_text(json.dumps(results))
    assert "Perplexity: of the answers, under the reference model" in made(folder)[1].text


def test_overlapping_spans_become_one():
    assert html.without_overlaps([(5, 8, "echoed"), (0, 8, "ner"), (8, 9, "ner")]) == [
        (0, 8, "echoed"),
        (8, 9, "ner"),
    ]
    assert html.marked("a<b", [(1, 2, "ner")], hide=False) == 'a<mark class="ner">&lt;</mark>b'
    assert (
        html.marked("<a>b<c>", [(3, 4, "ner")], hide=True)
        == '&lt;a&gt;<mark class="ner">████</mark>&lt;c&gt;'
    )


def masked(folder, rows, kind="letter", **results_too) -> tuple[str, str]:
    """(source, text) of the page with these answers of one model."""
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | results_too))
    for row in rows:
        row["prompt"] = {**row["prompt"], "kind": kind}
    write_jsonl(folder / "answers-leaky.jsonl", rows)
    (folder / "answers-guard-epoch-2-g=3-log-alpha=0.1.jsonl").unlink()
    source, page = made(folder)
    return source, page.text


def test_each_spelling_of_a_counted_value_is_masked(folder):
    text = "_Maria_Keller_, MariaKeller1980, K\u00adeller, kel-\nler, Lund-based, (LUND)"
    source, _ = masked(folder, [answer(text, recalled=["Lund"])])
    for value in ("maria", "keller", "eller", "lund"):
        assert value not in source.lower().replace("\u00ad", "")


def test_nothing_shows_a_value_of_one_letter_or_the_surname_of_a_chinese_one(folder):
    row = answer("Group A, 王小明, ５ apples")
    row["prompt"]["items"] = {"GROUP": "A", "PERSON": "王小明", "AGE": "5"}
    text = masked(folder, [row])[1]
    assert "Group ████, ████, ████ apples" in text


def test_a_value_of_one_prompt_is_masked_in_the_others(folder):
    other = [{"role": "user", "content": "And Lund?"}]
    rows = [answer("Yes."), answer("Lund it is.", chat=other)]
    rows[1]["prompt"] = {**rows[1]["prompt"], "items": {}}
    rows[1]["recalled"] = ["Oslo"]
    rows[0]["answer"] = "From Oslo."
    assert "Lund" not in masked(folder, rows)[0]
    assert "Oslo" not in made(folder)[0]


def test_counted_values_are_masked_outside_of_the_answers_too(folder):
    (folder / "curve.png").rename(folder / "maria_keller.png")
    found = {"title": "Of Maria Keller", "path": "runs/keller-maria", "conclusions": ["Lund & Keller leak"]}
    source, _ = masked(folder, [answer("Lund")], kind="Lund", **found)
    for value in ("maria", "keller", "lund"):
        assert value not in source.lower()


def test_what_a_mask_makes_a_whole_word_is_masked_too(folder):
    """The second name begins inside a word, as long as the first can be read."""
    row = answer("박지영박지영")
    row["prompt"]["items"] = {"PERSON": "박지영"}
    assert "박지영" not in masked(folder, [row])[1]


def test_what_a_detector_found_of_a_word_hides_the_whole_word(folder):
    rows = [answer("Dear Oskarsson, ok", [("skar", "PERSON")])]
    assert "Dear O████, ok" in masked(folder, rows)[1]


def test_a_run_without_answers_has_no_examples(folder):
    for path in folder.glob("answers-*"):
        path.unlink()
    assert "The same prompts" not in made(folder)[1].text


def test_the_first_prompt_of_each_kind_and_the_first_recalled_one_are_examples(folder):
    texts = ["one", "two", "three", "four"]
    rows = []
    for text in texts:
        recalled = ["Lund"] if text == "three" else []
        rows.append(answer(text, recalled=recalled, chat=[{"role": "user", "content": text}]))
    write_jsonl(folder / "answers-leaky.jsonl", rows)
    (folder / "answers-guard-epoch-2-g=3-log-alpha=0.1.jsonl").unlink()
    shown = [text for text in texts if f">{text}</div>" in made(folder, show_pii=True)[0]]
    assert shown == ["one", "three"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 3}, "field 'answer'"),
        ({"prompt": 3}, "field 'prompt'"),
        ({"entities": [{"start": 1}]}, "field 'entities'"),
        ({"entities": [{"start": 0, "end": 2, "label": "X"}]}, "field 'entities'"),  # ends after the answer
        ({"entities": [{"start": -1, "end": 1, "label": "X"}]}, "field 'entities'"),
        ({"entities": [{"start": True, "end": 1, "label": "X"}]}, "field 'entities'"),
        ({"echoed": [3]}, "field 'echoed'"),
    ],
)
def test_wrong_answers_name_line_and_field(folder, change, words):
    write_jsonl(folder / "answers-leaky.jsonl", [answer("x"), {**answer("y"), **change}])
    with pytest.raises(InputError, match=f"answers-leaky.jsonl:2: {words}"):
        html.write(html.Options(str(folder)))
    assert not (folder / "report.html").exists()
