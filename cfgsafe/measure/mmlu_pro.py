"""Questions in MMLU-Pro's shape, and TIGER-Lab's 5-shot chain-of-thought protocol.

Source: Wang et al., MMLU-Pro (arXiv 2406.01574), and evaluate_from_local.py of TIGER-AI-Lab/MMLU-Pro.
Deviations of the protocol from that script:
- an answer without a letter gets no credit, and is reported; the script guesses a letter;
- the prompt is one user message, because guidance acts through the system prompt; theirs is raw text;
- a prompt that does not fit is an error that names the question; the script drops examples;
- a letter counts in the options as printed, without those that are "N/A".
A question that is a worked example is refused, so validation, their source, cannot be asked 5-shot.

Rows: {"question_id", "question", "options", "answer_index", "category", "cot_content"}, as JSONL
or parquet; only question, options and answer_index are always needed.

Run it: python eval.py utility --model M --questions mmlu-pro/test --protocol cot5
"""

import re
from itertools import chain
from pathlib import Path

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.hub import dataset_file
from cfgsafe.settings import shown

REPOSITORY = "TIGER-Lab/MMLU-Pro"
SPLITS = {f"mmlu-pro/{split}": f"data/{split}-00000-of-00001.parquet" for split in ("validation", "test")}
LETTERS = "ABCDEFGHIJ"
SHOTS = 5
HEAD = (
    "The following are multiple choice questions (with answers) about {}. Think step by step and "
    'then finish your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n\n'
)
STEPS = "Let's think step by step."
SAID = re.compile(r"answer is \(?([A-J])\)?")
HEADED = re.compile(r"^.*[aA]nswer:\s*([A-J])", re.MULTILINE)  # the last one of a line
ALONE = re.compile(r"\b[A-J]\b")

Placed = list[tuple[str, dict]]  # (file:line, row)


def read(name: str) -> Placed:
    """Questions of "mmlu-pro/validation", "mmlu-pro/test", or a JSONL or parquet file.

    Raises InputError naming line and field.
    """
    if name.startswith("mmlu-pro/") and name not in SPLITS and not Path(name).exists():
        raise InputError(f"{name}: no such set of questions; there are {', '.join(SPLITS)}")
    path = dataset_file(REPOSITORY, SPLITS[name]) if name in SPLITS else Path(name)
    rows = read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path)
    placed = [(place, check_row(row, place)) for place, row in rows]
    if not placed:
        raise InputError(f"{name}: holds no question")
    return placed


def read_parquet(path: Path) -> Placed:
    """Rows of a parquet file, each with `file:row`. Raises InputError."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: parquet needs pyarrow; pip install 'cfgsafe[parquet]'") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from None
    return [(f"{path}:{number}", row) for number, row in enumerate(rows, start=1)]


def check_row(row: dict, place: str) -> dict:
    """The row without its N/A options. Raises InputError naming `place` and the field."""
    options, index = row.get("options"), row.get("answer_index")
    asked = isinstance(row.get("question"), str)
    if not asked or not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise InputError(f"{place}: needs 'question', a string, and 'options', a list of strings")
    if not isinstance(index, int) or not 0 <= index < len(options):
        raise InputError(f"{place}: 'answer_index' must be the place of the right option, counted from 0")
    if options[index] == "N/A":
        raise InputError(f"{place}: the right option is N/A")
    kept = [number for number, option in enumerate(options) if option != "N/A"]
    if len(kept) < 2:
        raise InputError(f"{place}: needs a right option and a wrong one")
    return {**row, "options": [options[number] for number in kept], "answer_index": kept.index(index)}


def numbered(options: list[str]) -> str:
    """The options, one a line, counted from 1. The white space of each is single spaces.

    >>> numbered(["ice, or snow", "fire"])
    '1. ice, or snow\\n2. fire'
    """
    return "\n".join(f"{number}. {one_line(option)}" for number, option in enumerate(options, start=1))


def one_line(option: str) -> str:
    """The option with single spaces between its words; a few of MMLU-Pro's span several lines."""
    return " ".join(option.split())


def read_shots(name: str) -> dict[str, list[dict]]:
    """Category -> its first five worked examples. Raises InputError naming line and field."""
    shots: dict[str, list[dict]] = {}
    for place, row in read(name):
        if not isinstance(row.get("cot_content"), str) or not row["cot_content"]:
            raise InputError(f"{place}: 'cot_content' must be the worked answer of an example, a string")
        shots.setdefault(check_lettered(row, place)["category"], []).append(row)
    return {category: rows[:SHOTS] for category, rows in shots.items()}


def check_lettered(row: dict, place: str) -> dict:
    """The row, if it has a category and few enough options for letters. Raises InputError."""
    if not isinstance(row.get("category"), str):
        raise InputError(f"{place}: 'category' must be a string: it chooses the examples of --protocol cot5")
    if len(row["options"]) > len(LETTERS):
        raise InputError(f"{place}: {len(row['options'])} options; letters go from A to {LETTERS[-1]}")
    return row


def cot_prompts(placed: Placed, shots: dict[str, list[dict]]) -> list[str]:
    """The 5-shot prompt of each question.

    Raises InputError if a question is one of the examples, or its category has fewer than five.
    """
    examples = list(chain.from_iterable(shots.values()))
    numbers = {str(row["question_id"]) for row in examples if row.get("question_id") is not None}
    texts = {(row["question"], *row["options"]) for row in examples}
    prompts = []
    for place, row in placed:
        check_lettered(row, place)
        if str(row.get("question_id")) in numbers or (row["question"], *row["options"]) in texts:
            number = f"{place}: 'question_id' {row.get('question_id')}"
            raise InputError(f"{number} is among the --shots; nothing is asked 5-shot on itself")
        found = shots.get(row["category"], [])
        if len(found) < SHOTS:
            category = f"{place}: 'category' {shown(row['category'])}"
            raise InputError(f"{category} has {len(found)} examples in --shots; {SHOTS} are needed")
        prompts.append(cot_prompt(row, found))
    return prompts


def cot_prompt(row: dict, examples: list[dict]) -> str:
    """TIGER-Lab's prompt: head, worked examples, the question, and the beginning of its answer."""
    text = HEAD.format(row["category"])
    for example in examples:
        worked = example["cot_content"].replace(f"A: {STEPS}", f"Answer: {STEPS}")
        text += f"{_block(example)}{worked}\n\n"
    return f"{text}{_block(row)}Answer: {STEPS}"


def letter(text: str) -> str | None:
    """The letter that an answer gives, by TIGER-Lab's chain of patterns; None if it gives none.

    >>> letter("So the answer is (C)."), letter("Answer: B"), letter("A or D"), letter("None")
    ('C', 'B', 'D', None)
    """
    own = text.split("Question:")[0]  # their script stops here: the model begins an example of its own
    found = SAID.search(own) or HEADED.search(own)
    if found:
        return found[1]
    alone = ALONE.findall(own)  # one pattern for the last of them, as theirs, takes quadratic time
    return alone[-1] if alone else None


def _block(row: dict) -> str:
    block = f"Question:\n{row['question']}\nOptions:\n"
    for letter, option in zip(LETTERS, row["options"], strict=False):
        block += f"{letter}. {option}\n"
    return block
