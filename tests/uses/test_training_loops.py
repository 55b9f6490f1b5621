"""Loops that own the model: Lightning, the Hugging Face trainer, DDP on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import Z_LIMIT, distance, worst, z_mean
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flipout

ROWS, WIDTH, CLASSES = 16, 6, 3
NOISE = flipout.Gaussian(0.3)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(ROWS, WIDTH, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator))


def is_clean(module: nn.Module) -> bool:
    """Whether a module holds nothing but its own parameters and no hooks."""
    hooks = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    return not hooks and all(type(parameter) is nn.Parameter for parameter in module.parameters())


# --- Lightning ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # what Lightning says of small machines and of torch
def test_inside_a_lightning_module(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs the lightning package")

    class Net(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = small()
            self.noise = torch.Generator().manual_seed(0)
            self.outputs: list[Tensor] = []
            self.clean: list[bool] = []

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            with flipout.perturbed(self.model, NOISE, generator=self.noise):
                logits = self.model(x[:1].expand_as(x))
            self.outputs.append(logits.detach())
            self.clean.append(is_clean(self.model))
            return F.cross_entropy(logits, y)

        def validation_step(self, batch: Any, _: int) -> None:
            x, _ = batch
            assert torch.equal(self.model(x), self.model(x))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    net = Net()
    before = [parameter.clone() for parameter in net.parameters()]
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net, DataLoader(data(), batch_size=8), DataLoader(data(), batch_size=8))
    assert len(net.outputs) == 4
    assert all(net.clean)
    assert all(len(torch.unique(output, dim=0)) == 8 for output in net.outputs)  # equal rows, eight different models
    assert not torch.equal(net.outputs[0], net.outputs[1])
    assert not any(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert sorted(net.state_dict()) == ["model.0.bias", "model.0.weight", "model.2.bias", "model.2.weight"]


# --- Hugging Face ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_inside_a_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    pytest.importorskip("accelerate", reason="the Hugging Face trainer needs the accelerate package")
    from zoo import ZOO

    transformers.logging.set_verbosity_error()

    model = next(entry for entry in ZOO if entry.name == "GPT-2").make().float()
    tokens = torch.randint(4, 37, (8, 5), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    noise = torch.Generator().manual_seed(0)
    members: list[int | None] = []

    class NoisyTrainer(transformers.Trainer):  # type: ignore[name-defined, misc]
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with flipout.perturbed(model, flipout.MultiplicativeGaussian(0.2), generator=noise) as draw:
                result = super().compute_loss(model, *args, **kwargs)
            members.append(draw.members)
            return result

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", seed=0,
    )  # fmt: skip
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = NoisyTrainer(model=model, args=arguments, train_dataset=rows)
    result = trainer.train()
    assert members == [4, 4, 4]
    assert result.training_loss > 0
    assert is_clean(model)
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters() if "wpe" not in name)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


# --- DDP ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ddp")
    worker = Path(__file__).parents[1] / "ddp_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker), str(folder)]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_ranks_draw_their_own_noise(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["outputs"] for rank in ranks)
    assert not torch.equal(first, second)
    assert all(rank["clean"] for rank in ranks)
    # equal inputs would not tell noise from data: compare what is left after each row's mean over the draws
    left, right = ((outputs - outputs.mean(0)).flatten(1) for outputs in (first, second))
    products = left[:, :, None] * right[:, None, :]
    assert worst(z_mean(products, 0.0)) < Z_LIMIT


def test_gradients_are_averaged_over_the_ranks(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["gradients"], ranks[1]["gradients"])
    mean = (ranks[0]["own"] + ranks[1]["own"]) / 2
    assert not torch.equal(ranks[0]["own"], ranks[1]["own"])
    assert distance(ranks[0]["gradients"][0], mean) < 1e-12
    assert distance(ranks[0]["wrapped"], ranks[0]["gradients"][:3]) < 1e-12


def test_ivon_takes_one_step_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(ranks[0]["ivon"], ranks[1]["ivon"], strict=True))
    assert all(bool(each.isfinite().all()) for each in ranks[0]["ivon"])


def test_the_averaged_gradient_is_unbiased(ranks: list[dict[str, Any]]) -> None:
    """The loss is quadratic in the weights, so that its mean gradient under any noise of mean zero is the plain one."""
    plain = (ranks[0]["plain"] + ranks[1]["plain"]) / 2
    assert worst(z_mean(ranks[0]["gradients"], plain)) < Z_LIMIT
    assert bool((ranks[0]["gradients"].std(0) > 0.01).all())


# --- misuse ------------------------------------------------------------------------------------------------------------------


def test_nested_holds_raise_and_leave_the_outer_one() -> None:
    net = flipout.Perturbed(small(), NOISE)
    x = torch.zeros(4, WIDTH)
    with net.hold(members=4):
        before = net(x)
        with pytest.raises(flipout.DrawError, match="already held"), net.hold(members=2):
            pass
        assert torch.equal(net(x), before)
    assert is_clean(net.module)


class Doubled(torch.autograd.Function):
    """A product with a backward of its own, as fused kernels have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class Bypass(nn.Module):
    """A layer whose product goes round the rules."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CLASSES, WIDTH))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


BYPASSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autograd_function": Doubled.apply,  # type: ignore[dict-item]
    "aten": torch.ops.aten.linear.default,
    "data": lambda x, w: x @ w.data.t(),
    "numpy": lambda x, w: x @ torch.from_numpy(w.detach().numpy()).t(),
}


@pytest.mark.parametrize("bypass", BYPASSES)
def test_products_that_go_round_the_rules_raise_by_name(bypass: str) -> None:
    module = Bypass(BYPASSES[bypass])
    net = flipout.Perturbed(module, NOISE)
    with pytest.raises(flipout.FlipoutError, match="'weight'"):
        net(torch.ones(4, WIDTH))
    assert is_clean(module)
    assert torch.equal(net.eval()(torch.ones(4, WIDTH)), torch.full((4, CLASSES), float(WIDTH)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.Tanh(), m)])
def test_torchscript_raises_by_name(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = wrap(torch.jit.script(nn.Linear(WIDTH, CLASSES)))
    with pytest.raises(flipout.ArgumentError, match=r"weight'.*TorchScript"):
        flipout.Perturbed(module, NOISE)


class Checkpointed(nn.Module):
    """A model that computes its second half again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(WIDTH, 8), small_half(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        if self.reentrant is None:
            return self.second(self.first(x).tanh())
        y: Tensor = checkpoint(self.second, self.first(x).tanh(), use_reentrant=self.reentrant)
        return y


def small_half() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def test_checkpointing_recomputes_under_the_same_draw() -> None:
    torch.manual_seed(0)
    module = Checkpointed(reentrant=False).double()
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    with flipout.perturbed(module, NOISE) as draw:
        module(x).square().sum().backward()
    found = [parameter.grad.clone() for parameter in module.parameters()]  # type: ignore[union-attr]
    module.zero_grad()
    module.reentrant = None
    for n in range(4):
        torch.func.functional_call(module, draw.weights(n), (x[n : n + 1],)).square().sum().backward()
    assert all(distance(a, p.grad) < 1e-10 for a, p in zip(found, module.parameters(), strict=True))  # type: ignore[arg-type]


def test_checkpointing_that_would_recompute_another_model_raises() -> None:
    module = Checkpointed(reentrant=True)
    with pytest.raises(flipout.MissingRuleError, match="use_reentrant=False"):
        flipout.Perturbed(module, NOISE)(torch.ones(4, WIDTH))
    assert is_clean(module)
