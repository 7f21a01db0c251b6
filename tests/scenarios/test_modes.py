"""``mode=`` through the real Inductor, batches that shrink to one token and to none, devices that have no kernel,
layers that PyTorch evaluates as one operator."""

from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from harness import ALL, FIRST, compile_eager
from models import MLP, data
from torch import Tensor, nn

from quartet import Policy
from quartet.lowering import registry
from quartet.model.fused import encoder_layer, open_layers
from quartet.model.trained import tokens_of
from quartet.runtime.compat import CustomGraphPass, inductor_config, list_mode_options

ROWS = (40, 1, 0, 33, 1, 0, 64)


@dataclass
class Settings(CustomGraphPass):
    """A pass that changes nothing and notes the configuration under which Inductor compiles each graph."""

    names: tuple[str, ...]
    seen: list[dict[str, object]] = field(default_factory=list)

    def __call__(self, graph):
        self.seen.append({name: getattr(inductor_config, name) for name in self.names})

    def uuid(self):
        return None


def train(mode=None) -> tuple[list[Tensor], list[dict[str, object]]]:
    """Two steps of SGD through the backend's own name: losses, gradients and weights; the settings of each graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(40, 64, requires_grad=True)
    settings = Settings(tuple(list_mode_options("max-autotune")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    with inductor_config.patch(fx_graph_cache=False, post_grad_custom_post_pass=settings):
        compiled = torch.compile(model, backend="quartet", mode=mode, fullgraph=True)
        for _ in range(2):
            loss = compiled(x).square().mean()
            loss.backward()
            found += [loss.detach(), x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
            optimizer.step()
            optimizer.zero_grad()
            x.grad = None
    return [*found, *(p.detach() for p in model.parameters())], settings.seen


@pytest.fixture(scope="module")
def without_a_mode():
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return train()


def test_the_steps_without_a_mode_are_quantised(without_a_mode):
    results, settings = without_a_mode
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(40, 64)
    exact = model(x).square().mean()
    assert torch.isfinite(torch.stack([r.sum() for r in results])).all()
    assert not torch.equal(results[0], exact) and torch.isclose(results[0], exact, rtol=0.5)
    assert len(settings) == 2 and not settings[0]["max_autotune"]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_a_mode_reaches_inductor_and_gives_the_same_bits(without_a_mode, mode):
    results, settings = train(mode)
    assert len(settings) == 2, "one graph forward, one backward"
    for graph in settings:
        assert {name: graph[name] for name in list_mode_options(mode)} == list_mode_options(mode)
    assert len(results) == len(without_a_mode[0])
    assert all(torch.equal(a, b) for a, b in zip(results, without_a_mode[0], strict=True))


def step(run, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one step; the loss is a sum, which an empty batch has too."""
    model.zero_grad()
    x.grad = None
    torch.manual_seed(1)
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters()), *([] if x.grad is None else [x.grad])]


@pytest.mark.parametrize("grad", [False, True], ids=["data", "input_grad"])
@pytest.mark.parametrize(("mark", "graphs"), [(torch._dynamo.maybe_mark_dynamic, 3),
                                              (torch._dynamo.decorators.mark_unbacked, 1)], ids=["dynamic", "unbacked"])
def test_a_batch_that_shrinks_to_one_and_to_none_is_the_static_graph_bit_for_bit(mark, graphs, grad):
    """A dynamic size specialises on 1 and on 0; an unbacked one is a single graph for all."""
    model, policy = MLP(), Policy(None).on("linear", "quartet")  # the default would leave wgrad of few rows alone
    compiled, backend = compile_eager(model, policy)
    static, _ = compile_eager(model, policy, dynamic=False)
    for rows in ROWS:
        (x,) = data(rows, 64, grad=grad)()
        expected = step(static, model, x)
        mark(x, 0)
        found = step(compiled, model, x)
        assert found[0].shape == (rows, 64)
        assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)
        assert bool(rows) == any(t.any() for t in found[1:]), "no token gives no gradient, one token gives some"
    assert backend.calls == graphs
    assert backend.lowered() == {"up": ALL if grad else FIRST, "down": ALL}


