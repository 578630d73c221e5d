"""Pairs to tensors: TRL's tokenising and truncation, shared prefixes, and the order of a run."""

import random
import re

import pytest
import torch
from conftest import random_model

from cfgsafe.blue.batches import Pair, Row, collate, plan, read_pairs, tokenise
from cfgsafe.blue.options import Options
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.losses import NEEDS, REFUSALS

LENGTHS = (2048, 1900)


def options(**changes) -> Options:
    return Options("model", "pairs", "out", **changes)


def test_sides_share_the_prompt_and_end_with_the_end_token(tokenizer):
    prompt = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    chosen, rejected = tokenise(prompt, "Hello there", "Hello Ann<|eot_id|>", tokenizer, *LENGTHS)
    end = tokenizer.special["<|eot_id|>"]
    assert chosen.ids[: chosen.start] == tokenizer.encode_prompt(prompt) == rejected.ids[: rejected.start]
    assert tokenizer.decode(chosen.ids[chosen.start :]) == "Hello there"
    assert tokenizer.decode(rejected.ids[rejected.start :]) == "Hello Ann"
    assert chosen.ids[-1] == rejected.ids[-1] == end and chosen.ids.count(end) == rejected.ids.count(end)


def test_tokens_that_merge_across_the_boundary_go_to_the_answer(tokenizer):
    """The tokens of "I wo" are no beginning of those of "I work"."""
    prompt, whole = tokenizer.encode_prompt("I wo"), tokenizer.encode_prompt("I work")
    assert whole[: len(prompt)] != prompt
    chosen, rejected = tokenise("I wo", "rk", " n", tokenizer, *LENGTHS)
    assert (chosen.ids[:-1], chosen.start) == (whole, 2) and prompt[:2] == whole[:2]
    assert rejected.start == len(prompt)


def test_truncation_keeps_the_prompts_end_and_the_answers_beginning(tokenizer):
    prompt, answer = " a b c d e f g h", " x y z x y z"
    before, after = tokenizer.encode_prompt(prompt), tokenizer.encode(answer)
    chosen, _ = tokenise(prompt, answer, " x", tokenizer, 8, 5)
    assert chosen.ids[: chosen.start] == before[-5:] and chosen.ids[chosen.start :] == after[:3]
    whole, _ = tokenise(prompt, answer, " x", tokenizer, *LENGTHS)
    assert whole.ids == [*before, *after, tokenizer.special["<|eot_id|>"]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "pairs.jsonl:1: field 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "<|eot_id|>"}, "field 'rejected'"),
        ({"prompt": "a", "chosen": "b"}, "field 'rejected'"),
        ({"prompt": " a" * 600, "chosen": "b", "rejected": "c"}, "exceed the model's context of 512"),
    ],
)
def test_a_bad_pair_is_named(tmp_path, tokenizer, row, words):
    write_jsonl(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(InputError, match=words):
        read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, 512, options())


@pytest.mark.parametrize(
    ("prompt", "chosen", "words"),
    [
        ("<|begin_of_text|>a<|eot", "_id|> b", "'chosen' completes, after the prompt, the text of"),
        ("<|begin_of_text|>a", "b <|eot_id|> c", "'chosen' holds the text of the control token '<|eot_id|>'"),
        ("<|begin_of_text|>a", "b<|eot_id|><|eot_id|>", "'chosen' holds the text of"),
    ],
)
def test_only_the_prompt_and_the_end_of_an_answer_are_control_tokens(
    tmp_path, tokenizer, prompt, chosen, words
):
    """Pieces on both sides of the seam would end the turn in the middle of the text."""
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": prompt, "chosen": chosen, "rejected": "c"}])
    with pytest.raises(InputError, match=rf"pairs\.jsonl:1: field {re.escape(words)}"):
        read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, 512, options())


@pytest.mark.parametrize("weight", [-1, True, "1", None, float("nan"), float("inf"), 10**400])
def test_a_bad_weight_is_named(tmp_path, tokenizer, weight):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    write_jsonl(tmp_path / "pairs.jsonl", [good, good | {"weight": weight}])
    with pytest.raises(InputError, match=r"pairs.jsonl:2: field 'weight' must be a number from 0 to 1000000"):
        read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, 512, options())


def test_a_pair_weighs_1_unless_its_row_says_otherwise(tmp_path, tokenizer):
    rows = []
    for given in ({}, {"weight": 0.5}, {"weight": 0}):
        rows.append({"prompt": "a", "chosen": "b", "rejected": "c"} | given)
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    pairs = read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, 512, options())
    assert [pair.weight for pair in pairs] == [1, 0.5, 0]


