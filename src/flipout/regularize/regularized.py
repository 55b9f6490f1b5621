"""A method on a module: the wrapper ``Regularized``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from flipout.arguments import is_count
from flipout.errors import ArgumentError, BatchError
from flipout.perturb import Perturbed
from flipout.regularize.masks import Dropout, EmbeddingDropout
from flipout.regularize.methods import Method
from flipout.regularize.recurrence import Ends, check_layer, run_layer
from flipout.regularize.replaced import current_forward, replaced
from flipout.rows import rows_dim

__all__ = ["Regularized"]


class _State(NamedTuple):
    """What a context has set for a wrapper."""

    sampling: bool
    generator: torch.Generator | None


#: By the wrapper: threads and asynchronous tasks do not see each other's.
_states: ContextVar[Mapping[Regularized, _State] | None] = ContextVar("flipout_regularized_states", default=None)


class Regularized(nn.Module):
    """Wraps a module so that a :class:`Method` acts on its embeddings, its recurrent layers and its weights.

    In training mode masks and weights are drawn anew at each call; masks that last over a sequence last over one call. In
    evaluation mode the module runs as it is, with its mean weights and, under zoneout, with the zones' expectations. The module
    itself is untouched. Recurrent layers count as stacked in the order in which the module defines them.

    Args:
        module: any module. With ``batch_first`` layers or not, of several layers, bidirectional or projected.
        method: what is dropped or random.
        generator: source of masks and weights; None for torch's global generators.
        batch_dim: the dimension of the module's inputs that counts the sequences: 0 for tokens ``[N, T]``, 1 for ``[T, N]``. None
            for that of the recurrent layers (their ``batch_first``), and 0 without any.

    Raises:
        ArgumentError: if the module has nothing that the method could act on, or a layer on which it is not defined; if
            ``batch_dim`` contradicts the only layer's ``batch_first``, or layers differ in theirs and it is not given.
        BatchError: from calls, where the words and the recurrent layers have different numbers of sequences.

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

    def __init__(
        self, module: nn.Module, method: Method, generator: torch.Generator | None = None, batch_dim: int | None = None
    ) -> None:
        super().__init__()
        self.method = method
        self.batch_dim = _batch_dim(module, method, batch_dim)
        self.net = module
        if method.noise is not None:
            self.net = Perturbed(
                module, method.noise, method.estimator, method.include, batch_dim=self.batch_dim, generator=generator
            )
        self.generator = generator
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
        state = self._state()
        active = self.training or state.sampling
        if not active and self.method.zoneout is None:
            return self.net(*args, **kwargs)
        with replaced(list(self._forwards(active, state.generator))):
            return self.net(*args, **kwargs)

    def _state(self) -> _State:
        return (_states.get() or {}).get(self, _State(False, self.generator))

    @contextmanager
    def _set(self, **changes: Any) -> Iterator[None]:
        token = _states.set({**(_states.get() or {}), self: self._state()._replace(**changes)})
        try:
            yield
        finally:
            _states.reset(token)

    def _forwards(self, active: bool, generator: torch.Generator | None) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """What runs instead of the forward of each part."""
        last = len(self._layers) - 1
        sequences = _Sequences(self.batch_dim)
        for i, layer in enumerate(self._layers):
            run = partial(run_layer, layer, Ends(i == 0, i == last), self.method, active, generator)
            yield layer, partial(_recur, sequences, layer, run)
        if active and self.method.dropouts is not None:
            for part in self._dropouts:
                yield part, partial(_drop, self.method.dropouts, self.batch_dim, generator)
        if active and self.method.embedding is not None:
            for table in self._tables:
                yield table, partial(_embed, sequences, table, current_forward(table), self.method.embedding, generator)

    @contextmanager
    def sampling(self) -> Iterator[Regularized]:
        """Draws masks and weights in evaluation mode as well."""
        with self._set(sampling=True):
            if isinstance(self.net, Perturbed):
                with self.net.sampling():
                    yield self
            else:
                yield self

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
        with self._set(generator=generator):
            if isinstance(self.net, Perturbed):
                with self.net.hold(members, generator):
                    yield self
            else:
                yield self

    def extra_repr(self) -> str:
        return str(self.method)


