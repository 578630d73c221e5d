"""Loss and gradients of a batch, shared, chunked and recomputed, against a dense computation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from test_tokenizer import variant

from cfgsafe import logprobs
from cfgsafe.blue.batches import Pair, Row, read_pairs
from cfgsafe.blue.orpo import Options
from cfgsafe.blue.step import LOGGED, batch_loss, evaluate, reference_logprobs, score
from cfgsafe.files import write_jsonl
from cfgsafe.hub import BASE
from cfgsafe.lora import LoRAConfig, adapter_parameters, attach
from cfgsafe.losses import log_odds, objective_loss
from cfgsafe.parallel import World
from cfgsafe.tokenizer import LLAMA31_TEMPLATE

PAIRS = [
    Pair(Row([0, 5, 6, 7, 2046], 3), Row([0, 5, 6, 9, 9, 9, 2046], 3)),
    Pair(Row([0, 8, 3, 2046], 2), Row([0, 8, 4, 4, 2046], 2)),
    Pair(Row([4, 8, 3, 1, 1, 1, 1, 2046], 5), Row([4, 8, 3, 1, 1, 7, 2046], 5)),
]
ALONE = World(0, 1, "cpu")


def settings(**changes) -> Options:
    return Options("m", "p", "o", **{"beta": 0.1, **changes})


def dense(model):
    """Means of the chosen answers and of the rejected, (B,) each; and the log-probabilities of each chosen
    side's tokens, and of its answer's.
    """
    lc, lr, everything, answers = [], [], [], []
    for pair in PAIRS:
        for side, means in ((pair.chosen, lc), (pair.rejected, lr)):
            logp = model.head(model(torch.tensor([side.ids])))[0].log_softmax(-1)
            each = torch.stack([logp[t - 1, side.ids[t]] for t in range(1, len(side.ids))])
            means.append(each[side.start - 1 :].mean())
            if side is pair.chosen:
                everything.append(each)
                answers.append(each[side.start - 1 :])
    return torch.stack(lc), torch.stack(lr), everything, answers


def test_the_logged_values_equal_a_dense_computation():
    model = random_model()
    loss, values = batch_loss(model, model, PAIRS, settings(), None, ALONE)
    logged = dict(zip(LOGGED, values, strict=True))
    lc, lr, everything, answers = dense(model)
    nll = -torch.cat(everything).mean()
    odds = log_odds(lc, lr)
    assert torch.isclose(logged["nll_loss"], nll, atol=1e-5)
    assert torch.isclose(loss, nll - 0.1 * F.logsigmoid(odds).mean(), atol=1e-5)
    assert torch.isclose(logged["loss"], loss)
    assert torch.isclose(logged["log_odds_chosen"], odds.mean(), atol=1e-5)
    assert torch.isclose(logged["rewards_margin"], 0.1 * (lc - lr).mean(), atol=1e-5)
    assert torch.isclose(logged["rewards_accuracy"], (lc > lr).float().mean())
    loss, values = batch_loss(model, model, PAIRS, settings(objective="sft"), None, ALONE)
    answer_logprobs = torch.cat(answers)
    assert torch.isclose(loss, -answer_logprobs.mean(), atol=1e-5) and len(answer_logprobs) == 2 + 2 + 3
    assert torch.isclose(values[LOGGED.index("nll_loss")], nll, atol=1e-5)


@pytest.mark.parametrize("objective", ["orpo", "npo", "graddiff"])
def test_the_nll_may_leave_out_the_prompt(objective):
    model = random_model()
    lc, lr, _, answers = dense(model)
    nll = -torch.cat(answers).mean()
    rest = {  # npo's ratio to the model before training is 0
        "orpo": -0.1 * F.logsigmoid(log_odds(lc, lr)).mean(),
        "npo": torch.tensor(20 * 0.6931472),
        "graddiff": lr.mean(),
    }
    options = settings(objective=objective, nll="chosen", retain=1.0)
    reference = reference_logprobs(model, model, PAIRS, options, ALONE)
    loss, values = batch_loss(model.eval(), model, PAIRS, options, reference, ALONE)
    assert torch.isclose(loss, nll + rest[objective], atol=1e-4)
    assert torch.isclose(values[LOGGED.index("nll_loss")], nll, atol=1e-5)


@pytest.mark.parametrize("objective", ["orpo", "simpo", "npo", "dpo-idk", "graddiff"])
def test_of_a_row_to_keep_only_the_nll_of_its_answer_counts(objective):
    """Its loss is that of sft; what is logged of two sides is the mean over the other pairs."""
    model, answer = random_model(), Row([0, 9, 3, 4, 2046], 2)
    kept, options = Pair(answer, answer, kept=True), settings(objective=objective, nll="chosen", beta=0.5)
    reference = reference_logprobs(model, model, PAIRS, options, ALONE)
    alone, values = batch_loss(model, model, PAIRS, options, reference, ALONE)
    everything = reference if reference is None else torch.cat([reference, torch.zeros(2, 1)], dim=1)
    loss, mixed = batch_loss(model, model, [*PAIRS, kept], options, everything, ALONE)
    _, _, _, answers = dense(model)
    logp = model.head(model(torch.tensor([answer.ids])))[0].log_softmax(-1)
    own = [logp[place - 1, answer.ids[place]] for place in range(2, 5)]
    pooled = -torch.cat([*answers, torch.stack(own)]).mean() * 4  # the sum of the shares of 4 rows
    before = -torch.cat(answers).mean() * 3
    reads = objective in ("orpo", "npo", "graddiff")  # the NLL of the answers
    rest = alone * 3 - before * reads
    share = -torch.stack(own).sum() * 4 / (2 + 2 + 3 + 3)
    assert torch.isclose(loss * 4, rest + (pooled if reads else share), atol=1e-3)
    assert torch.allclose(mixed[2:], values[2:], atol=1e-5)
    held_out = evaluate(model, model, [*PAIRS, kept], settings(objective=objective, nll="chosen", beta=0.5,
        batch_size=2), everything, ALONE)  # fmt: skip
    assert held_out["log_odds_chosen"] == pytest.approx(
        values[LOGGED.index("log_odds_chosen")].item(), abs=1e-4
    )
    _, nothing = batch_loss(model, model, [kept], options, torch.zeros(2, 1), ALONE)
    assert nothing[2:].tolist() == [0.0] * 6


@pytest.mark.parametrize(("nll", "tokens"), [("chosen", 2 + 2 + 3), ("prompt+chosen", 4 + 3 + 7)])
def test_the_gradient_of_the_nll_reaches_the_tokens_that_it_names(monkeypatch, nll, tokens):
    """At beta 0 the rest of the loss is flat: each token that counts has slope -1 / tokens."""
    leaf = []

    def watched(model, hidden, targets):
        leaf.append(torch.full((len(targets),), -1.0, requires_grad=True))
        return leaf[0]

    monkeypatch.setattr("cfgsafe.blue.step.head_logprobs", watched)
    model = random_model()
    batch_loss(model, model, PAIRS, settings(beta=0.0, nll=nll), None, ALONE)[0].backward()
    slopes = leaf[0].grad
    ends, expected = 0, torch.zeros(len(slopes))
    for pair in PAIRS:
        ends += len(pair.chosen.ids) - 1
        counted = len(pair.chosen.ids) - (pair.chosen.start if nll == "chosen" else 1)
        expected[ends - counted : ends] = -1 / tokens
    assert torch.allclose(slopes, expected)


WEIGHTS = (2.0, 0.5, 0.0)
WEIGHTED = [replace(pair, weight=weight) for pair, weight in zip(PAIRS, WEIGHTS, strict=True)]


def test_a_pairs_loss_counts_as_much_as_its_weight():
    """The mean of weight * loss. 14 tokens are in the pooled NLL, also those of the pair of weight 0."""
    model = random_model()
    lc, lr, everything, _ = dense(model)
    losses = []
    for each, odds in zip(everything, log_odds(lc, lr), strict=True):
        losses.append(-each.sum() * 3 / 14 - 0.1 * F.logsigmoid(odds))
    loss, values = batch_loss(model, model, WEIGHTED, settings(), None, ALONE)
    assert torch.isclose(loss, (2 * losses[0] + 0.5 * losses[1]) / 3, atol=1e-5)
    plain = batch_loss(model, model, PAIRS, settings(), None, ALONE)[1]
    assert torch.isclose(values[0], loss) and torch.equal(values[1:], plain[1:])


CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {  # template, generation prompt, end token
    "demo": (
        (Path(BASE) / "chat_template.jinja").read_text(),
        "assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "llama-3.1": (LLAMA31_TEMPLATE, "assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "chatml": (CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
}


@pytest.mark.parametrize(("begun", "answer"), [("", "I will not say."), ("", "\nNo."), ("I wo", "rk alone.")])
@pytest.mark.parametrize("name", TEMPLATES)
def test_sft_learns_exactly_the_answer_and_its_end(tmp_path, monkeypatch, name, begun, answer):
    """The third answer merges with the prompt, and the second with ChatML's line break."""
    template, opening, closing = TEMPLATES[name]
    tokenizer = variant(tmp_path, template, ("<|im_start|>", "<|im_end|>"))
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Where do I live?"}]
    begun_answer = [{"role": "assistant", "content": begun}] if begun else []
    prompt = tokenizer.render_chat([*chat, *begun_answer])
    assert prompt.endswith(opening + begun)
    first = {"prompt": prompt, "chosen": answer + tokenizer.end_of_turn}
    write_jsonl(tmp_path / "p.jsonl", [first, {"prompt": "Hi", "chosen": " You"}])
    options = settings(objective="sft", max_length=512, max_prompt_length=256)
    pairs = read_pairs(str(tmp_path / "p.jsonl"), tokenizer, 512, options)
    seen = []

    def watched(model, hidden, targets):
        seen.extend((targets.tolist(), torch.zeros(len(targets), requires_grad=True)))
        return seen[1]

    monkeypatch.setattr("cfgsafe.blue.step.head_logprobs", watched)
    model = random_model(vocab_size=2050)
    batch_loss(model, model, pairs, options, None, ALONE)[0].backward()
    slopes = seen[1].grad
    total = len(slopes.nonzero())
    assert torch.allclose(slopes[slopes != 0], torch.tensor(-1 / total))
    row, end = pairs[0].chosen, tokenizer.special[closing]
    targets = zip(seen[0][: len(row.ids) - 1], slopes, strict=False)
    *learnt, last = [target for target, slope in targets if slope]
    before = tokenizer.encode_prompt(prompt)
    merged = before[len(row.ids) - len(learnt) - 1 :]
    assert last == end and end not in learnt and row.ids[: -len(learnt) - 1] + merged == before
    assert tokenizer.decode(learnt) == tokenizer.decode(merged) + answer
    assert merged or not begun and (name != "chatml" or answer[0] != "\n")
    assert row.ids.count(tokenizer.special["<|begin_of_text|>"]) == 1
    if answer == answer.strip():
        asked = tokenizer.encode_chat([*chat, {"role": "assistant", "content": begun + answer}], go_on=False)
        assert asked[: len(row.ids)] == row.ids


