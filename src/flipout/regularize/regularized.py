"""A method on a module: the wrapper ``Regularized``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flipout.errors import ArgumentError
from flipout.perturb import Perturbed
from flipout.regularize.masks import Dropout, EmbeddingDropout
from flipout.regularize.methods import Method
from flipout.regularize.recurrence import Place, check_layer, run_layer

__all__ = ["Regularized"]


class Regularized(nn.Module):
    """Wraps a module so that a :class:`Method` acts on its embeddings, its recurrent layers and its weights.

    In training mode masks and weights are drawn anew at each call; masks that last over a sequence last over one call. In
    evaluation mode the module runs as it is, with its mean weights and, under zoneout, with the zones' expectations. The module
    itself is untouched. Recurrent layers count as stacked in the order in which the module defines them.

    Args:
        module: any module. With ``batch_first`` layers or not, of several layers, bidirectional or projected.
        method: what is dropped or random.
        generator: source of masks and weights; None for torch's global generators.

    Raises:
        ArgumentError: if the module has nothing that the method could act on, or a layer on which it is not defined.

    Example:
        >>> import torch, flipout
        >>> from flipout.regularize import Dropout, Method, Regularized
        >>> lstm = torch.nn.LSTM(3, 5, num_layers=2, batch_first=True)
        >>> method = Method(between=Dropout(0.3), noise=flipout.DropConnect(0.5))
        >>> net = Regularized(lstm, method)
        >>> output, (h, c) = net(torch.ones(2, 7, 3))
        >>> output.shape, torch.equal(*output)  # two equal sequences, two weights
        (torch.Size([2, 7, 5]), False)
        >>> torch.equal(net.eval()(torch.ones(2, 7, 3))[0], lstm(torch.ones(2, 7, 3))[0])
        True
    """

    def __init__(self, module: nn.Module, method: Method, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.method = method
        self.net = module
        if method.noise is not None:
            self.net = Perturbed(module, method.noise, method.estimator, method.include, generator=generator)
        self.generator = generator
        self._sampling = False
        layers = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.RNNBase)]
        tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
        dropouts = [part for part in module.modules() if isinstance(part, nn.Dropout)]
        if method.masked and not layers:
            raise ArgumentError(f"{type(module).__name__} has no nn.LSTM, nn.GRU or nn.RNN, whose activations {method} would drop")
        if method.embedding is not None and not tables:
            raise ArgumentError(f"{type(module).__name__} has no nn.Embedding, whose words {method.embedding} would drop")
        if method.dropouts is not None and not dropouts:
            raise ArgumentError(f"{type(module).__name__} has no nn.Dropout, in whose place {method.dropouts} would be")
        for name, layer in layers:
            check_layer(name, layer, method)
        self._layers = [layer for _, layer in layers] if method.masked else []
        self._tables = tables[:1] if method.embedding is not None else []
        self._dropouts = dropouts if method.dropouts is not None else []

    @property
    def module(self) -> nn.Module:
        """The clean module: save it, export it, ship it."""
        return self.net.module if isinstance(self.net, Perturbed) else self.net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module. All arguments are its own."""
        active = self.training or self._sampling
        if not active and self.method.zoneout is None:
            return self.net(*args, **kwargs)
        with _replaced(list(self._forwards(active))):
            return self.net(*args, **kwargs)

    def _forwards(self, active: bool) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """What runs in place of the forward of each part."""
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            yield layer, partial(run_layer, layer, Place(i == 0, i == last), self.method, active, self.generator)
        if active and self.method.dropouts is not None:
            for part in self._dropouts:
                yield part, partial(_drop, self.method.dropouts, self.generator)
        if active and self.method.embedding is not None:
            for table in self._tables:
                yield table, partial(_embed, table, table.forward, self.method.embedding, self.generator)

    @contextmanager
    def sampling(self) -> Iterator[Regularized]:
        """Draws masks and weights in evaluation mode as well."""
        before, self._sampling = self._sampling, True
        try:
            if isinstance(self.net, Perturbed):
                with self.net.sampling():
                    yield self
            else:
                yield self
        finally:
            self._sampling = before

    @contextmanager
    def drawing(self, members: int, generator: torch.Generator | None) -> Iterator[Regularized]:
        """Holds one draw of the weights for all calls inside, and takes masks, anew at each call, from the generator.

        Args:
            members: sequences of a batch, as for :meth:`flipout.Perturbed.hold`.
            generator: source of the weights and the masks; on the device of the module.

        Raises:
            ArgumentError, DrawError, BatchError: as :meth:`flipout.Perturbed.hold`.

        Example:
            >>> import torch, flipout
            >>> from flipout.regularize import CHAR, Regularized
            >>> net = Regularized(torch.nn.LSTM(3, 4, batch_first=True), CHAR["gaussian-flipout"])
            >>> x = torch.ones(2, 6, 3)
            >>> with net.drawing(2, torch.Generator().manual_seed(0)):  # a window in two halves, one set of weights a sequence
            ...     first, state = net(x[:, :3])
            ...     second, state = net(x[:, 3:], state)
            >>> with net.drawing(2, torch.Generator().manual_seed(0)):
            ...     whole, state = net(x)
            >>> torch.testing.assert_close(torch.cat([first, second], 1), whole)
        """
        before, self.generator = self.generator, generator
        try:
            if isinstance(self.net, Perturbed):
                with self.net.hold(members, generator):
                    yield self
            else:
                yield self
        finally:
            self.generator = before

    def extra_repr(self) -> str:
        return str(self.method)


def _embed(
    table: nn.Embedding,
    forward: Callable[[Tensor], Tensor],
    dropout: EmbeddingDropout,
    generator: torch.Generator | None,
    tokens: Tensor,
) -> Tensor:
    """Embeddings ``[rows, ..., features]`` of tokens ``[rows, ...]``, without the words that are dropped."""
    found = forward(tokens)
    mask = dropout.mask(len(tokens), table.num_embeddings, like=found, generator=generator)
    kept = mask[0][tokens] if len(mask) == 1 else mask.gather(1, tokens.flatten(1)).view(tokens.shape)
    return found * kept.unsqueeze(-1)


def _drop(dropout: Dropout, generator: torch.Generator | None, value: Tensor) -> Tensor:
    """In place of an ``nn.Dropout`` on ``[rows, steps, features]``."""
    if value.dim() != 3:
        raise ArgumentError(f"an nn.Dropout got a tensor of shape {tuple(value.shape)}; {dropout} takes [rows, steps, features]")
    rows, steps, features = value.shape
    return value * dropout.mask(steps, rows, features, like=value, generator=generator).transpose(0, 1)


@contextmanager
def _replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Gives modules other forwards for a while; hooks go on as ever."""
    before = [(part, part.__dict__.get("forward")) for part, _ in forwards]
    try:
        for part, forward in forwards:
            part.__dict__["forward"] = forward
        yield
    finally:
        for part, own in before:
            if own is None:
                part.__dict__.pop("forward", None)
            else:
                part.__dict__["forward"] = own
