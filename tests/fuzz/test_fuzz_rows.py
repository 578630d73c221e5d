"""Mutated rows for each reader of rows: one line that names the file, or a result that can be used.

Fields get other types, values and texts, or are gone; lines are cut and their bytes flipped. What a reader
accepts is put to use, because a wrong row that is read breaks later.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import mutate_bytes, mutate_json, one_line

from cfgsafe.blue import batches
from cfgsafe.blue.options import Options as Training
from cfgsafe.errors import CfgsafeError
from cfgsafe.files import read_answers, read_jsonl
from cfgsafe.measure import canaries, detectors, leak, mmlu_pro, perplexity, targets, utility
from cfgsafe.pii.dialogues import prompts_of, read_dialogues, shared_values
from cfgsafe.pii.known import Known
from cfgsafe.red import attacker, records, rewards
from cfgsafe.report import html, results
from cfgsafe.request import Request
from cfgsafe.request_lines import read_request
from cfgsafe.subject import Answer, Subject
from cfgsafe.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

Read = Callable[[Path], object]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "I am Ann Lee."},
    {"role": "assistant", "content": "Hello Ann Lee of Leeds!"},
]
ASKED = [*CHAT, {"role": "user", "content": "Who am I?"}]
SPANS = [[1, 5, 12, "PERSON"], [2, 6, 13, "PERSON"], [2, 17, 22, "GPE"]]
FIGURE = {"leaked_per_100": 12.5, "leaked_per_100_ci": [1.0, 20.0], "utility": 90.0, "utility_ci": [80, 95]}
ANSWER = {
    "prompt": {"messages": ASKED, "items": {"PERSON": "Ann Lee"}, "kind": "letter"},
    "answer": "Ann Lee, of Leeds",
    "entities": [{"start": 12, "end": 17, "label": "GPE", "text": "Leeds"}],
    "echoed": ["Ann Lee"],
    "recalled": ["Leeds"],
}
TEXT = "Ann Lee of Leeds"


def nobody(texts: list[str]) -> list[list]:
    """A detector that finds nothing."""
    return [[] for _ in texts]


def leak_prompts(path: Path) -> None:
    prompts = leak.read_prompts(str(path))
    found = leak.inspect(prompts, [Answer(TEXT)] * len(prompts), nobody)
    json.dumps([leak.figures(found), leak.by_slice(found), leak.by_label(found)])


def known_values(path: Path) -> None:
    Known.read(str(path)).found_in(TEXT)


def dialogues(path: Path) -> None:
    found = read_dialogues(str(path), nobody)
    json.dumps([prompts_of(dialogue) for dialogue in found])
    shared_values(found, found)


def extract_targets(path: Path) -> None:
    for target in targets.read_targets(str(path), None)[0]:
        assert target.hint


def report(path: Path) -> None:
    for row in html.read_answers(path):
        example = html.Example("", row["prompt"]["messages"], row["prompt"].get("items", {}), {"m": row})
        html.sections([example], nobody)


def results_of_a_run(path: Path) -> None:
    found = results.read_results(path.parent)
    rows = found["rows"]
    results.table(rows), results.terminal_table(rows), results.over_seeds(rows), results.legend(rows)
    html.page(found, [], [], None, "")


def readers(tokenizer: Tokenizer) -> dict[str, tuple[list[dict], Read]]:
    """What is read -> rows that are right, and the reader."""
    question = {"question": "What?", "options": ["ice", "fire", "N/A"], "answer_index": 1, "category": "x"}
    question |= {"cot_content": "A: Let's. The answer is (B)."}
    probe = {"messages": CHAT, "value": " Leeds"}
    request = {"messages": CHAT[:2], "guidance": 3, "space": "log", "seed": 1, "stop": ["x"], "top_p": 0.5}
    trial = {"context": "c", "answer": "x", "score": 1.0, "found": ["Leeds"]}
    attack = {"tokens": [1], "text": "x", "log_reference": -1.0, "least_likely": -1.0, "trials": [trial]}

    def requests(path: Path) -> None:
        for place, row in read_jsonl(path):
            read_request(row, place, tokenizer, Subject("m"), Request([]), None)

    def pairs(path: Path) -> None:
        batches.read_pairs(str(path), tokenizer, 512, Training("m", str(path), "out"))

    marked, prompt = {"messages": CHAT, "spans": SPANS}, {"messages": ASKED, "id": 1, "person": "p"}
    return {
        "leak prompts": ([prompt, prompt | {"items": {"GPE": ["Leeds"]}, "wanted": ["a"]}], leak_prompts),
        "known values": ([marked, {"items": {"GPE": ["Leeds"], "X": "y"}}], known_values),
        "dialogues": ([marked, {"messages": CHAT}], dialogues),
        "targets": ([marked, marked], extract_targets),
        "gold spans": ([marked], lambda path: detectors.read_gold(str(path))),
        "questions": ([question, question], lambda path: utility.read_questions(str(path))),
        "worked examples": ([question, question], lambda path: mmlu_pro.read_shots(str(path))),
        "contexts": ([{"messages": CHAT, "items": {"X": "y"}}], lambda p: rewards.read_contexts(str(p))),
        "probes": (
            [probe | {"person": "a", "repeats": 0}, probe | {"person": "b", "repeats": 4}],
            lambda path: canaries.read_persons(str(path)),
        ),
        "texts": ([{"messages": CHAT}], lambda path: perplexity.read_dialogues(str(path))),
        "requests": ([request, {"prompt": "x", "negative_prompt": "y", "guidance": 2}], requests),
        "pairs": ([{"prompt": "x", "chosen": "y", "rejected": "z"}] * 2, pairs),
        "attackers' prompts": ([{"prompt": "x"}], lambda path: attacker.read_prompts(str(path))),
        "attacks": ([attack], lambda path: records.read_attacks(str(path))),
        "kept answers": ([{"key": "k", "answer": "a", "finish_reason": "stop"}], read_answers),
        "answers": ([ANSWER, ANSWER], report),
        "results.json": (
            [{"title": "t", "rows": [{"model": "m", "guidance": 3.0, "space": "log", "epoch": 1, **FIGURE,
                                      "slices": {"easy": dict(FIGURE)}}], "conclusions": ["c"]}],
            results_of_a_run,
        ),
    }  # fmt: skip


def test_rows(cases, tmp_path, tokenizer):
    """Each case damages one row of one reader's file."""
    known = readers(tokenizer)
    for case in cases:
        name = case.choice(list(known))
        rows, read = known[name]
        path = tmp_path / ("results.json" if name == "results.json" else "rows.jsonl")
        lines = [json.dumps(row).encode() for row in rows]
        at = case.randrange(len(lines))
        if case.random() < 0.8:
            lines[at] = mutate_json(case, json.loads(lines[at]))[0].replace(b"\n", b" ")
        else:
            lines[at] = mutate_bytes(case, lines[at])
        path.write_bytes(b"\n".join(lines) + b"\n")
        try:
            read(path)
        except CfgsafeError as error:
            one_line(error, path)
        except Exception as error:
            what = f"{type(error).__name__}: {str(error)[:300]}"
            raise AssertionError(f"{name}: {what} for {path.read_bytes()[:1500]!r}") from error


def test_every_reader_takes_the_rows_that_are_right(tmp_path, tokenizer):
    """Otherwise the fuzzer would only ever see errors."""
    for name, (rows, read) in readers(tokenizer).items():
        path = tmp_path / ("results.json" if name == "results.json" else "rows.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read(path)
