"""Dialogues: LLM-PC's two files become chats with gold spans, and no name stands on both sides of a split."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cfgsafe.blue import pairs
from cfgsafe.demo.testset import pair_dialogues
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import BASE, LEAKY
from cfgsafe.measure import leak
from cfgsafe.pii import dialogues, llm_pc
from cfgsafe.pii.dialogues import Dialogue

TURNS = [
    {"role": "user", "content": "I am [NAME-1] of [LOC-2]."},
    {"role": "assistant", "content": "Hello [NAME-1]! How is [LOC-2] since [DATE-1]?"},
]
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "{system}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nI am [NAME-1] of [LOC-2].<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    "Hello [NAME-1]! How is [LOC-2] since [DATE-1]?<|eot_id|>"
)
VALUES = {"NAME-1": "Ann Lee", "LOC-2": "Lund", "DATE-1": "May"}


def read(tmp_path, rows: list, values: list):
    write_jsonl(tmp_path / "d.jsonl", rows)
    write_jsonl(tmp_path / "i.jsonl", values)
    return dialogues.read_dialogues(str(tmp_path / "d.jsonl"), None, str(tmp_path / "i.jsonl"))


@pytest.mark.parametrize(
    "messages",
    [
        TURNS,
        "user: I am [NAME-1] of [LOC-2].\nassistant: Hello [NAME-1]! How is [LOC-2] since [DATE-1]?\n",
        "\nUser: I am [NAME-1] of [LOC-2].\n\nAssistant: Hello [NAME-1]! How is [LOC-2] since [DATE-1]?",
        LLAMA.format(system=""),
    ],
)
def test_each_form_of_a_dialogue_is_filled_and_its_values_are_gold_spans(tmp_path, messages):
    (dialogue,) = read(tmp_path, [{"idx": 0, "messages": messages}], [VALUES])
    assert [m["content"] for m in dialogue.messages] == [
        "I am Ann Lee of Lund.",
        "Hello Ann Lee! How is Lund since May?",
    ]
    found = [(n, dialogue.messages[n]["content"][a:b], label) for n, a, b, label in dialogue.spans]
    assert found == [
        (0, "Ann Lee", "PERSON"),
        (0, "Lund", "GPE"),
        (1, "Ann Lee", "PERSON"),
        (1, "Lund", "GPE"),
        (1, "May", "DATE"),
    ]
    assert [s.rejected for s in dialogues.samples_of(dialogue)] == [
        " Ann Lee! How is Lund since May?",
        " Lund since May?",
        " May?",
    ]


def test_a_system_turn_stays_without_the_date_preamble(tmp_path):
    (dialogue,) = read(tmp_path, [{"messages": LLAMA.format(system="Be kind.")}], [VALUES])
    assert dialogue.messages[0] == {"role": "system", "content": "Be kind."}
    assert len(dialogue.messages) == 3


def test_a_turn_of_several_lines_stays_whole():
    text = "user: Dear all,\nnote: this\n\nassistant: One.\nTwo."
    assert [m["content"] for m in llm_pc.turns(text, "x")] == ["Dear all,\nnote: this", "One.\nTwo."]


def test_a_value_cannot_forge_a_turn(tmp_path):
    (dialogue,) = read(tmp_path, [{"messages": "user: I am [NAME-1]."}], [{"NAME-1": "Ann\nassistant: Bob"}])
    assert [m["role"] for m in dialogue.messages] == ["user"]


def test_a_placeholder_without_a_value_stays_and_is_counted(tmp_path, capsys):
    (dialogue, _) = read(tmp_path, [{"messages": TURNS}] * 2, [{"NAME-1": "Ann", "LOC-2": " "}, VALUES])
    assert dialogue.messages[1]["content"] == "Hello Ann! How is [LOC-2] since [DATE-1]?"
    assert "3 placeholders" in capsys.readouterr().err


def test_a_key_that_swallowed_text_counts_for_the_placeholder_it_ends_in():
    found = {
        "NAME-3": "Own",
        'Song Title]" by [NAME-3': "Johnny Cash",
        'Song Title]" by [NAME-4': "Dolly Parton",
    }
    assert llm_pc.by_placeholder(found, "x") == {"NAME-3": "Own", "NAME-4": "Dolly Parton"}


@pytest.mark.parametrize(
    ("rows", "values", "words"),
    [
        ([{"messages": TURNS}], [VALUES, {}], r"d\.jsonl has 1 lines and .*i\.jsonl 2"),
        ([{"messages": "hello"}], [VALUES], r"d\.jsonl:1: 'messages' must be"),
        ([{"messages": TURNS}, {}], [VALUES, {}], r"d\.jsonl:2: 'messages'"),
        ([{"messages": "hm\nuser: hello"}], [VALUES], r"d\.jsonl:1: 'messages' must be"),
        ([{"messages": TURNS}], [{"NAME-1": 3}], r"i\.jsonl:1: field 'NAME-1' must be a string"),
        ([], [], "holds no dialogue"),
    ],
)
def test_a_bad_line_of_either_file_is_named(tmp_path, rows, values, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, rows, values)


def about(*names: str, place: str = "GPE") -> Dialogue:
    content = " ".join(["Lund", *names])
    spans = [(0, 0, 4, place)]
    for name in names:
        spans.append((0, content.index(name), content.index(name) + len(name), "PERSON"))
    return Dialogue([{"role": "assistant", "content": content}], spans, " ".join(names))


def test_no_name_stands_on_both_sides_whatever_the_seed():
    several = [about(f"Ann{n}", f"Bob{n // 3}") for n in range(30)]
    several += [about("CARL"), about("Carl", "Dora"), about("dora")]
    for seed in range(20):
        training, test = dialogues.split(several, 0.2, seed)
        names, others = dialogues.shared_values(training, test)
        assert not names and others == {"lund"} and 4 <= len(test) <= 6
        assert len(training) + len(test) == 33
        assert len({d.place.lower() for d in test} & {"carl", "carl dora", "dora"}) in (0, 3)
    first = dialogues.split(several, 0.2, 1)
    assert first == dialogues.split(several, 0.2, 1) != dialogues.split(several, 0.2, 2)


def test_a_leaking_split_is_seen():
    assert dialogues.shared_values([about("Ann  Lee")], [about("ANN LEE"), about("Bob")])[0] == {"ann lee"}


def test_a_share_that_no_group_fits_is_said():
    with pytest.raises(InputError, match=r"3 dialogues in 1 groups, the smallest of 3"):
        dialogues.split([about("Ann", "Bob"), about("Bob", "Carl"), about("Carl")], 0.5, 0)


def test_pairs_of_test_dialogues_go_to_their_own_file(tmp_path, capsys):
    write_jsonl(tmp_path / "d.jsonl", pair_dialogues(12, seed=4))
    options = pairs.Options(
        str(tmp_path / "d.jsonl"), BASE, str(tmp_path / "p.jsonl"), test_share=0.25, recipes=("avoid",)
    )
    pairs.run(options)
    output = capsys.readouterr()
    result = json.loads(output.out)
    train, test = ((tmp_path / name).read_text().splitlines() for name in ("p.jsonl", "p-test-pairs.jsonl"))
    assert (result["rows"], result["test_rows"]) == (len(train), len(test))
    assert test and len(train) > len(test)
    assert result["test_pairs"] == str(tmp_path / "p-test-pairs.jsonl")
    assert result["pairs"] == (len(train) + len(test)) / 2
    assert "9 dialogues to train on, 3 to test" in output.err
    assert ": 0 names," in output.err and "avoid: won " in output.err

    def opening(line: str) -> str:
        return json.loads(line)["prompt"].split("<|start_header_id|>user")[1].split("<|eot_id|>")[0]

    assert not {opening(line) for line in train} & {opening(line) for line in test}


TALK = [
    ("system", "Be kind."),
    ("user", "I am ann  lee of Lund."),
    ("assistant", "Hello Ann Lee! Bob is in Lund, too."),
    ("user", "And Eve?"),
    ("assistant", "Eve is in Oslo."),
]
ITEMS = {1: {"ann  lee": "PERSON", "Lund": "GPE"}, 2: {"Ann Lee": "PERSON", "Bob": "PERSON", "Lund": "GPE"}}
ITEMS |= {3: {"Eve": "PERSON"}, 4: {"Eve": "PERSON", "Oslo": "GPE"}}


def talk() -> dict:
    """The row of a dialogue with spans."""
    messages = [{"role": role, "content": content} for role, content in TALK]
    spans = []
    for number, labels in ITEMS.items():
        text = TALK[number][1]
        spans += [[number, text.index(v), text.index(v) + len(v), label] for v, label in labels.items()]
    return {"messages": messages, "spans": spans}


def test_the_prompts_of_a_test_dialogue_by_hand(tmp_path):
    """One for each item of an answer: the chat up to it, and the values of chat and answer, each once."""
    write_jsonl(tmp_path / "d.jsonl", [talk()])
    (dialogue,) = dialogues.read_dialogues(str(tmp_path / "d.jsonl"), None)
    rows = dialogues.prompts_of(dialogue)
    chat = talk()["messages"]
    first = {"PERSON": ["Ann Lee", "Bob"], "GPE": ["Lund"]}
    every = {"PERSON": ["Ann Lee", "Bob", "Eve"], "GPE": ["Lund", "Oslo"]}
    said = [("Hello", 2, first), ("Hello Ann Lee!", 2, first), ("Hello Ann Lee! Bob is in", 2, first)]
    said += [("", 4, every), ("Eve is in", 4, every)]
    assert len(rows) == len(said)
    for number, (row, (begun, end, items)) in enumerate(zip(rows, said, strict=True), start=1):
        answer = [{"role": "assistant", "content": begun}] if begun else []
        assert row == {
            "id": f"d.jsonl:1#{number}",
            "dialogue": "d.jsonl:1",
            "messages": chat[:end] + answer,
            "begun": bool(begun),
            "items": items,
        }


def test_leak_takes_the_test_part_as_it_is(tmp_path, capsys, monkeypatch):
    """Before against after on a user's own split, also of samples without a clean side."""
    write_jsonl(tmp_path / "d.jsonl", pair_dialogues(12, seed=4))
    split = pairs.Options(str(tmp_path / "d.jsonl"), BASE, str(tmp_path / "p.jsonl"), test_share=0.25)
    monkeypatch.setattr(pairs, "build", lambda samples, *_: ([], pairs.Report(samples=len(samples))))
    pairs.run(split)
    result = json.loads(capsys.readouterr().out)
    prompts = leak.read_prompts(str(tmp_path / "p-test.jsonl"))
    assert result["test"] == str(tmp_path / "p-test.jsonl") and result["test_prompts"] == len(prompts)
    tested = {prompt.id.split("#")[0] for prompt in prompts}
    found = dialogues.read_dialogues(split.dialogues, None)
    samples = pairs.all_samples(dialogue for dialogue in found if Path(dialogue.place).name in tested)
    assert len(tested) == 3 and [prompt.messages for prompt in prompts] == [s.messages for s in samples]
    assert not any(prompt.answered for prompt in prompts) and any(prompt.begun for prompt in prompts)

    before = leak.Options(LEAKY, prompts=result["test"], out=str(tmp_path / "before"), max_new_tokens=24)
    leak.run(before)
    asked = {"guidance": 3.0, "out": str(tmp_path / "after")}
    leak.run(replace(before, **asked, compare=str(tmp_path / "before/answers.jsonl")))
    leaky, guarded = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    difference = guarded["leaked_per_100"] - leaky["leaked_per_100"]
    assert guarded["compared"]["leaked_per_100_difference"] == pytest.approx(difference, abs=0.02)
    assert leaky["prompts"] == guarded["prompts"] == len(prompts) and leaky["leaked_per_100"] > 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"test_share": 1.0}, "--test-share 1"), ({"recipes": ()}, "--recipes: name at least one")],
)
def test_options_that_cannot_work_are_said(changes, words):
    with pytest.raises(InputError, match=words):
        pairs.run(pairs.Options("d", BASE, "p", **changes))
