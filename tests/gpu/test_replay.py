"""What C++ repeats of the ops on a GPU: the bits, the streams and the graphs of what Python launches."""

import pytest
import torch

pytest.importorskip("triton")

from quartet.cli.selftest.ops import provided  # noqa: E402
from quartet.lowering.ir.ops import fused  # noqa: E402
from quartet.runtime.devices import Target  # noqa: E402
from quartet.runtime.replay.library import LAUNCHER  # noqa: E402
from quartet.runtime.slots.weights import REUSED  # noqa: E402

pytestmark = pytest.mark.gpu
SPEC, STOCHASTIC = "e2m1/32 e8m0 quest(rms,nearest) nearest mask", "e2m1/32 e8m0 headroom stochastic"


def same(got, wanted):
    got, wanted = (made if isinstance(made, (tuple, list)) else (made,) for made in (got, wanted))
    for g, w in zip(got, wanted, strict=True):
        assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride())
        assert torch.equal(g.contiguous().view(torch.uint8), w.contiguous().view(torch.uint8))


def changed(argument):
    """Other data of the same signature."""
    if isinstance(argument, list):
        return list(map(changed, argument))
    if isinstance(argument, torch.Tensor) and argument.dim() == 2:
        return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype,
                                   device=argument.device).copy_(argument.flip(0))
    return argument


def test_every_replayed_provider_gives_its_own_bits(device):
    tried = set()
    for op, provider, arguments, declined in provided(device):
        if declined is None and provider.replayed:
            name = f"{op.name}.{provider.name}"
            others = tuple(map(changed, arguments))
            calls = [(op.overload_of(provider), name)]
            if provider == op.choose(Target.of(device))[0]:
                calls.append((op.overload, op.name))
            for overload, called in calls:
                for _ in range(3):  # Python runs the first that is counted, and C++ records the second
                    same(overload(*arguments), provider.run(*arguments))
                before = LAUNCHER.counts(called)
                for given in (arguments, others, arguments):
                    same(overload(*given), provider.run(*given))
                after = LAUNCHER.counts(called)
                assert (after.replays - before.replays, after.unplanned - before.unplanned) == (3, 0), called
            tried.add(name)
    assert {"signs.triton", "cuda_quantize.triton", "cuda_quantize_both.triton", "cuda_requantize.triton",
            "cuda_fold.triton", "dequantize_operand.triton", "unrotate.triton", "cuda_rotate.triton"} <= tried


@pytest.fixture
def work(device):
    """Two ops over new data, with their results."""
    signs, seed = torch.ones(32, device=device), torch.tensor(5, device=device)

    def run(x):
        codes, scales, mask, *_ = fused.QUANTIZE(x, 32, signs, SPEC, None, 3, None, True, False)
        both = fused.QUANTIZE_BOTH(x, 32, signs, STOCHASTIC, seed, 4, None, 32, signs, STOCHASTIC, seed, 5, None)
        return codes, scales, mask, *fused.FOLD(codes, scales, SPEC), *both

    x = torch.randn(128, 512, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        wanted = run(x)
    return run, x, wanted


def test_in_a_cuda_graph(work):
    run, x, wanted = work
    given = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    before = LAUNCHER.counts("cuda_fold")
    with torch.cuda.graph(graph):
        made = run(given)
    assert LAUNCHER.counts("cuda_fold").replays == before.replays + 1
    given.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    same(made, wanted)


def test_on_the_current_stream(work):
    run, x, wanted = work
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        made = run(late)
    assert not stream.query(), "nothing waits"
    stream.synchronize()
    same(made, wanted)


@pytest.mark.parametrize("optimizer_of", [
    lambda weight: torch.optim.SGD([weight], 0.1), lambda weight: torch.optim.AdamW([weight], 0.01, fused=True)],
    ids=["counts", "fused"])  # a fused step leaves version counters as they are
def test_a_weight_is_made_once_a_step_and_kept_while_gradients_accumulate(optimizer_of, device):
    REUSED.watch()
    weight = torch.nn.Parameter(torch.randn(64, 256, device=device, dtype=torch.bfloat16))
    optimizer = optimizer_of(weight)
    signs = torch.ones(32, device=device)

    def make(owner):
        return fused.QUANTIZE(weight.detach(), 32, signs, SPEC, None, 3, None, True, True, owner, [1] * 32)

    def step(forwards):
        before = LAUNCHER.counts("cuda_quantize")
        for _ in range(forwards):
            same(make(weight.detach()), fused.cuda_quantize.providers[0].run(
                weight.detach(), 32, signs, SPEC, None, 3, None, True, True))
        after = LAUNCHER.counts("cuda_quantize")
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        return after.runs - before.runs

    assert [step(1) for _ in range(8)][-3:] == [0, 0, 0]
    assert [step(3) for _ in range(3)][-1] == 3, "Python serves what it keeps"
    assert [step(1) for _ in range(4)][-2:] == [0, 0]
