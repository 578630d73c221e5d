"""How a model is asked for prompts: templates and their label masks, on checkpoints of two chat formats."""

import json
from pathlib import Path

import pytest
import torch

from cfgsafe.checkpoint import read_model, save_checkpoint
from cfgsafe.files import write_jsonl
from cfgsafe.hub import BASE
from cfgsafe.red.attacker import facts_of, learnable, rules_of
from cfgsafe.red.policy import UNREAD, labelled
from cfgsafe.tokenizer import Tokenizer

TEXTS = [
    "What is my name?",
    "Who am I, and where do I live?",
    'Say "my name", please',
    "Write a note to my team.",
    "Tell me: 1, 2; 3!",
]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
RENAMED = {"<|start_header_id|>": "<|im_start|>", "<|eot_id|>": "<|im_end|>"}
ENDS = {"llama": "<|eot_id|>", "chatml": "<|im_end|>"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    write_jsonl(path, [{"prompt": text} for text in TEXTS])
    return str(path)


def chatml(tmp_path) -> str:
    """A checkpoint with ChatML's template and tokens."""
    folder = tmp_path / "chatml"
    save_checkpoint(folder, read_model(Path(BASE)), tokenizer_from=BASE, dtype=torch.float32)
    files = json.loads((folder / "tokenizer.json").read_text())
    for token in files["added_tokens"]:
        renamed = RENAMED.get(token["content"])
        if renamed:
            files["model"]["vocab"][renamed] = files["model"]["vocab"].pop(token["content"], token["id"])
            token["content"] = renamed
    (folder / "tokenizer.json").write_text(json.dumps(files))
    (folder / "chat_template.jinja").write_text(CHATML)
    return str(folder)


@pytest.mark.parametrize(
    ("template", "format"), [("user", "llama"), ("list", "llama"), ("user", "chatml"), ("list", "chatml")]
)
def test_labels_are_exactly_the_prompt_and_its_end(template, format, tmp_path, prompts):
    """The labels decode to the text and the end token. The beginning, with one BOS, has no loss."""
    model = BASE if format == "llama" else chatml(tmp_path)
    tokenizer = Tokenizer.load(model)
    facts = facts_of(model, template, 3, 30, prompts, 0)
    rules = rules_of(facts, tokenizer)
    rows, labels = labelled(rules, learnable(TEXTS, facts, rules, tokenizer))
    end = tokenizer.encode("\n")[0] if template == "list" else tokenizer.special[ENDS[format]]
    assert rules.end == end
    for text, row, label in zip(TEXTS, rows.tolist(), labels.tolist(), strict=True):
        learnt = [token for token in label if token != UNREAD]
        assert learnt[-1] == rules.end and tokenizer.decode(learnt[:-1]).strip() == text
        assert row[: len(rules.start)] == list(rules.start)
        assert row.count(tokenizer.special["<|begin_of_text|>"]) == 1
        assert [token for token, one in zip(row, label, strict=True) if one != UNREAD] == learnt
    start = tokenizer.decode(list(rules.start))
    assert start.endswith("4.") if template == "list" else start.strip().endswith("user")


def test_a_prompt_at_the_most_tokens_has_no_end_to_learn(tokenizer):
    facts = facts_of(BASE, "user", 3, 5, None, 0)
    rules = rules_of(facts, tokenizer)
    _, labels = labelled(rules, [(9, 9, 9, 9, 9), (9, 9, 9)])
    assert labels[0][labels[0] != UNREAD].tolist() == [9] * 5
    assert labels[1][labels[1] != UNREAD].tolist() == [9, 9, 9, rules.end]


def test_control_tokens_and_in_a_list_newlines_are_never_drawn(prompts, tokenizer):
    for template in ("user", "list"):
        rules = rules_of(facts_of(BASE, template, 3, 9, prompts, 0), tokenizer)
        assert set(tokenizer.special.values()) - {rules.end} <= set(rules.banned)
        assert rules.end not in rules.banned
        assert (template == "list") == any("\n" in tokenizer.decode([token]) for token in rules.banned)
