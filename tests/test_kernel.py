"""The Triton kernel in Triton's interpreter against the float64 reference, and its compilation for GPUs that are not here."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cfgsafe.kernels import reference
from cfgsafe.kernels.reference import Sampling

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


def sampling(pairs: int, seed: int = 0, **fixed) -> Sampling:
    """Random settings for `pairs` pairs, the positive rows first; about a sixth of them is not guided."""
    random = torch.Generator().manual_seed(seed)
    pick = lambda *values: torch.tensor(values)[torch.randint(len(values), (pairs,), generator=random)]
    rows = torch.randperm(pairs, generator=random)
    settings = {
        "positive": rows,
        "negative": torch.where(pick(1, 1, 1, 1, 1, 0) == 1, rows + pairs, -1),
        "guidance": pick(0.0, 0.5, 1.0, 1.7, 3.0, 10.0),
        "space": pick(1, 0).int(),
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
    """The same tokens, but where the two best scores lie closer than float32 can tell; and the same log-probability of the token."""
    tokens, logprobs = run(logits, settings, part)
    wanted, _ = reference.next_tokens(logits.double(), settings)
    positive = logits.double()[settings.positive]
    negative = torch.where(
        (settings.negative >= 0)[:, None], logits.double()[settings.negative.clamp(min=0)], positive
    )
    everything = reference.guide(
        positive,
        negative,
        settings.guidance,
        torch.where(settings.negative >= 0, settings.space, 0),
        settings.alpha,
    )
    expected = everything.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), expected, atol=2e-3, rtol=1e-4, equal_nan=True)
    for row in (tokens != wanted).nonzero()[:, 0].tolist():
        heat = settings.temperature[row].item() or 1.0
        scores = everything[row] / heat
        if settings.temperature[row] > 0:
            scores = (
                scores
                + reference.gumbel(
                    settings.seed[row : row + 1], settings.step[row : row + 1], logits.shape[1]
                )[0]
            )
        assert abs(scores[tokens[row]] - scores[wanted[row]]) < 1e-3, (row, tokens[row], wanted[row])


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [
    (vocabulary, pairs, dtype)
    for vocabulary in (7, 1000, 32000, 128256, 151936)
    for pairs in (1, 3, 64)
    for dtype in DTYPES
]
FAST = [case for case in SIZES if case[0] * case[1] <= 100_000 or case[1:] == (3, torch.bfloat16)]


@pytest.mark.parametrize(
    ("vocabulary", "pairs", "dtype"),
    [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in SIZES],
)
def test_equals_the_reference(vocabulary, pairs, dtype):
    """The larger cases in larger parts, for the interpreter's sake; one and three pairs in those of the GPU."""
    logits = (
        3 * torch.randn(2 * pairs, vocabulary, generator=torch.Generator().manual_seed(vocabulary + pairs))
    ).to(dtype)
    assert_equals_reference(
        logits,
        sampling(pairs, seed=pairs),
        32768 if pairs == 64 and vocabulary > 1000 and DEVICE == "cpu" else None,
    )


@pytest.mark.parametrize("layout", ["columns of a wider tensor", "transposed", "every second"])
def test_strides(layout):
    noise = 3 * torch.randn(12, 6000, generator=torch.Generator().manual_seed(1))
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
    logits = 3 * torch.randn(8, 1500, generator=torch.Generator().manual_seed(2))
    settings = sampling(
        4, top_k=torch.full((4,), k, dtype=torch.int32), top_p=torch.full((4,), p), truncates=True
    )
    for step in range(2):
        settings = replace(
            settings, step=torch.full((4,), step), temperature=torch.tensor([0.0, 0.7, 1.0, 1.3])
        )
        ours, (theirs, _) = run(logits, settings, 512)[0], reference.next_tokens(logits.double(), settings)
        assert torch.equal(ours, theirs)


def test_ties_at_the_border_of_top_k_all_stay():
    logits = torch.tensor([[0.0, 3.0, 1.0, 1.0, 1.0, -2.0]]).repeat(24, 1)
    settings = sampling(
        24, negative=torch.full((24,), -1), alpha=torch.zeros(24), temperature=torch.full((24,), 5.0)
    )
    settings = replace(
        settings, positive=torch.arange(24), top_k=torch.full((24,), 2, dtype=torch.int32), truncates=True
    )
    tokens, _ = run(logits, settings)
    assert set(tokens.tolist()) == {1, 2, 3, 4} and torch.equal(
        tokens, reference.next_tokens(logits, settings)[0]
    )


CASES = {
    "NaN is never chosen": ([float("nan"), 0.0, 1.0], [0.0, 1.0, float("nan")]),
    "+inf": ([0.0, INF, 1.0], [0.0, 0.0, 0.0]),
    "two of +inf: the first": ([0.0, INF, INF], [1.0, 0.0, 0.0]),
    "-inf": ([0.0, -INF, 1.0], [-INF, 0.0, 1.0]),
    "both -inf": ([0.0, -INF, 1.0], [0.0, -INF, 5.0]),
    "negative all -inf": ([0.0, 2.0, 1.0], [-INF, -INF, -INF]),
    "positive all -inf": ([-INF, -INF, -INF], [0.0, 2.0, 1.0]),
    "all NaN": ([float("nan")] * 3, [float("nan")] * 3),
    "ties: the lowest": ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]),
    "nothing plausible is left": ([3.0, 0.0, 0.0], [9.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("log_space", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_defined_cases(case, temperature, log_space):
    logits = torch.tensor(CASES[case])
    for g in (0.0, 1.0, 3.0, 10.0):
        settings = sampling(
            1,
            positive=torch.tensor([0]),
            negative=torch.tensor([1]),
            guidance=torch.tensor([g]),
            temperature=torch.tensor([temperature]),
            space=torch.tensor([int(log_space)]),
            alpha=torch.tensor([0.9 if case == "nothing plausible is left" else 0.0]),
        )
        tokens, logprobs = run(logits, settings)
        wanted, expected = reference.next_tokens(logits.double(), settings)
        assert torch.equal(tokens, wanted), g
        assert torch.allclose(logprobs.double(), expected, atol=1e-3, equal_nan=True), g
        if "all -inf" in case and case.startswith("positive") or case == "all NaN":
            assert tokens.item() == -1 and logprobs.isnan().all()
        elif case == "nothing plausible is left" and g > 1 and not log_space:
            assert tokens.item() == 0 and logprobs.item() == 0
        elif case == "NaN is never chosen":
            assert tokens.item() != 0
        elif case.startswith("ties") and temperature == 0:
            assert tokens.item() == 0


def test_a_row_does_not_depend_on_the_batch():
    logits = 3 * torch.randn(40, 5000, generator=torch.Generator().manual_seed(3))
    settings = sampling(20, seed=4)
    tokens, logprobs = run(logits, settings)
    for row in range(20):
        alone = {
            name: value[row : row + 1]
            for name, value in vars(settings).items()
            if isinstance(value, torch.Tensor)
        }
        token, logprob = run(logits, Sampling(**alone, truncates=False))
        assert token == tokens[row] and torch.equal(logprob, logprobs[row : row + 1])


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_compiles_without_spills(capability):
    """Ahead of time, with no GPU: in a process of its own, because the interpreter's switch is read at import."""
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
