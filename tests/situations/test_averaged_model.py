"""Averages of a wrapped net's weights, and the batch statistics that go with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import flipout


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()


def batches():
    return [torch.randn(16, 4, generator=torch.Generator().manual_seed(i)).double() for i in range(5)]


def moved(net, steps):
    """The values of all parameters after each of some steps."""
    for step in range(steps):
        with torch.no_grad():
            for p in net.parameters():
                p += 0.1 * (step + 1)
        yield {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("device", [None, "cpu"])
def test_means_and_scales_are_averaged(device):
    net = flipout.Perturbed(normed(), flipout.Gaussian(0.1, learnable=True), generator=torch.Generator())
    averaged = AveragedModel(net, device=device)
    seen = []
    for values in moved(net, 3):
        averaged.update_parameters(net)
        seen.append(values)
    found = dict(averaged.module.named_parameters())
    assert sum(name.startswith("log_std") for name in found) == 6
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in seen]).mean(0))


def test_an_exponential_average_has_the_scales_too():
    net = flipout.Perturbed(normed(), flipout.Gaussian(0.1, learnable=True))
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for values in moved(net, 3):
        averaged.update_parameters(net)
        expected = values if expected is None else {name: (expected[name] + values[name]) / 2 for name in values}
    for name, value in averaged.module.named_parameters():
        torch.testing.assert_close(value, expected[name])


def test_the_average_is_a_net_of_its_own():
    """Its noise is that of its own scales, and a copy of it, or the net it came from, does not move it."""
    net = flipout.Perturbed(normed(), flipout.Gaussian(0.1, learnable=True))
    averaged = copy.deepcopy(AveragedModel(net))
    with torch.no_grad():
        for scale in averaged.module.noise_parameters():
            scale.fill_(-40.0)
    x = batches()[0]
    with averaged.module.sampling():
        torch.testing.assert_close(averaged.eval()(x), averaged.module.module(x))
    assert torch.equal(net.eval()(x), net.module(x))
    with net.sampling(), torch.no_grad():
        assert float((net(x) - net.module(x)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "noise", [flipout.Gaussian(1.0), flipout.Gaussian(1.0, learnable=True), flipout.MultiplicativeGaussian(1.0)]
)
def test_update_bn_on_the_clean_module_gives_its_own_statistics(noise):
    plain = AveragedModel(normed())
    update_bn(batches(), plain)
    averaged = AveragedModel(flipout.Perturbed(normed(), noise))
    averaged.train()
    update_bn(batches(), averaged.module.module)
    for name, buffer in plain.module.named_buffers():
        torch.testing.assert_close(dict(averaged.module.module.named_buffers())[name], buffer)
    assert averaged.module.module[1].momentum == 0.1
    x = batches()[0]
    torch.testing.assert_close(averaged.eval()(x), plain.eval()(x))


def test_update_bn_on_the_wrapper_has_the_statistics_of_noisy_passes():
    """What the way out is for; the call cannot be told from training with momentum=None."""
    averaged = AveragedModel(flipout.Perturbed(normed(), flipout.Gaussian(1.0)))
    update_bn(batches(), averaged.module.module)
    clean = averaged.module.module[1].running_var.clone()
    update_bn(batches(), averaged)
    assert bool((averaged.module.module[1].running_var > 2 * clean).all())
