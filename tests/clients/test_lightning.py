"""Lightning's Trainer and Fabric, a gradient scaler that recovers, schedulers, and what profilers call our kernels."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quartet
from quartet import optim
from quartet.runtime.capture import settings_of

WIDTH, BATCH = 64, 32


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, 96), nn.Linear(96, WIDTH)

    def forward(self, x):
        return self.down(self.mid(self.up(x).relu()).relu())


def data(batches=4):
    x = torch.randn(batches * BATCH, WIDTH, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(x), batch_size=BATCH, generator=torch.Generator())


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def module():
    """A function: a LightningModule whose network was compiled in place."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, policy):
            super().__init__()
            torch.manual_seed(0)
            self.network = quartet.compile(MLP(), policy)

        def training_step(self, batch, index):
            return (self.network(batch[0]) - batch[0]).square().mean()

        validation_step = training_step

        def configure_optimizers(self):
            optimizer = optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    return Module


def trainer(folder, epochs, checkpoints=False):
    lightning = pytest.importorskip("lightning")
    from quartet.integrations.lightning import QuartetCallback

    keep = [lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1)] if checkpoints else []
    return lightning.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=False,
                             enable_checkpointing=checkpoints, enable_progress_bar=False, enable_model_summary=False,
                             callbacks=[*keep, QuartetCallback()])


@pytest.mark.parametrize("policy", ["quartet", "fp8-delayed"])
def test_a_trainer_resumes_bit_for_bit(tmp_path, module, policy):
    fresh, resumed, whole = module(policy), module(policy), module(policy)
    torch.manual_seed(3)
    trainer(tmp_path, 2, checkpoints=True).fit(whole, data(), data(1))
    kept, = tmp_path.glob("**/epoch=0*.ckpt")
    torch.manual_seed(9)
    trainer(tmp_path, 2).fit(resumed, data(), data(1), ckpt_path=kept, weights_only=False)
    assert equal(weights(resumed), weights(whole)) and not equal(weights(fresh), weights(whole))
    assert bool(torch.load(kept, weights_only=False)["quartet"]["delayed"]) == (policy == "fp8-delayed")


@pytest.mark.parametrize("wrapped", [False, True])
def test_fabric_keeps_what_was_compiled(wrapped):
    """Fabric takes torch.compile's wrapper off and compiles its own module with the arguments that it had noted."""
    lightning = pytest.importorskip("lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    model = MLP()
    if wrapped:
        model = torch.compile(model, backend="quartet", options={"policy": "fp8"})
    else:
        quartet.compile(model, "fp8")
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for (x,) in fabric.setup_dataloaders(data(8)):
        loss = (model(x) - x).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    policy = settings_of(model._forward_module)[2]["policy"]
    assert quartet.Policy.coerce(policy) == quartet.Policy("fp8")
