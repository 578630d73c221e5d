"""Head and choice in one kernel, in Triton's interpreter, against the reference on the head's logits."""

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import random_model

from cfgsafe import guidance
from cfgsafe.kernels import reference
from cfgsafe.kernels.reference import IMPOSSIBLE, NOT_FINITE, Sampling
from cfgsafe.lora import LoRAConfig, attach, set_adapters

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from cfgsafe.kernels import head  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = {"greedy": [0.0], "drawn": [1.0], "both": [0.0, 0.7, 3.0]}


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch):
    """Triton's interpreter holds bfloat16 as its bits: it multiplies these, and cuts where a GPU rounds."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    dot, truncate = interpreter_builder.create_dot, interpreter_builder.create_fp_trunc

    def widen(handle):
        is_bfloat16 = handle.dtype.scalar == tl.bfloat16
        return interpreter_builder.create_fp_ext(handle, tl.float32) if is_bfloat16 else handle

    def rounding(handle, dtype):
        if dtype.scalar != tl.bfloat16:
            return truncate(handle, dtype)
        bits = torch.from_numpy(handle.data).bfloat16().view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    monkeypatch.setattr(interpreter_builder, "create_dot", lambda a, b, *more: dot(widen(a), widen(b), *more))
    monkeypatch.setattr(interpreter_builder, "create_fp_trunc", rounding)


def sampling(rows: int, temperatures: list[float], seed: int = 0) -> Sampling:
    """Requests of hidden rows in another order, each with a seed and step of its own."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=random)
    settings = Sampling.uniform(order.to(DEVICE), torch.full_like(order, -1).to(DEVICE), 1.0, "log", 0.0)
    cycle = [temperatures[number % len(temperatures)] for number in range(rows)]
    return replace(
        settings,
        temperature=torch.tensor(cycle, device=DEVICE),
        seed=torch.randint(2**62, (rows,), generator=random).to(DEVICE),
        step=torch.randint(1000, (rows,), generator=random).to(DEVICE),
        draws=max(cycle) > 0,
        guides=False,
    )