def test_a_device_without_a_kernel_of_ours_compiles_and_takes_none():
    model, x = MLP(out=96).to("meta"), torch.empty(40, 64, device="meta", requires_grad=True)
    compiled, backend = compile_eager(model)  # torch.compile fails where a result on meta has the sizes of a gradient
    out, *gradients = step(compiled, model, x)
    assert (out.shape, out.device.type) == ((40, 96), "meta")
    assert [g.shape for g in gradients] == [p.shape for p in (*model.parameters(), x)]
    assert backend.records and not {r.kernel for r in backend.records} & set(registry.NAMES)


def test_a_model_moved_off_its_device_and_back_is_compiled_again_and_computes_what_it_did():
    model, (x,) = MLP(), data(40, 64)()
    compiled, backend = compile_eager(model)
    before = step(compiled, model, x)
    weights = deepcopy(model.state_dict())
    model.to("meta")
    assert compiled(x.to("meta")).device.type == "meta" and backend.calls == 2
    model.to_empty(device="cpu").load_state_dict(weights)
    assert all(torch.equal(a, b) for a, b in zip(step(compiled, model, x), before, strict=True))


def test_weights_left_behind_on_another_device_are_named_with_both_devices():
    model, (x,) = MLP().to("meta"), data(40, 64)()
    compiled, _ = compile_eager(model)
    with pytest.raises(Exception, match="(?s)devices.*(cpu.*meta|meta.*cpu)"):
        compiled(x)


@pytest.mark.parametrize("device", ["meta", "xpu", "mps"])
def test_probing_a_device_without_kernels_gives_a_reason_that_names_it(device):
    rows = registry.probe(torch.device(device))
    assert {kernel for _, kernel, _ in rows} == set(registry.NAMES)
    assert all(reason is not None and device in reason for _, _, reason in rows)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", [{}, {"src_key_padding_mask": torch.arange(16) > torch.tensor([[16], [9], [-1]])},
                                  {"src_mask": torch.ones(16, 16).triu(1).bool()}], ids=["all", "padded", "causal"])
def test_a_layer_that_pytorch_evaluates_as_one_operator_computes_what_training_does(norm_first, mask):
    layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True, norm_first=norm_first)
    compiled, backend = compile_eager(layer, "fp8", dynamic=False)
    x = torch.randn(3, 16, 64)
    trained = compiled(x, **mask).detach()
    backend.records.clear()
    layer.eval()
    with torch.no_grad():
        assert torch.equal(compiled(x, **mask), trained)
    assert {r.fqn: r.lowered for r in backend.records if r.op_class == "linear"} == dict.fromkeys(
        ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"), True)
    rows = {r.op_class for r in backend.records}
    assert rows == {"linear", "attention_qk", "attention_pv"}


def test_what_the_operator_for_a_layer_computes():
    """Masks are nonzero where a token takes no part; rows of tokens of which none does are NaN there."""
    layer, x = nn.TransformerEncoderLayer(64, 4, 96), torch.randn(2, 8, 64)
    weights = [p.detach() for p in layer.self_attn.parameters()]
    norms = [p.detach() for norm in (layer.norm1, layer.norm2) for p in norm.parameters()]
    last = [p.detach() for linear in (layer.linear1, layer.linear2) for p in linear.parameters()]
    masks = [(None, None), (torch.rand(8, 8) < .3, 0), (torch.rand(2, 8) < .3, 1), (torch.rand(2, 4, 8, 8) < .3, 2)]
    for mask, kind in [*masks, (torch.where(torch.rand(2, 8) < .3, -1.5, 0.0), 1)]:
        for gelu in (False, True):
            for first in (False, True):
                given = (x, 64, 4, *weights, gelu, first, 1e-5, *norms, *last, mask, kind)
                torch.testing.assert_close(encoder_layer(*given), torch._transformer_encoder_layer_fwd(*given))


def test_a_layer_that_is_one_operator_is_decided_by_what_training_had():
    layer, found = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval(), []

    def backend(gm, inputs):
        open_layers(gm)
        found.append(tokens_of(gm, {i: str(i) for i, v in enumerate(inputs) if isinstance(v, nn.Parameter)}))
        return gm

    with torch.no_grad():
        torch.compile(layer, backend=backend)(torch.zeros(3, 7, 64))
    assert list(found[0].values()) == [21] * 4
