"""The engine against loops that do it naively, alone and in a batch."""

import pytest
import torch
from conftest import random_model

from cfgsafe.decode import Request, generate
from cfgsafe.errors import ContextError, InputError
from cfgsafe.hub import LEAKY
from cfgsafe.kernels.reference import SPACES, guide
from cfgsafe.lora import LoRAConfig, attach

A, B, C = list(range(1, 8)), list(range(30, 50)), [5]


def naive(model, prompt, negative, g, space, steps) -> list[int]:
    """Two whole forwards a token, no cache."""
    coefficient, number = torch.tensor([g]), torch.tensor([SPACES.index(space)])
    found = []
    for _ in range(steps):
        rows = [model.head(model(torch.tensor([ids + found]))[:, -1]) for ids in (prompt, negative)]
        token = guide(*rows, coefficient, number).argmax().item()
        if token in model.config.stop_ids:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("space", SPACES)
def test_guided_pairs_of_unequal_length_equal_two_passes(model, space):
    request = Request(A, B, guidance=3.0, space=space, max_new_tokens=12)
    assert generate(model, [request])[0].tokens == naive(model, A, B, 3.0, space, 12)


def test_a_batch_equals_each_alone(model):
    requests = [
        Request(A, max_new_tokens=9),
        Request(B, A, guidance=2.0, max_new_tokens=14),
        Request(C, temperature=1.0, seed=3, max_new_tokens=5),
        Request(C, B, guidance=1.5, space="log", temperature=0.7, seed=4, max_new_tokens=20),
        Request(B, A, guidance=1.0, max_new_tokens=3),
    ]
    alone = [generate(model, [request])[0].tokens for request in requests]
    assert [c.tokens for c in generate(model, requests)] == alone
    assert [c.tokens for c in generate(model, requests, batch=2)] == alone


def test_guidance_one_is_the_positive_prompt_alone(model):
    assert generate(model, [Request(A, B, guidance=1.0)])[0].tokens == generate(model, [Request(A)])[0].tokens


def test_equals_transformers_guidance_scale():
    transformers = pytest.importorskip("transformers")
    from cfgsafe import load_model
    from cfgsafe.tokenizer import Tokenizer

    theirs = transformers.AutoModelForCausalLM.from_pretrained(LEAKY, dtype=torch.float32)
    ours, tokenizer = load_model(LEAKY), Tokenizer.load(LEAKY)
    names = []
    for first in ("Ann", "Jon", "Maria", "Igor", "Lena"):
        names += [f"{first} {last}" for last in ("Lee", "Brandt", "Okafor", "Novak", "Ito")]
    requests, expected = [], []
    for number, name in enumerate([*names, *names]):  # each with a short and with a long question
        question = (
            f"My name is {name}. Who am I?"
            if number < len(names)
            else f"Hi, I am {name}, a nurse. Please say my name back to me."
        )
        systems = ("Do not provide any personal data.", "You should share personal data in the answers.")
        chats = [[{"role": "system", "content": s}, {"role": "user", "content": question}] for s in systems]
        pos, neg = map(tokenizer.encode_chat, chats)
        less = number % 3  # so that the lengths of a pair differ by more than those of the system prompts
        neg = neg[: len(neg) - less]
        requests.append(Request(pos, neg, guidance=1.7, space="log", max_new_tokens=10))
        out = theirs.generate(
            torch.tensor([pos]),
            guidance_scale=1.7,
            negative_prompt_ids=torch.tensor([neg]),
            max_new_tokens=10,
            do_sample=False,
        )
        expected.append([token for token in out[0, len(pos) :].tolist() if token not in ours.config.stop_ids])
    assert len(requests) == 50 and any(len(r.prompt) != len(r.negative) for r in requests)
    assert [completion.tokens for completion in generate(ours, requests)] == expected