def operands(rows: int, V: int, C: int, dtype=torch.float32, seed: int = 0):
    """Small whole numbers: their products are the same in any order of the sum, also as bfloat16."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (rows, C), generator=random)
    weight = torch.randint(-2, 3, (V, C), generator=random)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def agree(hidden: torch.Tensor, weight: torch.Tensor, settings: Sampling) -> None:
    tokens, logprobs = head.next_tokens(hidden, weight, settings)
    wanted, wanted_logprobs = reference.next_tokens(hidden @ weight.T, settings)
    assert tokens.tolist() == wanted.tolist()
    torch.testing.assert_close(logprobs, wanted_logprobs.float(), atol=2e-5, rtol=2e-5, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "V", "C"), [(1, 300, 64), (2, 257, 33), (5, 1000, 100), (16, 128, 96)])
def test_equals_the_reference_on_the_logits_of_the_head(rows, V, C, dtype, mode):
    agree(*operands(rows, V, C, dtype, seed=rows), sampling(rows, MODES[mode], seed=V))


def test_takes_any_strides():
    hidden, weight = operands(6, 200, 80)
    transposed = weight.T.contiguous().T
    assert transposed.stride() != weight.stride()
    agree(hidden[::2, ::2], transposed[:, ::2], sampling(3, MODES["both"]))


def test_equal_logits_give_the_first_token_and_the_last_token_can_win():
    hidden, weight = operands(1, 385, 32)
    hidden.fill_(1)
    weight.zero_()
    greedy = sampling(1, [0.0])
    assert head.next_tokens(hidden, weight, greedy)[0].item() == 0
    weight[-1] = 1
    token, logprob = head.next_tokens(hidden, weight, greedy)
    assert token.item() == 384 and logprob.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.float32, [1, 1]), (torch.float16, [1, 0]), (torch.bfloat16, [0, 0])]
)
def test_logits_are_rounded_as_those_of_the_head_are(dtype, wanted):
    """257 is 256 in bfloat16, and 2049 is 2048 in both: the first token wins."""
    hidden = torch.tensor([[256.0, 1.0], [2048.0, 1.0]], device=DEVICE, dtype=dtype)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=DEVICE, dtype=dtype)
    settings = replace(sampling(2, [0.0]), positive=torch.arange(2, device=DEVICE))
    assert head.next_tokens(hidden, weight, settings)[0].tolist() == wanted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_not_finite(temperature):
    hidden, weight = torch.ones(4, 32, device=DEVICE), torch.zeros(300, 32, device=DEVICE)
    hidden[0, 3] = float("nan")
    hidden[1, 3] = INF  # times a weight of 0: NaN
    settings = replace(sampling(4, [temperature]), positive=torch.arange(4, device=DEVICE))
    tokens, logprobs = head.next_tokens(hidden, weight, settings)
    assert tokens[:2].tolist() == [NOT_FINITE] * 2 and logprobs[:2].isnan().all()
    assert (tokens[2:] >= 0).all() and logprobs[2:].isfinite().all()
    weight.fill_(-INF)
    tokens, _ = head.next_tokens(torch.ones_like(hidden), weight, settings)
    assert tokens.tolist() == [IMPOSSIBLE] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_can_be_left_or_spoil_the_row(dtype, temperature):
    """In the first, a middle or the last part; all other logits are -inf, or ordinary."""
    hidden, settings = torch.ones(1, 16, device=DEVICE, dtype=dtype), sampling(1, [temperature])
    for token in (0, 130, 299):
        for others, value, wanted in (
            (-INF, 0.0, token),
            (0.0, float("nan"), NOT_FINITE),
            (0.0, INF, NOT_FINITE),
            (-INF, float("nan"), NOT_FINITE),
        ):
            weight = torch.zeros(300, 16, device=DEVICE, dtype=dtype)
            weight[:, 0] = others
            weight[token, 0] = value
            found, logprob = head.next_tokens(hidden, weight, settings)
            assert found.item() == wanted
            assert logprob.isnan() if wanted == NOT_FINITE else logprob.item() == 0


def test_half_precision_overflows_as_the_heads_does():
    hidden = torch.tensor([[200.0], [-200.0]], device=DEVICE, dtype=torch.float16)
    weight = torch.tensor([[1.0], [2.0], [400.0]], device=DEVICE, dtype=torch.float16)
    settings = replace(sampling(2, [0.0]), positive=torch.arange(2, device=DEVICE))
    tokens, _ = head.next_tokens(hidden, weight, settings)
    assert tokens.tolist() == [NOT_FINITE, 0]  # inf, and -inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(16, 48, device=DEVICE).to(dtype)
    weight = torch.randn(300, 48, device=DEVICE).to(dtype)
    settings = sampling(16, MODES["both"])
    tokens, logprobs = head.next_tokens(hidden, weight, settings)
    for number in (0, 7, 15):
        alone = {}
        for name, value in vars(settings).items():
            alone[name] = value[number : number + 1] if isinstance(value, torch.Tensor) else value
        token, logprob = head.next_tokens(hidden, weight, Sampling(**alone))
        assert token.item() == tokens[number].item()
        assert torch.equal(logprob[0], logprobs[number])


def test_reads_the_weight_once_and_writes_no_logits(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("the interpreter counts")
    from triton.runtime.interpreter import interpreter_builder

    hidden, weight = operands(3, 1000, 70)
    first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    moved: Counter[str] = Counter()
    load, store = type(interpreter_builder).create_masked_load, type(interpreter_builder).create_masked_store

    def loading(self, ptrs, mask, *more):
        inside = (ptrs.data >= first) & (ptrs.data < last)
        moved["weight read"] += int((inside & mask.data).sum())
        return load(self, ptrs, mask, *more)

    def storing(self, ptrs, value, mask, *more):
        moved["written"] += int(mask.data.sum())
        return store(self, ptrs, value, mask, *more)

    monkeypatch.setattr(type(interpreter_builder), "create_masked_load", loading)
    monkeypatch.setattr(type(interpreter_builder), "create_masked_store", storing)
    head.next_tokens(hidden, weight, sampling(3, MODES["both"]))
    parts = -(-1000 // head.BLOCK_V)
    assert moved["weight read"] == weight.numel()
    # Of each row: eight floats of each part's record, then its token and log-probability.
    assert moved["written"] == 3 * (parts * 8 + 2)


def test_serves_a_few_rows_without_pairs_masks_and_bounds():
    hidden, weight = operands(17, 128, 32)
    assert head.fits(hidden, weight, sampling(16, [1.0]))
    assert not head.fits(hidden, weight, sampling(17, [1.0]))
    for flag in ("guides", "masks", "truncates"):
        assert not head.fits(hidden, weight, replace(sampling(2, [1.0]), **{flag: True}))
    assert not head.fits(hidden.bfloat16(), weight, sampling(2, [1.0]))
    assert not head.fits(hidden.double(), weight.double(), sampling(2, [1.0]))


def test_the_faster_way_is_taken_and_timed_once(monkeypatch):
    monkeypatch.setattr(guidance, "FASTEST", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked = []

    def seconds(way):
        asked.append(way)
        return {"two": 2.0, "one": 1.0}[way()]

    ways = [lambda: "two", lambda: "one"]
    for _ in range(2):
        assert guidance.fastest(("a",), ways, seconds)() == "one"
    assert asked == ways
    assert guidance.fastest(("b",), ways[::-1], seconds)() == "one"


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(guidance, "FASTEST", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ways = [lambda: "two", lambda: "one"]
    assert guidance.fastest(("a",), ways, seconds=None)() == "two"
    assert guidance.FASTEST == {}


@pytest.mark.skipif(DEVICE == "cuda", reason="stands for a GPU")
def test_a_gpu_chooses_between_two_ways_to_the_same_tokens(monkeypatch):
    model = random_model(vocab_size=300)
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    settings, offered = sampling(4, MODES["both"]), []

    def fastest(key, ways):
        offered.append((key, len(ways)))
        return ways[len(offered) - 1]

    monkeypatch.setattr(guidance, "fastest", fastest)
    guidance.head_tokens(model, hidden, settings)
    assert offered == []  # on a CPU there is nothing to choose
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    two_steps, one_kernel = (guidance.head_tokens(model, hidden, settings) for _ in range(2))
    assert offered == [((hidden.device, torch.float32, 300, 4, 32), 2)] * 2
    assert torch.equal(two_steps[0], one_kernel[0])
    torch.testing.assert_close(two_steps[1], one_kernel[1], atol=2e-5, rtol=2e-5)
    guidance.head_tokens(model, hidden, replace(settings, masks=True))
    assert len(offered) == 2


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_engine_times_both_ways():
    from cfgsafe.decode import Request, generate

    model = random_model().cuda()
    request = Request([5, 6], [7], guidance=2.0, space="log", max_new_tokens=12)
    generate(model, [request] * 3)
    assert guidance.FASTEST[(model.device, torch.float32, 2048, 3, 32)] in (0, 1)


def test_only_a_head_that_is_a_product_alone_has_one_kernel():
    model = random_model().to(DEVICE)
    hidden, settings = torch.randn(2, 32, device=DEVICE), sampling(2, [1.0])
    weight = model.lm_head.weight
    tokens, _ = guidance.in_one_kernel(model, hidden, settings)()
    assert tokens.tolist() == reference.next_tokens(hidden @ weight.T, settings)[0].tolist()
    attach(model, LoRAConfig(rank=2, targets=("lm_head",)))
    assert guidance.in_one_kernel(model, hidden, settings) is None
    set_adapters(model, [None, None])
    assert guidance.in_one_kernel(model, hidden, settings) is not None
    set_adapters(model, ["default", None])
    assert guidance.in_one_kernel(model, hidden, settings) is None