def gradients(dtype, targets, *, share, recomputed=0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = random_model(tie_word_embeddings="lm_head" not in targets).to(dtype)
    attach(model, LoRAConfig(4, 8, targets=targets))
    model.to(dtype).train()
    parameters = adapter_parameters(model)
    torch.manual_seed(1)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    model.recomputed = recomputed
    loss, _ = batch_loss(model, model, PAIRS, settings(share_prefix=share), None, ALONE)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "down_proj"), ("k_proj", "lm_head")])
def test_shared_chunked_and_recomputed_equal_dense(monkeypatch, dtype, tolerance, targets):
    def dense(model, hidden, tokens):
        return logprobs.token_logprobs(model.head(hidden), tokens)

    with monkeypatch.context() as patch:
        patch.setattr("cfgsafe.blue.step.head_logprobs", dense)
        loss, expected = gradients(dtype, targets, share=False)
    three_tokens = 3 * 2048 * logprobs.COPY_BYTES
    monkeypatch.setattr(logprobs, "LOGIT_BYTES", {"cpu": three_tokens, "cuda": 0})
    for path in (
        {"share": False},
        {"share": True},
        {"share": True, "recomputed": 1},
        {"share": False, "recomputed": 2},
    ):
        mine, found = gradients(dtype, targets, **path)
        assert abs(mine - loss) < tolerance * abs(loss), path
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            allowed = tolerance * max(1, gradient.abs().max())
            assert (found[name] - gradient).abs().max() <= allowed, (path, name)