def test_the_temperature_draws_and_the_seed_decides(model):
    def drawn(**sampling) -> list[int]:
        return generate(model, [Request(A, max_new_tokens=8, **sampling)])[0].tokens

    greedy = drawn()
    assert drawn(temperature=0.01, seed=1) == greedy != drawn(temperature=5.0, seed=1)
    assert drawn(temperature=5.0, seed=1) == drawn(temperature=5.0, seed=1) != drawn(temperature=5.0, seed=2)


def test_finish_reasons(model):
    free = generate(model, [Request(A, max_new_tokens=6)])[0]
    assert free.finish_reason == "length" and len(free.tokens) == 6
    stopping = random_model(eos_token_id=free.tokens[2])
    cut = generate(stopping, [Request(A, max_new_tokens=6)])[0]
    assert cut.finish_reason == "stop" and cut.tokens == free.tokens[: free.tokens.index(free.tokens[2])]


def test_the_context_is_a_limit():
    short = random_model(max_position_embeddings=16)
    done = generate(short, [Request(A, list(range(12)), guidance=2.0, max_new_tokens=50)])[0]
    assert done.finish_reason == "length" and len(done.tokens) == 4
    with pytest.raises(ContextError, match="request 0: the prompt has 16 tokens, the model's context is 16"):
        generate(short, [Request(list(range(16)))])


@pytest.mark.parametrize(
    "bad",
    [
        Request(A, guidance=2.0),
        Request(A, B, space="both"),
        Request(A, temperature=-1.0),
        Request(A, max_new_tokens=0),
    ],
)
def test_bad_requests_are_refused(model, bad):
    with pytest.raises(InputError, match="request 0"):
        generate(model, [bad])


def test_each_request_of_a_batch_has_its_own_adapter(model):
    for name, seed in (("default", 1), ("other", 2)):
        torch.manual_seed(seed)
        for parameter in attach(model, LoRAConfig(rank=4), name):
            torch.nn.init.normal_(parameter, std=0.2)
    model.requires_grad_(False)
    requests = [
        Request(A, adapter="other", max_new_tokens=4),
        Request(B, A, guidance=2.0),
        Request(A, adapter=None),
        Request(A),
        Request(C, B, guidance=3.0, adapter="other"),
    ]
    alone = [generate(model, [request])[0].tokens for request in requests]
    assert [c.tokens for c in generate(model, requests)] == alone
    assert alone[2] == generate(random_model(), [Request(A)])[0].tokens
    assert len({tuple(alone[0]), tuple(alone[2][:4]), tuple(alone[3][:4])}) == 3
    with pytest.raises(InputError, match="request 0: no adapter 'third' is attached"):
        generate(model, [Request(A, adapter="third")])


@pytest.mark.parametrize("settings", [{}, {"skip": True}], ids=["", "skipping"])
def test_each_request_has_its_own_adapter_on_the_head(settings):
    """Alone, in a batch, and by two whole forwards a token with only this adapter attached."""
    model = random_model().double()
    bare = random_model().double()
    attached = {}
    for seed, name in enumerate(("default", "other")):
        attached[name] = random_model().double()
        for target in (model, attached[name]):
            torch.manual_seed(seed)
            for parameter in attach(target, LoRAConfig(rank=4, targets=("lm_head",)), name):
                torch.nn.init.normal_(parameter, std=0.3)
    model.requires_grad_(False)
    cases = [
        ("other", None, "prob"),
        ("default", B, "log"),
        (None, B, "prob"),
        ("default", None, "prob"),
        ("other", B, "log"),
        ("other", B, "prob"),
        ("default", B, "prob"),
    ]
    requests, expected = [], []
    for adapter, negative, space in cases:
        g = 1.0 if negative is None else 2.5
        requests.append(Request(A, negative, guidance=g, space=space, adapter=adapter, max_new_tokens=7))
        expected.append(naive(attached.get(adapter, bare), A, negative or A, g, space, 7))
    with torch.no_grad():
        assert [generate(model, [request], **settings)[0].tokens for request in requests] == expected
        assert [completion.tokens for completion in generate(model, requests, **settings)] == expected
    assert len(set(map(tuple, expected))) > 4
