"""The paper's networks as plain modules (Wen et al. 2018, Appendix B, Sec. 4.2). None knows of noise.

Each takes the generator of its initial weights, which follow torch's laws unless said otherwise; None is torch's own generator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CharLSTM", "ConvLe", "ConvVGG", "FullyConnected", "State", "TiedLSTM", "WordLSTM", "count_parameters", "linear"]

#: Hidden and cell state of an LSTM, ``[layers, N, units]`` each.
State = tuple[Tensor, Tensor]
Layer = TypeVar("Layer", bound=nn.Module)


def count_parameters(module: nn.Module) -> int:
    """Trained numbers in a module, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


class FullyConnected(nn.Module):
    """FC: three layers, 784-512-512-10, with ReLU between them; 669,706 parameters.

    Takes images ``[N, 1, 28, 28]`` or rows ``[N, 784]`` and returns logits ``[N, 10]``.

    Args:
        generator: source of the initial weights, drawn from torch's default law for linear layers; None for torch's own.
        units: of each hidden layer.
        dropout: the chance of a hidden unit in training mode.

    Attributes:
        dropout_generator: source of the masks of dropout; None for torch's own.

    Example:
        >>> FullyConnected()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, generator: torch.Generator | None = None, units: int = 512, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = linear(784, units, generator)
        self.fc2 = linear(units, units, generator)
        self.fc3 = linear(units, 10, generator)
        self.dropout = dropout
        self.dropout_generator: torch.Generator | None = None

    def forward(self, images: Tensor) -> Tensor:
        hidden = self._thinned(torch.relu(self.fc1(images.flatten(1))))
        hidden = self._thinned(torch.relu(self.fc2(hidden)))
        logits: Tensor = self.fc3(hidden)
        return logits

    def _thinned(self, hidden: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return hidden
        return hidden * _mask(hidden.shape, self.dropout, self.dropout_generator, hidden)


class ConvLe(nn.Module):
    """ConvLe: 5x5 convolutions to 32 and 64 channels that keep the size, each followed by ReLU and 2x2 max-pooling, then fully
    connected layers of 1024 and 10; 3,274,634 parameters.

    Takes images ``[N, 1, 28, 28]`` and returns logits ``[N, 10]``.

    Args:
        generator: source of the initial weights.
        width: multiplies the numbers of channels and hidden units (the "filter scale" of the paper's Fig. 5).

    Example:
        >>> net = ConvLe()
        >>> net(torch.zeros(2, 1, 28, 28)).shape, count_parameters(net)
        (torch.Size([2, 10]), 3274634)
    """

    def __init__(self, generator: torch.Generator | None = None, width: float = 1.0) -> None:
        super().__init__()
        first, second, hidden = (max(1, round(width * n)) for n in (32, 64, 1024))
        self.conv1 = _conv(1, first, 5, generator)
        self.conv2 = _conv(first, second, 5, generator)
        self.fc1 = linear(7 * 7 * second, hidden, generator)
        self.fc2 = linear(hidden, 10, generator)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.max_pool2d(torch.relu(self.conv1(images)), 2)
        hidden = F.max_pool2d(torch.relu(self.conv2(hidden)), 2)
        logits: Tensor = self.fc2(torch.relu(self.fc1(hidden.flatten(1))))
        return logits


#: Channels of VGG16's convolutions; a 2x2 max-pooling ends each group.
_VGG16: Sequence[Sequence[int]] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class ConvVGG(nn.Module):
    """ConVGG: VGG16 on 32x32 images with ten outputs and no batch normalisation; 15,245,130 parameters.

    Thirteen 3x3 convolutions, ``convs[0]`` ... ``convs[12]`` (the paper's Conv1 ... Conv13), leave 512 x 1 x 1 features. The paper
    is silent on the two hidden layers behind them, which have 512 units here; VGG16's 4096 are made for 7 x 7 features. Weights
    start from He's law for ReLU, without which a net of this depth does not train unnormalised; biases start at zero.

    Takes images ``[N, 3, 32, 32]`` and returns logits ``[N, 10]``.

    Args:
        generator: source of the initial weights.
        width: multiplies the numbers of channels and hidden units.

    Example:
        >>> net = ConvVGG(width=1 / 16)
        >>> net(torch.zeros(2, 3, 32, 32)).shape, len(net.convs), count_parameters(ConvVGG())
        (torch.Size([2, 10]), 13, 15245130)
    """

    def __init__(self, generator: torch.Generator | None = None, width: float = 1.0) -> None:
        super().__init__()
        self.convs, self.fcs = nn.ModuleList(), nn.ModuleList()
        self._ends: set[int] = set()
        channels = 3
        for group in _VGG16:
            for n in group:
                self.convs.append(_conv(channels, channels := max(1, round(width * n)), 3, generator))
            self._ends.add(len(self.convs) - 1)
        for n in (channels, channels, 10):
            self.fcs.append(linear(channels, n, generator))
        for layer in (*self.convs, *self.fcs):
            _he(layer, generator)

    def forward(self, images: Tensor) -> Tensor:
        hidden = images
        for i, conv in enumerate(self.convs):
            hidden = torch.relu(conv(hidden))
            if i in self._ends:
                hidden = F.max_pool2d(hidden, 2)
        hidden = hidden.flatten(1)
        for fc in self.fcs[:-1]:
            hidden = torch.relu(fc(hidden))
        logits: Tensor = self.fcs[-1](hidden)
        return logits


class WordLSTM(nn.Module):
    """The word model: embeddings, two LSTM layers, a softmax layer of its own; 19,780,400 parameters (the paper's 19.8M).

    Takes tokens ``[N, T]`` and, for truncated backpropagation, the state that the steps before left; returns logits
    ``[N, T, vocabulary]``, or these and the state if one was given.

    Args:
        generator: source of the initial weights.
        vocabulary: words.
        units: of the embeddings and of each layer.
        layers: of the LSTM.

    Example:
        >>> net = WordLSTM(vocabulary=11, units=5)
        >>> tokens = torch.zeros(2, 3, dtype=torch.long)
        >>> net(tokens).shape
        torch.Size([2, 3, 11])
        >>> logits, state = net(tokens, net.initial_state(2))
        >>> state[0].shape
        torch.Size([2, 2, 5])
    """

    def __init__(
        self, generator: torch.Generator | None = None, vocabulary: int = 10_000, units: int = 650, layers: int = 2
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embedding = _bare(nn.Embedding, vocabulary, units)
        self.lstm = _lstm(units, units, layers)
        self.decoder = linear(units, vocabulary, generator)
        with torch.no_grad():
            self.embedding.weight.uniform_(-0.1, 0.1, generator=generator)  # Zaremba et al. 2014; torch's N(0, 1) starts far off
            _uniform(self.lstm, units**-0.5, generator)

    def initial_state(self, rows: int) -> State:
        """Zeros for ``rows`` sequences."""
        return _zeros(self.lstm, rows, self.decoder.weight)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor | tuple[Tensor, State]:
        hidden, after = self.lstm(self.embedding(tokens), state)
        logits = self.decoder(hidden)
        return logits if state is None else (logits, after)


class CharLSTM(nn.Module):
    """The character model: one-hot inputs, one LSTM layer, a softmax layer; 4,258,050 parameters for 50 symbols (the paper's
    4.26M).

    Takes and returns what :class:`WordLSTM` does.

    Args:
        generator: source of the initial weights; recurrent matrices start orthogonal (the paper's Appendix D).
        vocabulary: symbols.
        units: of the layer.

    Example:
        >>> net = CharLSTM()
        >>> count_parameters(net)
        4258050
    """

    def __init__(self, generator: torch.Generator | None = None, vocabulary: int = 50, units: int = 1000) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.lstm = _lstm(vocabulary, units, 1)
        self.decoder = linear(units, vocabulary, generator)
        with torch.no_grad():
            _uniform(self.lstm, units**-0.5, generator)
            for gate in self.lstm.all_weights[0][1].split(units):
                nn.init.orthogonal_(gate, generator=generator)

    def initial_state(self, rows: int) -> State:
        """Zeros for ``rows`` sequences."""
        return _zeros(self.lstm, rows, self.decoder.weight)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor | tuple[Tensor, State]:
        inputs = F.one_hot(tokens, self.vocabulary).to(self.decoder.weight.dtype)
        hidden, after = self.lstm(inputs, state)
        logits = self.decoder(hidden)
        return logits if state is None else (logits, after)


class TiedLSTM(nn.Module):
    """Merity et al.'s language model (2018), which the paper's Appendix E.4 trains: embeddings of 400, LSTM layers of 1150, 1150
    and 400 units, and a softmax layer that has the embedding's weights; 24,221,600 parameters for 10,000 words.

    Takes tokens ``[N, T]`` and returns logits ``[N, T, vocabulary]``.

    Args:
        generator: source of the initial weights.
        vocabulary: tokens.
        embedding: of each token, and units of the last layer.
        units: of the layers before the last.
        layers: of the LSTM.
        embedding_dropout: the chance that a token of the vocabulary is dropped from a whole batch.
        output_dropout: the chance of each feature before the softmax layer.

    Attributes:
        dropout_generator: source of the masks of dropout in training mode; None for torch's own.

    Example:
        >>> net = TiedLSTM(vocabulary=11, embedding=4, units=5)
        >>> net(torch.zeros(2, 3, dtype=torch.long)).shape, net.decoder.weight is net.embedding.weight
        (torch.Size([2, 3, 11]), True)
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        vocabulary: int = 10_000,
        embedding: int = 400,
        units: int = 1150,
        layers: int = 3,
        embedding_dropout: float = 0.0,
        output_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = _bare(nn.Embedding, vocabulary, embedding)
        sizes = [embedding, *[units] * (layers - 1), embedding]
        self.lstms = nn.ModuleList(_lstm(before, after, 1) for before, after in itertools.pairwise(sizes))
        self.decoder = linear(embedding, vocabulary, generator)
        self.decoder.weight = self.embedding.weight
        self.embedding_dropout, self.output_dropout = embedding_dropout, output_dropout
        self.dropout_generator: torch.Generator | None = None
        with torch.no_grad():
            self.embedding.weight.uniform_(-0.1, 0.1, generator=generator)
            self.decoder.bias.zero_()
            for layer, after in zip(self.lstms, sizes[1:], strict=True):
                _uniform(layer, after**-0.5, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        if self.training and self.embedding_dropout:
            hidden = hidden * _mask((len(self.embedding.weight), 1), self.embedding_dropout, self.dropout_generator, hidden)[tokens]
        for layer in self.lstms:
            hidden, _ = layer(hidden)
        if self.training and self.output_dropout:
            hidden = hidden * _mask(hidden.shape, self.output_dropout, self.dropout_generator, hidden)
        logits: Tensor = self.decoder(hidden)
        return logits


def _bare(kind: type[Layer], *sizes: int, **options: Any) -> Layer:
    """A layer without initial weights, and without the draws of torch's global generator that would make them."""
    return cast(Layer, nn.utils.skip_init(kind, *sizes, **options))


def linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """torch's own initial law, U(±1/√inputs), from an explicit generator."""
    layer = _bare(nn.Linear, inputs, outputs)
    with torch.no_grad():
        _uniform(layer, inputs**-0.5, generator)
    return layer


def _conv(inputs: int, outputs: int, kernel: int, generator: torch.Generator | None) -> nn.Conv2d:
    """A convolution that keeps the size of the image, with torch's own initial law from an explicit generator."""
    layer = _bare(nn.Conv2d, inputs, outputs, kernel, padding=kernel // 2)
    with torch.no_grad():
        _uniform(layer, (inputs * kernel**2) ** -0.5, generator)
    return layer


def _lstm(inputs: int, units: int, layers: int) -> nn.LSTM:
    """An LSTM without initial weights, and without the draws of torch's global generator that would make them."""
    with torch.device("meta"):
        lstm = nn.LSTM(inputs, units, layers, batch_first=True)
    return lstm.to_empty(device="cpu")


def _uniform(layer: nn.Module, bound: float, generator: torch.Generator | None) -> None:
    for parameter in layer.parameters():
        parameter.uniform_(-bound, bound, generator=generator)


def _he(layer: nn.Module, generator: torch.Generator | None) -> None:
    """Weights of variance 2/inputs, biases of zero."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    with torch.no_grad():
        layer.weight.normal_(0.0, math.sqrt(2 / layer.weight[0].numel()), generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()


def _zeros(lstm: nn.LSTM, rows: int, like: Tensor) -> State:
    shape = lstm.num_layers, rows, lstm.hidden_size
    return like.new_zeros(shape), like.new_zeros(shape)


def _mask(shape: Sequence[int], chance: float, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Zeros with the given chance, else 1/(1 - chance)."""
    kept = torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - chance, generator=generator)
    return kept / (1 - chance)
