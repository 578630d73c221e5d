"""What a model still knows: short answers to multiple-choice questions, under the same guidance as everything else.

Source: Smirnov (arXiv 2412.06846): zero-shot "Provide a short answer to the question: ..." on MMLU-Pro.
Deviations: the options stand in the prompt, and the score is exact: the answer names the right option and no other one.

Questions JSONL in MMLU-Pro's shape: {"question", "options", "answer_index"} a line; options "N/A" are dropped.

Run it: python eval.py utility --model cfgsafe/demo/leaky
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cfgsafe.blue.intervals import Estimate, mean_interval, to_json
from cfgsafe.blue.subject import Subject, answers, load
from cfgsafe.errors import InputError, make_folder, read_jsonl, write_jsonl
from cfgsafe.tokenizer import Messages

INSTRUCTION = "Provide a short answer to the question: "
SYSTEM = "You are a helpful assistant."


@dataclass
class Options(Subject):
    """Score a model's short answers to multiple-choice questions."""

    questions: str | None = None
    """JSONL in MMLU-Pro's shape; by default the demo's held-out quiz."""
    out: str | None = None
    """JSONL for the answers and their scores."""
    limit: int | None = None
    """Use the first questions only."""
    max_new_tokens: int = 64
    """Longest answer."""


def run(options: Options) -> None:
    rows = read_questions(options.questions)[: options.limit]
    if options.out:
        make_folder(Path(options.out).parent)
    model, tokenizer = load(options)
    texts = answers(options, model, tokenizer, [conversation(row) for row in rows], "quiz", options.max_new_tokens)
    if options.out:
        write_jsonl(
            options.out, [{**row, "model_answer": text, "correct": correct(text, row)} for row, text in zip(rows, texts, strict=True)]
        )
    unparsed = mean_interval([100 * (not named(text, row)) for row, text in zip(rows, texts, strict=True)])
    figures = to_json({"utility": score(rows, texts), "unparsed": unparsed})
    print(json.dumps({"questions": len(rows), "guidance": options.guidance, "space": options.space, **figures}))


def read_questions(path: str | None) -> list[dict]:
    """Questions of a file, or the demo's held-out quiz. Raises InputError naming line and field."""
    if path is None:
        from cfgsafe.demo.quiz import items

        return items("test", 200)
    rows = []
    for place, row in read_jsonl(path):
        options, index = row.get("options"), row.get("answer_index")
        if not isinstance(row.get("question"), str) or not isinstance(options, list) or not all(isinstance(o, str) for o in options):
            raise InputError(f"{place}: needs 'question', a string, and 'options', a list of strings")
        if not isinstance(index, int) or not 0 <= index < len(options):
            raise InputError(f"{place}: 'answer_index' must be the place of the right option, counted from 0")
        right = options[index]
        options = [option for option in options if option != "N/A"]
        if right not in options:
            raise InputError(f"{place}: the right option is N/A")
        rows.append({**row, "options": options, "answer_index": options.index(right)})
    if not rows:
        raise InputError(f"{path}: holds no question")
    return rows


def prompt(row: dict) -> str:
    """The user's message: the paper's instruction, the question, the options."""
    return f"{INSTRUCTION}{row['question']} Options: {', '.join(row['options'])}."


def conversation(row: dict) -> Messages:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt(row)}]


def correct(text: str, row: dict) -> bool:
    """The answer names the right option and none of the others, but for those that stand inside the right one."""
    right, found = row["options"][row["answer_index"]], named(text, row)
    return right in found and all(option == right or option.lower() in right.lower() for option in found)


def named(text: str, row: dict) -> list[str]:
    """The options that the answer names, as whole words in any case."""
    return [o for o in row["options"] if re.search(rf"(?<!\w){re.escape(o)}(?!\w)", text, re.IGNORECASE)]


def score(rows: list[dict], texts: list[str]) -> Estimate:
    """Percentage of right answers with its 95 % interval."""
    return mean_interval([100 * correct(text, row) for row, text in zip(rows, texts, strict=True)])