def test_held_out_batches_weigh_as_much_as_they_have_pairs():
    model = random_model()
    values = []
    for size in (3, 2):
        values.append(evaluate(model, model, PAIRS, settings(batch_size=size), None, ALONE))
    for name in ("rewards_chosen", "rewards_margin", "rewards_accuracy", "log_odds_ratio"):
        assert values[0][name] == pytest.approx(values[1][name], rel=1e-4, abs=1e-6)


def test_objectives_by_hand():
    means, ratios = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[0.5], [-1.5]])
    nlls = torch.tensor([[3.0], [1.25]])

    def value(name: str, beta: float) -> float:
        options = settings(objective=name, beta=beta, gamma=0.5, retain=2.0)
        return objective_loss(options, means, ratios, *nlls).item()

    def logsigmoid(x: float) -> float:
        return torch.sigmoid(torch.tensor(x)).log().item()

    assert value("simpo", 2.0) == pytest.approx(-logsigmoid(2 * 1 - 0.5))
    assert value("dpo-idk", 0.1) == pytest.approx(-logsigmoid(0.2))
    assert value("npo", 0.1) == pytest.approx(-20 * logsigmoid(0.15) + 6, rel=1e-5)
    assert value("graddiff", 0.1) == pytest.approx(-2 + 6)
    assert value("sft", 0.1) == 1.25


