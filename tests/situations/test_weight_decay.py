"""Weight decay and learnable noise scales: kept apart by parameter_groups, and told where they are not."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import flipout


def learnable(std: float = 0.01) -> flipout.Perturbed:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return flipout.Perturbed(model, flipout.Gaussian(std, learnable=True))


def train(net: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 50) -> None:
    x = torch.randn(8, 4)
    for _ in range(steps):
        optimiser.zero_grad()
        net(x).square().mean().backward()
        optimiser.step()


def largest_std(net: flipout.Perturbed) -> float:
    return max(float(scale.detach().exp().max()) for scale in net.noise_parameters())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.RMSprop])
def test_scales_do_not_decay_in_parameter_groups(kind):
    """Without a gradient that asks for it, sigma stays where it was; the means decay."""
    net = learnable()
    optimiser = kind(net.parameter_groups(weight_decay=0.1), lr=0.1)
    before = [p.detach().clone() for p in net.module.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(20):
        optimiser.step()
    assert largest_std(net) == pytest.approx(0.01)
    assert all(not torch.equal(p, q) for p, q in zip(before, net.module.parameters(), strict=True) if q.abs().max() > 0)


def test_the_scales_of_a_training_are_those_without_any_decay():
    def scales(decay):
        torch.manual_seed(0)
        net = learnable()
        net.module.requires_grad_(False)  # the means would move differently
        groups = net.parameter_groups(weight_decay=decay)
        train(net, torch.optim.AdamW(groups, lr=0.05, weight_decay=decay))
        return list(net.noise_parameters())

    for decayed, plain in zip(scales(1.0), scales(0.0), strict=True):
        assert torch.equal(decayed, plain)


def test_the_groups_hold_every_parameter_once_and_frozen_ones_too():
    net = learnable()
    net.module[0].weight.requires_grad_(False)
    tied = nn.ModuleList([net, net.module[0], nn.Linear(3, 3)])  # as a larger model may name parts twice
    groups = flipout.parameter_groups(tied, weight_decay=0.1, betas=(0.5, 0.9), noise_lr=1e-4)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in tied.parameters())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(group["betas"] == (0.5, 0.9) for group in groups)
    assert "lr" not in groups[0]
    assert groups[1]["lr"] == 1e-4


def test_without_learnable_noise_there_is_one_group():
    net = flipout.Perturbed(nn.Linear(3, 2), flipout.Gaussian(0.1))
    (group,) = net.parameter_groups(weight_decay=0.1)
    assert group["params"] == list(net.parameters())


@pytest.mark.parametrize("wrong", [{"weight_decay": -1.0}, {"weight_decay": None}, {"weight_decay": 0.1, "noise_lr": float("nan")}])
def test_what_is_no_decay_is_refused(wrong):
    with pytest.raises(flipout.ArgumentError, match="expected a finite number"):
        learnable().parameter_groups(**wrong)
    with pytest.raises(flipout.ArgumentError, match="params"):
        learnable().parameter_groups(0.1, params=[])


def test_decaying_scales_are_told_once_before_the_first_step():
    net = learnable()
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(
        flipout.DecayWarning, match=r"AdamW applies weight_decay=0\.1 to log_std of '0\.(weight|bias)' and 3 more.*parameter_groups"
    ):
        optimiser.step()
    optimiser.step()  # warnings are errors: a second one would raise
    other = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.warns(flipout.DecayWarning, match="SGD"):
        other.step()


def test_a_warning_made_an_error_leaves_everything_as_it_was():
    net = learnable()
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(flipout.DecayWarning):
        optimiser.step()
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))


def test_the_warning_points_at_the_step_of_the_caller():
    net = learnable()
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimiser.step()
    assert [each.filename for each in caught] == [__file__]


def test_a_change_of_the_groups_is_checked_again():
    net = learnable()
    optimiser = torch.optim.AdamW(net.module.parameters(), weight_decay=0.1)
    optimiser.step()
    optimiser.add_param_group({"params": list(net.noise_parameters()), "weight_decay": 0.0})
    optimiser.step()
    optimiser.param_groups[1]["weight_decay"] = 0.3  # as a schedule of the decay does
    with pytest.warns(flipout.DecayWarning, match=r"weight_decay=0\.3"):
        optimiser.step()


def test_frozen_scales_do_not_decay_until_they_are_unfrozen():
    net = learnable()
    for scale in net.noise_parameters():
        scale.requires_grad_(False)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    optimiser.step()
    for scale in net.noise_parameters():
        scale.requires_grad_(True)
    with pytest.warns(flipout.DecayWarning):
        optimiser.step()


def copied(net):
    return copy.deepcopy(net)


def pickled(net):
    return pickle.loads(pickle.dumps(net))


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_double(net):
    return net.to(torch.float64)


def on_meta_and_back(net):
    return net.to("meta").to_empty(device="cpu")


@pytest.mark.parametrize("change", [copied, pickled, saved, in_double, on_meta_and_back])
def test_scales_are_known_after(change):
    kept = learnable()
    net = change(kept)
    with pytest.warns(flipout.DecayWarning):
        torch.optim.AdamW(net.parameters(), weight_decay=0.1).step()
    torch.optim.AdamW(net.parameter_groups(weight_decay=0.1)).step()


def test_no_decay_no_warning():
    net = learnable()
    train(net, torch.optim.Adam(net.parameters(), lr=0.01), steps=3)
    plain = nn.Linear(3, 2)
    torch.optim.AdamW(plain.parameters(), weight_decay=0.1).step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_still_compiles():
    net = learnable()
    optimiser = torch.optim.AdamW(net.parameter_groups(weight_decay=0.1), lr=torch.tensor(0.01))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    torch.compile(optimiser.step, backend="eager")()


@pytest.mark.filterwarnings("error::flipout.errors.DecayWarning")
@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_trainer(tmp_path: Path):
    """The trainer groups parameters by name. It warns, and the override that the warning names is enough."""
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = learnable()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Trainer(transformers.Trainer):
        def get_decay_parameter_names(self, model):
            return [name for name in super().get_decay_parameter_names(model) if "log_std." not in name]

    def run(kind):
        torch.manual_seed(0)
        rows = [{"x": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(16)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            max_steps=2,
            weight_decay=0.5,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = kind(model=Model(), args=arguments, train_dataset=rows)
        trainer.train()
        return trainer

    with pytest.raises(flipout.DecayWarning, match=r"get_decay_parameter_names.*log_std\."):
        run(transformers.Trainer)
    trainer = run(Trainer)
    scales = {id(scale) for scale in trainer.model.net.noise_parameters()}
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"] if id(p) in scales}
    assert decays == {0.0}


@pytest.mark.filterwarnings("error::flipout.errors.DecayWarning")
@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module(tmp_path: Path):
    lightning = pytest.importorskip("lightning", reason="needs the lightning package")

    class Net(lightning.LightningModule):
        def __init__(self, grouped: bool) -> None:
            super().__init__()
            self.net, self.grouped = learnable(), grouped

        def training_step(self, batch, _):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            if self.grouped:
                return torch.optim.AdamW(flipout.parameter_groups(self, weight_decay=0.5), lr=1e-3)
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.5)

    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 4)), batch_size=8)

    def fit(net):
        lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(net, rows)

    fit(Net(grouped=True))
    with pytest.raises(flipout.DecayWarning):
        fit(Net(grouped=False))
