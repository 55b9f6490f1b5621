"""The methods of the paper's Tables 2 and 3 by name, with the settings of its Appendix D."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from flipout.errors import ArgumentError
from flipout.estimators import Estimator, Flipout, Shared
from flipout.noise import DropConnect, MultiplicativeGaussian, Noise
from flipout.regularize.masks import Dropout, EmbeddingDropout, Zoneout

__all__ = ["CHAR", "TRANSFORMER", "WORD", "Method"]


@dataclass(frozen=True)
class Method:
    """What is dropped or random in a recurrent model. Nothing, by default.

    Attributes:
        embedding: words, at the module's first ``nn.Embedding``.
        inputs: what the first recurrent layer reads.
        between: what a recurrent layer reads from the one below.
        outputs: what the last recurrent layer gives.
        hidden: the hidden state on its way into its own hidden-to-hidden matrix, h_{t-1} ∘ m; the gates share the mask.
        update: the update of the cell, c_t = f ∘ c_{t-1} + m ∘ (i ∘ g), or of a GRU's hidden state (Semeniuta et al. 2016).
        zoneout: units that keep their value.
        dropouts: what every ``nn.Dropout`` of the module does, instead of its own: the residual branches of a transformer.
        noise: the law of the random weights, if there are any.
        estimator: how the sequences of a batch share a draw of them.
        include: name pattern of the random weights; by default all hidden-to-hidden matrices.

    Raises:
        ArgumentError: for ``update`` and ``zoneout`` together, which nothing defines.

    Example:
        >>> Method(noise=MultiplicativeGaussian(1.0), estimator=Flipout()) == CHAR["gaussian-flipout"]
        True
    """

    embedding: EmbeddingDropout | None = None
    inputs: Dropout | None = None
    between: Dropout | None = None
    outputs: Dropout | None = None
    hidden: Dropout | None = None
    update: Dropout | None = None
    zoneout: Zoneout | None = None
    dropouts: Dropout | None = None
    noise: Noise | None = None
    estimator: Estimator = Flipout()  # noqa: RUF009  (frozen)
    include: str = "*weight_hh*"

    def __post_init__(self) -> None:
        if self.update is not None and self.zoneout is not None:
            raise ArgumentError("update= and zoneout= both change how a cell moves; no paper defines them together, name one")

    @property
    def recurrent(self) -> bool:
        """Whether it changes the recurrence itself, so that a layer must be run step by step."""
        return self.hidden is not None or self.update is not None or self.zoneout is not None

    @property
    def masked(self) -> bool:
        """Whether recurrent layers have masks of any kind."""
        return self.recurrent or any(mask is not None for mask in (self.inputs, self.between, self.outputs))


_GAUSSIAN = Method(noise=MultiplicativeGaussian(1.0), estimator=Shared())

#: Table 2, the character model: no dropout at inputs and outputs, which are one-hot vectors and logits.
CHAR: Mapping[str, Method] = MappingProxyType(
    {
        "none": Method(),
        "semeniuta": Method(update=Dropout(0.25, per="step")),
        "zoneout": Method(zoneout=Zoneout(cell=0.5, hidden=0.05)),
        "gal": Method(hidden=Dropout(0.25)),
        "gaussian": _GAUSSIAN,
        "gaussian-flipout": replace(_GAUSSIAN, estimator=Flipout()),
    }
)

_STEP, _LOCKED = Dropout(0.5, per="step"), Dropout(0.4)
_WORDS = EmbeddingDropout(0.1)
_WD = Method(
    embedding=_WORDS, inputs=_LOCKED, between=Dropout(0.3), outputs=_LOCKED, noise=DropConnect(0.5), estimator=Shared()
)  # fmt: skip

#: Table 3, the word model. The paper leaves open whether a mask at inputs and outputs lasts (under Gal's and Merity's methods it
#: does by their definition; else it is drawn at each step), what lies between layers where it says "in/out" (the same), and the
#: dropout of Zaremba's model, whose own medium one of this size has 0.5.
WORD: Mapping[str, Method] = MappingProxyType(
    {
        "none": Method(),
        "zaremba": Method(embedding=_WORDS, inputs=_STEP, between=_STEP, outputs=_STEP),
        "semeniuta": Method(embedding=_WORDS, inputs=_STEP, between=_STEP, outputs=_STEP, update=Dropout(0.3, per="step")),
        "gal": Method(
            embedding=EmbeddingDropout(0.2, per="sequence"), inputs=Dropout(0.35), between=Dropout(0.35), outputs=Dropout(0.35),
            hidden=Dropout(0.2),
        ),
        "zoneout": Method(
            embedding=_WORDS, inputs=_STEP, between=_STEP, outputs=_STEP, zoneout=Zoneout(cell=0.25, hidden=0.025)
        ),
        "wd": _WD,
        "wd-flipout": replace(_WD, estimator=Flipout()),
    }
)  # fmt: skip

_BLOCKS = "*.h.*.c_*.weight"
_WD_BLOCKS = Method(embedding=_WORDS, dropouts=Dropout(0.1), noise=DropConnect(0.5), estimator=Shared(), include=_BLOCKS)

#: Beyond the paper: the same noises on the matrices of a GPT-2's blocks, and dropout at its residual branches, a mask a token or a
#: mask a sequence. What is defined on a recurrence alone (Semeniuta, Zoneout) has no row.
TRANSFORMER: Mapping[str, Method] = MappingProxyType(
    {
        "none": Method(),
        "zaremba": Method(embedding=_WORDS, dropouts=Dropout(0.1, per="step")),
        "gal": Method(embedding=EmbeddingDropout(0.1, per="sequence"), dropouts=Dropout(0.1)),
        "gaussian": replace(_GAUSSIAN, include=_BLOCKS),
        "gaussian-flipout": replace(_GAUSSIAN, estimator=Flipout(), include=_BLOCKS),
        "wd": _WD_BLOCKS,
        "wd-flipout": replace(_WD_BLOCKS, estimator=Flipout()),
    }
)