def _batch_dim(module: nn.Module, method: Method, batch_dim: int | None) -> int:
    """The dimension that counts the sequences in the module's inputs."""
    if batch_dim is not None and not is_count(batch_dim, 0):
        raise ArgumentError(f"Regularized(batch_dim={batch_dim!r}): expected the index of a dimension, 0 or more")
    layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.RNNBase)}
    dims = {0 if layer.batch_first else 1 for layer in layers.values()}
    if batch_dim is None:
        per_sequence = method.embedding is not None and method.embedding.per == "sequence"
        if len(dims) > 1 and (per_sequence or method.noise is not None or method.dropouts is not None):
            told = ", ".join(f"{name!r}" for name in layers)
            raise ArgumentError(
                f"the recurrent layers {told} differ in batch_first, so the dimension that counts the sequences of the inputs is "
                "not known: pass batch_dim=0 for inputs [N, T], or batch_dim=1 for [T, N]"
            )
        return rows_dim(module, max(dims) if len(dims) == 1 else 0)
    own = rows_dim(module, batch_dim)
    if own != batch_dim:
        raise ArgumentError(
            f"Regularized(batch_dim={batch_dim}): {type(module).__name__} begins with a layer whose batch_first says that "
            f"dimension {own} counts the sequences; leave batch_dim out, or set batch_first={batch_dim == 0}"
        )
    return batch_dim


class _Sequences:
    """How many sequences a call has: the same for the words as for the recurrent layers."""

    def __init__(self, batch_dim: int) -> None:
        self.batch_dim = batch_dim
        self.rows: int | None = None

    def words(self, tokens: Tensor) -> int:
        """Counts the sequences of tokens, one where they have no such dimension."""
        rows = tokens.shape[self.batch_dim] if tokens.dim() > self.batch_dim else 1
        self.rows = rows
        return rows

    def require(self, rows: int, layer: nn.RNNBase) -> None:
        """Raises BatchError for a layer with another number of sequences than the words."""
        if self.rows is not None and rows != self.rows:
            other = 1 if self.batch_dim == 0 else 0
            raise BatchError(
                f"the words have {self.rows} sequences on batch_dim={self.batch_dim}, and nn.{type(layer).__name__}(batch_first="
                f"{layer.batch_first}) got {rows}: a mask would not last over a sequence; pass Regularized(..., batch_dim={other}) "
                "if that dimension of the tokens counts the sequences"
            )


def _recur(sequences: _Sequences, layer: nn.RNNBase, run: Callable[..., Any], x: Any, hx: Any = None) -> Any:
    if not isinstance(x, PackedSequence):
        sequences.require(1 if x.dim() == 2 else x.shape[0 if layer.batch_first else 1], layer)
    return run(x, hx)


def _embed(
    sequences: _Sequences,
    table: nn.Embedding,
    forward: Callable[[Tensor], Tensor],
    dropout: EmbeddingDropout,
    generator: torch.Generator | None,
    input: Tensor,
) -> Tensor:
    """Embeddings ``[*tokens, features]`` without the words that are dropped; the batch dimension counts the sequences."""
    found, dim = forward(input), sequences.batch_dim
    rows = sequences.words(input) if dropout.per == "sequence" else 1
    mask = dropout.mask(rows, table.num_embeddings, like=found, generator=generator)
    if len(mask) == 1:
        return found * mask[0][input].unsqueeze(-1)
    by_row = input.movedim(dim, 0)
    kept = mask.gather(1, by_row.reshape(rows, -1)).view(by_row.shape).movedim(0, dim)
    return found * kept.unsqueeze(-1)


def _drop(dropout: Dropout, batch_dim: int, generator: torch.Generator | None, input: Tensor) -> Tensor:
    """Instead of an ``nn.Dropout`` on ``[rows, steps, features]``, or ``[steps, rows, features]``."""
    if input.dim() != 3 or batch_dim > 1:
        wanted = "[rows, steps, features]" if batch_dim == 0 else "[steps, rows, features]"
        raise ArgumentError(
            f"an nn.Dropout got a tensor of shape {tuple(input.shape)}; with batch_dim={batch_dim} {dropout} takes {wanted}"
        )
    rows, steps, features = input.shape[batch_dim], input.shape[1 - batch_dim], input.shape[2]
    mask = dropout.mask(steps, rows, features, like=input, generator=generator)
    return input * (mask.transpose(0, 1) if batch_dim == 0 else mask)
