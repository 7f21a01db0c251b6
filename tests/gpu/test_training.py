"""Training on a GPU: products against the reference, seeds, CUDA graphs, streams, a second device."""

from __future__ import annotations

import pytest
import torch

import quartet
from quartet.backend import compile_graph
from quartet.lowering import registry
from quartet.options import Options
from quartet.passes import pipeline
from quartet.runtime.capture import Capture
from quartet.runtime.compat import list_mode_options
from quartet.runtime.slots.storages import storage_number
from quartet.runtime.slots.weights import REUSED

pytestmark = pytest.mark.gpu
QUARTET = {"policy": "quartet"}  # small layers, which the default would leave alone
REFERENCE = ("triton-fp8", "cublaslt", "triton", "inductor")


def eager(policy, disabled=(), rows=None):
    """The backend with our kernels but without Inductor's code generation."""
    def backend(gm, inputs):
        options = Options.parse(None, {"policy": policy, "disable_kernels": disabled}, passes=pipeline.OPTIONAL,
                                kernels=registry.NAMES)
        return compile_graph(gm, inputs, options, inner_compile=Capture(),
                             collect=rows.extend if rows is not None else None)
    return backend


def step(compiled, module, x, e, seed=0):
    """Output, gradient of the input and of the weight, of one step."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = compiled(x)
    y.backward(e)
    return y.detach(), x.grad, module.weight.grad.clone()


def linear(tokens=200, k=320, n=192, dtype=torch.bfloat16, device="cuda", bias=False):
    torch.manual_seed(1)
    module = torch.nn.Linear(k, n, bias=bias, device=device, dtype=dtype)
    x, e = (torch.randn(tokens, size, device=device, dtype=dtype) for size in (k, n))
    return module, x, e


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("policy", ["quartet", "quartet-paper", "fp8", "fp8-rowwise"])
@pytest.mark.parametrize("sizes", [(200, 320, 192), (96, 1024, 4096), (77, 100, 60)])
def test_products_are_the_references(policy, sizes):
    module, x, e = linear(*sizes)
    rows = []
    got = step(torch.compile(module, backend=eager(policy, rows=rows), dynamic=False), module, x, e)
    torch._dynamo.reset()
    want = step(torch.compile(module, backend=eager(policy, REFERENCE), dynamic=False), module, x, e)
    assert {row.kernel for row in rows} == {"triton-fp8" if policy.startswith("quartet") else "cublaslt"}
    for name, a, b in zip(("y", "gx", "gw"), got, want, strict=True):
        assert a.shape == b.shape and distance(a, b) < 6e-3, name  # rounding to bf16 and FP8 accumulation


def test_without_fp8_the_products_are_made_in_the_models_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch._dynamo.reset()
        module, x, e = linear(dtype=dtype)
        rows = []
        got = step(torch.compile(module, backend=eager("quartet", ("triton-fp8",), rows)), module, x, e)
        torch._dynamo.reset()
        want = step(torch.compile(module, backend=eager("quartet", REFERENCE)), module, x, e)
        assert {row.kernel for row in rows} == {"triton"}
        assert all(distance(a, b) < 6e-3 for a, b in zip(got, want, strict=True))


def test_one_seed_gives_the_same_bits_and_another_gives_others():
    module, x, e = linear()
    compiled = torch.compile(module, backend="quartet", options=QUARTET)
    first, again, other = (step(compiled, module, x, e, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], other[0])  # the forward rounds to nearest
    assert not torch.equal(first[1], other[1]) and not torch.equal(first[2], other[2])


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_every_replay_of_a_cuda_graph_draws_anew(mode):
    module, x, e = linear(256, 512, 512)
    compiled = torch.compile(module, backend="quartet", options=QUARTET | list_mode_options(mode))
    torch.manual_seed(0)
    outputs, grads = [], []
    for _ in range(8):
        torch.compiler.cudagraph_mark_step_begin()
        module.zero_grad()
        y = compiled(x)
        y.backward(e)
        outputs.append(y.detach().clone())
        grads.append(module.weight.grad.clone())
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert all(not torch.equal(a, b) for a, b in zip(grads, grads[1:], strict=False))
    mean = torch.stack(grads).float().mean(0)
    assert distance(mean, grads[0]) > 0.6 * distance(grads[1], grads[0]) / 2**0.5  # and independently


def test_policy_bf16_is_inductor():
    module, x, e = linear(bias=True)
    ours = step(torch.compile(module, backend="quartet", options={"policy": "bf16"}), module, x, e)
    torch._dynamo.reset()
    theirs = step(torch.compile(module, backend="inductor"), module, x, e)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_another_stream():
    module, x, e = linear(1024, 2048, 2048)
    compiled = torch.compile(module, backend="quartet", options=QUARTET)
    want = step(compiled, module, x, e)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(compiled, module, x, e)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_second_gpu_in_the_process():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    module, x, e = linear()
    want = step(torch.compile(module, backend="quartet", options=QUARTET), module, x, e)
    torch._dynamo.reset()
    module, x, e = module.to("cuda:1"), x.to("cuda:1"), e.to("cuda:1")
    got = step(torch.compile(module, backend="quartet", options=QUARTET), module, x, e)
    assert all(a.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


def test_dynamic_tokens():
    module, _, _ = linear()
    compiled = torch.compile(module, backend="quartet", dynamic=True)
    for tokens in (64, 33, 1, 200):
        x, e = torch.randn(tokens, 320, device="cuda").bfloat16(), torch.randn(tokens, 192, device="cuda").bfloat16()
        y, gx, gw = step(compiled, module, x, e)
        assert y.shape == (tokens, 192) and gx.shape == x.shape and gw.shape == module.weight.shape
        assert distance(y, x @ module.weight.t()) < 0.4


def test_blocks_that_do_not_fold_are_counted():
    module, x, e = linear()
    torch.compile(module, backend=eager("quartet"))(x)
    torch.cuda.synchronize()
    before = quartet.statistics()["cuda:0"]["inexact_fold_blocks"]
    x[:, :32] *= 2.0**30
    torch.compile(module, backend=eager("quartet"))(x)
    assert quartet.statistics()["cuda:0"]["inexact_fold_blocks"] == before + 200 * 9


def test_accumulated_gradients_are_those_of_weights_quantised_each_time():
    grads = []
    for reuse in (True, False):
        torch.manual_seed(0)
        module, x, e = linear(256, 512, 512)
        compiled = torch.compile(module, backend="quartet", options=QUARTET | {"reuse_weights": reuse})
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
        for _ in range(3):
            for seed in range(3):
                torch.manual_seed(seed)
                compiled(x).backward(e)
            gradient = module.weight.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
        grads.append(gradient)
    assert torch.equal(*grads)


@pytest.mark.parametrize("policy", ["tetrajet", quartet.Policy("bf16").on("*", "quartet", op="linear", role="fprop")],
                         ids=["requantised", "fprop only"])
def test_accumulated_gradients_where_backward_needs_no_codes(policy):
    grads = []
    for reuse in (True, False):
        torch.manual_seed(0)
        module, x, e = linear(256, 512, 512)
        compiled = torch.compile(module, backend="quartet", options={"policy": policy, "reuse_weights": reuse})
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
        for _ in range(3):
            for seed in range(3):
                torch.manual_seed(seed)
                compiled(x).backward(e)
            made = REUSED._step.get(storage_number(module.weight), {})
            gradient = module.weight.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
        assert any(m.kept is not None for m in made.values()) is reuse
        grads.append((gradient, module.weight.detach().clone()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_replayed_optimizer_steps_never_leave_old_codes():
    """Nothing is called and no version counter moves when a captured step is replayed."""
    weights = []
    for reuse in (True, False):
        torch.manual_seed(0)
        module, x, e = linear(256, 512, 512)
        compiled = torch.compile(module, backend="quartet", options=QUARTET | {"reuse_weights": reuse})
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-1)

        def accumulate(module=module, compiled=compiled, x=x, e=e):
            module.weight.grad.zero_()
            for seed in range(3):
                torch.manual_seed(seed)
                compiled(x).backward(e)

        compiled(x).backward(e)
        optimizer.step()  # eager: the optimizer is known
        accumulate()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(3):
            graph.replay()
            accumulate()
        optimizer.step()
        for _ in range(2):
            graph.replay()
            accumulate()
        weights.append((module.weight.detach().clone(), module.weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_micro_batches_on_two_streams_share_no_codes():
    """The one that would keep the codes is busy; what it has been asked to make is not there yet."""
    module, x, e = linear(256, 512, 512)
    compiled = torch.compile(module, backend="quartet", options=QUARTET)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def accumulate(streams, busy):
        outputs = []
        for i in range(6):
            stream = streams[i % len(streams)]
            stream.wait_stream(torch.cuda.default_stream())
            torch.manual_seed(i)
            with torch.cuda.stream(stream):
                if busy and i % 2:  # its first forward, the second of the step, is what would be kept
                    torch.cuda._sleep(50_000_000)
                y = compiled(x)
                outputs += [y.detach().clone(), *torch.autograd.grad(y, module.weight, e)]
        torch.cuda.synchronize()
        return outputs

    for _ in range(2):  # from its first step on the optimizer's parameters are known
        compiled(x).backward(e)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    want = accumulate((torch.cuda.default_stream(),), False)
    with torch.no_grad():
        module.weight.mul_(-2)  # voids what is kept
        module.weight.mul_(-0.5)
    got = accumulate(streams, True)
    made = REUSED._step[storage_number(module.weight)]
    assert {stream for *_, stream, _ in made} >= {s.cuda_stream for s in streams}
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_the_default_leaves_alone_what_would_be_slower_and_quantises_the_rest():
    for sizes, kernel in (((512, 256, 256), None), ((8192, 8192, 8192), "cublaslt")):
        module, x, _ = linear(*sizes)
        report = quartet.explain(module, x.requires_grad_())
        assert {r.kernel for r in report.records} == {kernel}
        assert ("would not pay: predicted" in str(report)) is (kernel is None)
