"""The Triton kernel, in Triton's interpreter, against the float64 reference; and its compilation for GPUs."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from cfgsafe.kernels import reference
from cfgsafe.kernels.reference import SPACES, Sampling

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


def sampling(pairs: int, seed: int = 0, **fixed) -> Sampling:
    """Random settings for `pairs` pairs, the positive rows first; about a sixth of them is not guided."""
    random = torch.Generator().manual_seed(seed)

    def pick(*values: float) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (pairs,), generator=random)]

    rows = torch.randperm(pairs, generator=random)
    settings = {
        "positive": rows,
        "negative": torch.where(pick(1, 1, 1, 1, 1, 0) == 1, rows + pairs, -1),
        "guidance": pick(0.0, 0.5, 1.0, 1.7, 3.0, 10.0),
        "space": pick(*reversed(range(len(SPACES)))).int(),
        "alpha": pick(0.0, 0.0, 0.1, 0.5),
        "temperature": pick(0.0, 0.7, 1.0),
        "top_k": torch.zeros(pairs, dtype=torch.int32),
        "top_p": torch.ones(pairs),
        "seed": torch.randint(2**62, (pairs,), generator=random),
        "step": torch.randint(1000, (pairs,), generator=random),
        "truncates": False,
    }
    return Sampling(**settings | fixed)


def run(
    logits: torch.Tensor, settings: Sampling, part: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    from cfgsafe.kernels.guidance import next_tokens

    tokens, logprobs = next_tokens(logits.to(DEVICE), on_device(settings), part)
    return tokens.cpu(), logprobs.cpu()


def on_device(settings: Sampling) -> Sampling:
    values = dict(vars(settings))
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            values[name] = value.to(DEVICE)
    return Sampling(**values)


def assert_equals_reference(logits: torch.Tensor, settings: Sampling, part: int | None = None) -> None:
    """The same log-probability of the token, and the same token.

    Another token is right only if the scores of both lie closer than float32 can tell.
    """
    tokens, logprobs = run(logits, settings, part)
    wanted, _ = reference.next_tokens(logits.double(), settings)
    everything = reference.guided_logprobs(logits.double(), settings)
    expected = everything.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), expected, atol=2e-3, rtol=1e-4, equal_nan=True)
    noise = reference.gumbel(settings.seed, settings.step, logits.shape[1])
    for row in (tokens != wanted).nonzero()[:, 0].tolist():
        scores = everything[row]
        if settings.temperature[row] > 0:
            scores = scores / settings.temperature[row].item() + noise[row]
        assert abs(scores[tokens[row]] - scores[wanted[row]]) < 1e-3, (row, tokens[row], wanted[row])


def random_logits(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def sizes() -> list:
    """Vocabulary, pairs and dtype; the large ones are slow."""
    found = []
    for vocabulary, pairs in product((7, 1000, 32000, 128256, 151936), (1, 3, 64)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            fast = vocabulary * pairs <= 100_000 or (pairs, dtype) == (3, torch.bfloat16)
            found.append(pytest.param(vocabulary, pairs, dtype, marks=[] if fast else [pytest.mark.slow]))
    return found


@pytest.mark.parametrize(("vocabulary", "pairs", "dtype"), sizes())
def test_equals_the_reference(vocabulary, pairs, dtype):
    """The largest cases in larger parts, because the interpreter is slow; the others in those of a GPU."""
    logits = random_logits(2 * pairs, vocabulary, vocabulary + pairs).to(dtype)
    large = pairs == 64 and vocabulary > 1000 and DEVICE == "cpu"
    assert_equals_reference(logits, sampling(pairs, seed=pairs), 32768 if large else None)


@pytest.mark.parametrize("space", SPACES)
def test_every_space_equals_the_reference(space):
    """A space that the kernel does not know gives NaN and fails here."""
    number = torch.full((16,), SPACES.index(space), dtype=torch.int32)
    assert_equals_reference(random_logits(32, 500, 5), sampling(16, seed=5, space=number))


@pytest.mark.parametrize("layout", ["columns of a wider tensor", "transposed", "every second"])
def test_strides(layout):
    noise = random_logits(12, 6000, 1)
    logits = {
        "columns of a wider tensor": noise[:, 100:3100],
        "transposed": noise[:, :3000].T.contiguous().T,
        "every second": noise[:, ::2],
    }[layout]
    assert not logits.is_contiguous()
    assert_equals_reference(logits, sampling(6))


@pytest.mark.parametrize(
    ("k", "p"), [(1, 1.0), (5, 1.0), (0, 0.5), (0, 0.9), (40, 0.8), (1500, 1.0), (0, 0.0)]
)
def test_top_k_and_top_p(k, p):
    logits = random_logits(8, 1500, 2)
    top_k, top_p = torch.full((4,), k, dtype=torch.int32), torch.full((4,), p)
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.3])
    settings = sampling(4, top_k=top_k, top_p=top_p, temperature=temperature, truncates=True)
    for step in range(2):
        settings = replace(settings, step=torch.full((4,), step))
        ours, _ = run(logits, settings, 512)
        theirs, _ = reference.next_tokens(logits.double(), settings)
        assert torch.equal(ours, theirs)


def test_ties_at_the_border_of_top_k_all_stay():
    logits = torch.tensor([[0.0, 3.0, 1.0, 1.0, 1.0, -2.0]]).repeat(24, 1)
    settings = sampling(
        24,
        positive=torch.arange(24),
        negative=torch.full((24,), -1),
        alpha=torch.zeros(24),
        temperature=torch.full((24,), 5.0),
        top_k=torch.full((24,), 2, dtype=torch.int32),
        truncates=True,
    )
    tokens, _ = run(logits, settings)
    assert set(tokens.tolist()) == {1, 2, 3, 4}
    assert torch.equal(tokens, reference.next_tokens(logits, settings)[0])


CASES = {
    "-inf": ([0.0, -INF, 1.0], [-INF, 0.0, 1.0]),
    "both -inf": ([0.0, -INF, 1.0], [0.0, -INF, 5.0]),
    "negative all -inf": ([0.0, 2.0, 1.0], [-INF, -INF, -INF]),
    "positive all -inf": ([-INF, -INF, -INF], [0.0, 2.0, 1.0]),
    "ties: the lowest": ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]),
    "nothing plausible is left": ([3.0, 0.0, 0.0], [9.0, 0.0, 0.0]),
}


def pair(**changes) -> Sampling:
    """One request whose rows of logits are 0 and 1."""
    plain = {"positive": 0, "negative": 1, "alpha": 0.0, "top_k": 0, "top_p": 1.0, "seed": 3, "step": 0}
    types = {"space": torch.int32, "top_k": torch.int32}
    values = {}
    for name, value in (plain | changes).items():
        values[name] = torch.tensor([value], dtype=types.get(name))
    return Sampling(**values, truncates=values["top_k"].item() > 0 or values["top_p"].item() < 1)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_defined_cases(case, temperature, space):
    logits = torch.tensor(CASES[case])
    alpha = 0.9 if case == "nothing plausible is left" else 0.0
    for g in (0.0, 1.0, 3.0, 10.0):
        settings = pair(guidance=g, temperature=temperature, space=SPACES.index(space), alpha=alpha)
        tokens, logprobs = run(logits, settings)
        wanted, expected = reference.next_tokens(logits.double(), settings)
        assert torch.equal(tokens, wanted), g
        assert torch.allclose(logprobs.double(), expected, atol=1e-4, equal_nan=True), g
        if case == "positive all -inf":
            assert tokens.item() == reference.IMPOSSIBLE and logprobs.isnan()
        elif case == "nothing plausible is left" and space == "prob" and g == 10:
            assert tokens.item() == 0 and logprobs.item() == 0
        elif case.startswith("ties") and temperature == 0:
            assert tokens.item() == 0


@pytest.mark.parametrize(
    "sampled", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}]
)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("number", [float("nan"), INF])
def test_a_number_that_is_not_finite_in_either_row_gives_no_token(number, space, alpha, sampled):
    """In the first part of the vocabulary or the last one, in one row or in both."""
    fixed = {"temperature": 0.0, "guidance": 3.0, "space": SPACES.index(space), "alpha": alpha}
    settings = pair(**fixed | sampled)
    for rows, at in (([0], 0), ([1], 99), ([0, 1], 50)):
        logits = random_logits(2, 100, 6)
        logits[rows, at] = number
        for found, logprob in (run(logits, settings, 64), reference.next_tokens(logits, settings)):
            assert found.item() == reference.NOT_FINITE and logprob.isnan(), rows


def test_only_the_request_with_such_a_number_has_no_token():
    logits, settings = random_logits(40, 300, 7), sampling(20, seed=7)
    tokens, logprobs = run(logits, settings)
    broken = logits.clone()
    broken[[settings.positive[4], settings.positive[9]], 17] = torch.tensor([float("nan"), INF])
    for found, logprob in (run(broken, settings), reference.next_tokens(broken, settings)):
        assert found[[4, 9]].tolist() == [reference.NOT_FINITE] * 2 and logprob[[4, 9]].isnan().all()
        others = [row for row in range(20) if row not in (4, 9)]
        assert torch.equal(found[others], tokens[others])
        assert torch.allclose(logprob[others], logprobs[others], atol=1e-4)


def test_a_row_does_not_depend_on_the_batch():
    logits = random_logits(40, 5000, 3)
    settings = sampling(20, seed=4)
    tokens, logprobs = run(logits, settings)
    for row in range(20):
        alone = dict(vars(settings))
        for name, value in alone.items():
            if isinstance(value, torch.Tensor):
                alone[name] = value[row : row + 1]
        token, logprob = run(logits, Sampling(**alone))
        assert token == tokens[row] and torch.equal(logprob, logprobs[row : row + 1])


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_compiles_without_spills(capability):
    """Ahead of time, without a GPU; in a process of its own, because the interpreter is chosen at import."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "cfgsafe.kernels.aot", str(capability)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 6 and all("spills 0 bytes" in line for line in lines)
