"""The paper's networks: their sizes, their initial weights, and that they are plain modules."""

import pytest
import torch
from torch import nn

import flipout
from flipout.streams import stream
from flipout_experiments.nets.networks import CharLSTM, ConvLe, ConvVGG, FullyConnected, WordLSTM, count_parameters

SMALL = {
    "fc": (FullyConnected, lambda: torch.rand(3, 1, 28, 28)),
    "convle": (lambda g: ConvLe(g, width=1 / 8), lambda: torch.rand(3, 1, 28, 28)),
    "convgg": (lambda g: ConvVGG(g, width=1 / 16), lambda: torch.rand(3, 3, 32, 32)),
    "word": (lambda g: WordLSTM(g, vocabulary=11, units=6), lambda: torch.randint(11, (3, 5))),
    "char": (lambda g: CharLSTM(g, vocabulary=7, units=6), lambda: torch.randint(7, (3, 5))),
}


def test_the_language_models_have_the_papers_numbers_of_parameters():
    assert round(count_parameters(CharLSTM()) / 1e6, 2) == 4.26
    assert round(count_parameters(WordLSTM()) / 1e6, 1) == 19.8


def test_vgg16_has_thirteen_convolutions_of_the_known_sizes_and_no_batch_normalisation():
    net = ConvVGG()
    assert [conv.out_channels for conv in net.convs] == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert sum(conv.weight.numel() + conv.bias.numel() for conv in net.convs) == 14_714_688  # VGG16's, as published
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in net.modules())


def test_convle_is_the_papers():
    net = ConvLe()
    assert [tuple(conv.weight.shape) for conv in (net.conv1, net.conv2)] == [(32, 1, 5, 5), (64, 32, 5, 5)]
    assert (net.fc1.out_features, net.fc2.out_features) == (1024, 10)


@pytest.mark.parametrize("name", SMALL)
def test_initial_weights_come_from_the_generator_alone(name):
    build, _ = SMALL[name]
    state = torch.get_rng_state()
    first, again, other = build(stream(1)), build(stream(1)), build(stream(2))
    assert torch.equal(torch.get_rng_state(), state)
    for key, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[key])
        assert weight.isfinite().all()
    assert not all(torch.equal(weight, other.state_dict()[key]) for key, weight in first.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_can_be_perturbed_and_has_a_gradient(name):
    build, inputs = SMALL[name]
    net = flipout.Perturbed(build(stream(1)), flipout.MultiplicativeGaussian(0.5))
    x = inputs()
    output = net(x)
    assert output.shape[0] == 3
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.module.parameters())
    assert torch.equal(net.eval()(x), net.module(x))


def test_initial_laws():
    """torch's own for linear layers (uniform, ±1/√inputs), He's for ConVGG (variance 2/inputs), orthogonal in the CharLSTM."""
    weight = FullyConnected(stream(0)).fc1.weight
    assert weight.abs().max() <= 784**-0.5
    assert abs(weight.var().item() * 784 * 3 - 1) < 0.02
    net = ConvVGG(stream(0), width=0.5)
    for conv in net.convs[1:]:
        assert conv.weight.var().item() * conv.weight[0].numel() / 2 == pytest.approx(1, abs=0.06)
        assert not conv.bias.any()
    for gate in CharLSTM(stream(0), units=40).lstm.weight_hh_l0.split(40):
        torch.testing.assert_close(gate @ gate.T, torch.eye(40), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["word", "char"])
def test_state_that_is_carried_joins_windows(name):
    build, inputs = SMALL[name]
    net, tokens = build(stream(1)), inputs()
    whole, last = net(tokens, net.initial_state(3))
    first, state = net(tokens[:, :2], net.initial_state(3))
    second, end = net(tokens[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)
    torch.testing.assert_close(net(tokens), whole)