@pytest.mark.parametrize("objective", NEEDS)
def test_null_says_that_an_answer_is_only_to_be_kept(tmp_path, tokenizer, objective):
    """Not so a field that is missing, or misspelt: where two sides are needed, that is an error."""
    file = tmp_path / "pairs.jsonl"
    write_jsonl(file, [{"prompt": "a", "chosen": " b", "rejected": None}, {"prompt": "a", "chosen": " b",
        "rejected": " c"}])  # fmt: skip
    kept, pair = read_pairs(str(file), tokenizer, 512, options(objective=objective))
    assert kept.kept and not pair.kept
    assert kept.chosen == kept.rejected and tokenizer.decode(kept.chosen.ids[kept.chosen.start :]) == " b"


def row(ids: str, start: int) -> Row:
    return Row([ord(c) - 96 for c in ids], start)


PAIRS = {
    "plain": [Pair(row("abcdefg", 3), row("abcxy", 3)), Pair(row("abcd", 2), row("abyzabc", 2))],
    "answers share a beginning": [Pair(row("abcdef", 2), row("abcdxy", 2))],
    "nothing shared": [Pair(row("abcd", 2), row("xyzab", 3))],
    "one answer begins the other": [
        Pair(row("abcdef", 2), row("abcd", 2)),
        Pair(row("abc", 2), row("abcz", 1)),
    ],
    "the same answer": [Pair(row("abcd", 2), row("abcd", 2))],
    "no prompt": [Pair(row("abc", 0), row("xbc", 0))],
}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS.keys())
def test_each_side_reads_what_it_reads_alone(pairs, share):
    model = random_model()
    batch = collate(pairs, share=share)
    assert len(batch.ids) == len(pairs) * (1 if share else 2)
    read = model(batch.ids, batch.positions, mask=batch.mask).flatten(0, 1)[batch.reads].split(batch.lengths)
    targets = batch.targets.split(batch.lengths)
    sides = [(pair.chosen, 1) for pair in pairs]
    sides += [(pair.rejected, max(1, pair.rejected.start)) for pair in pairs]
    for number, (side, first) in enumerate(sides):
        alone = model(torch.tensor([side.ids]))[0]
        assert targets[number].tolist() == side.ids[first:]
        assert torch.allclose(read[number], alone[first - 1 : -1], atol=1e-5), number
        assert batch.answers[number] == len(side.ids) - max(1, side.start)


def test_sharing_computes_the_shared_tokens_once():
    prompt = list(range(5, 105))
    pair = Pair(Row([*prompt, 1, 2], 100), Row([*prompt, 3, 4, 4], 100))
    assert collate([pair, pair], share=True).ids.shape == (2, 105)
    assert collate([pair, pair], share=False).ids.shape == (4, 103)


@pytest.mark.parametrize("group", [True, False])
def test_every_pair_comes_once_an_epoch(group):
    rng = random.Random(0)
    lengths = [rng.randrange(10, 500) for _ in range(501)]
    settings = dict(batch_size=4, grad_accum=3, epochs=2, group_by_length=group)
    steps = plan(lengths, options(seed=1, **settings))
    for epoch in (1, 2):
        batches = []
        for step in steps:
            batches += step.batches if step.epoch == epoch else []
        assert sorted(sum(batches, [])) == list(range(501))
        padded = 0
        for batch in batches:
            padded += max(lengths[number] for number in batch) * len(batch)
        waste = padded / sum(lengths)
        longest = [max(lengths[number] for number in batch) for batch in batches]
        assert longest[:20] != sorted(longest[:20])
        assert waste < 1.05 if group else waste > 1.3
    assert [len(step.batches) for step in steps[:42]] == [3] * 42 and len(steps) == 2 * 42
    assert steps == plan(lengths, options(seed=1, **settings))
    assert steps[0] != plan(lengths, options(seed=2, **settings))[0]


def test_in_order_without_shuffling():
    steps = plan([5, 4, 3, 2, 1], options(batch_size=2, grad_accum=2, epochs=1, shuffle=False))
    assert steps == [(1, [[0, 1], [2, 3]]), (1, [[4]])]


def test_refusals_take_the_place_of_the_chosen_side(tmp_path, tokenizer):
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"Say {n}", "rejected": " two"} for n in range(20)])
    pairs = read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, 512, options(objective="dpo-idk"))
    said = {tokenizer.decode(pair.chosen.ids[pair.chosen.start :]) for pair in pairs}
    assert 1 < len(said) and said <= set(REFUSALS)