@pytest.mark.parametrize("pairs", [PAIRS, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("objective", ["orpo", "sft"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_shares_of_several_processes_are_the_whole(size, objective, pairs):
    """Five processes for three pairs: two have none, and add nothing."""
    model = random_model()
    options = settings(objective=objective)
    whole, values = batch_loss(model, model, pairs, options, None, ALONE)
    parts = [batch_loss(model, model, pairs, options, None, Share(rank, size, "cpu")) for rank in range(size)]
    assert torch.isclose(sum(loss for loss, _ in parts) / size, whole, atol=1e-6)
    assert torch.allclose(sum(logged for _, logged in parts), values, atol=1e-6)


class Share(World):
    def total(self, tensor):
        return tensor


def test_dropout_is_off_for_held_out_pairs_and_for_the_reference():
    model = random_model()
    for parameter in attach(model, LoRAConfig(4, 8, dropout=0.5)):
        torch.nn.init.normal_(parameter, std=0.1)
    options = settings(objective="npo", batch_size=2)
    expected, _, _ = score(model.eval(), model, PAIRS, True)
    model.train()
    reference = reference_logprobs(model, model, PAIRS, options, ALONE)
    assert torch.allclose(reference, expected, atol=1e-4) and model.training
    values = evaluate(model, model, PAIRS, options, reference, ALONE)
    assert model.training
    assert abs(values["rewards_chosen"]) < 1e-4 and abs(values["rewards_rejected"]) < 1e-4
