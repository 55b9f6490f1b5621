"""IVON: variational training of a mean-field Gaussian posterior at the price of Adam (Shen et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from flipout.arguments import require_count
from flipout.bayes.pairs import check_options, is_number, mean_scale_pairs, require_all_random, require_number
from flipout.errors import ArgumentError, DrawError

__all__ = ["IVON"]


class IVON(Optimizer):
    """Improved variational online Newton: learns means and scales of a Gaussian posterior.

    The posterior of an entry is N(m, σ²) with σ² = 1 / (λ (h + δ)), where h estimates the diagonal of
    the Hessian of the *mean* loss per example, δ is the weight decay and λ the effective sample size.
    With the gradient ĝ of the mean (Shen et al. 2024, Algorithm 1):

        ĥ ← E_n[ΔW_n ∘ g_n] / σ²                                    (Price's theorem)
        g ← β₁ g + (1 - β₁) ĝ
        h ← β₂ h + (1 - β₂) ĥ + ½ (1 - β₂)² (h - ĥ)² / (h + δ)      (which keeps h + δ positive)
        m ← m - lr · clip((g / (1 - β₁ᵗ) + δ m) / (h + δ))

    E_n[ΔW_n ∘ g_n] is what backward leaves in ``log_std.grad``, since ΔW = ε ∘ exp(log σ): the mean over
    the examples of a batch, each with a ΔW_n of its own where the estimator gives it one. So a step takes
    one forward and one backward pass, and no copy of the weights. Under ``Shared()`` with one sample a
    step this is the algorithm of the package ``ivon-opt``.

    The loss is the mean negative log-likelihood of the batch *without* a KL: the prior N(0, 1 / (λ δ)) is
    in the step. The scales stay in the net (``net.noise_parameters()``), so ``predict``, ``hold`` and the
    net's ``state_dict`` work at any time; the optimiser's has momentum and curvature.

    * *Accumulation*, *several samples a step*: call backward several times before ``step``, each loss
      divided by their number; or pass ``step`` a closure, which is then called ``samples`` times.
    * *Mixed precision*: ``torch.amp.GradScaler`` serves it as any optimiser; its state is at least float32.
    * *DDP*: gradients are means over the ranks, so every rank takes the same step on the noise of all.
    * *Parameters without a gradient* in a step are left as they are, with their curvature.
    * *Schedules*: ``lr``, ``betas``, ``weight_decay``, ``effective_sample_size``, ``temperature`` and
      ``clip`` of ``param_groups[0]`` may be set between steps.
    * *Clipping by norm* scales the curvature with the gradients; use ``clip``.

    Args:
        net: a :class:`flipout.Perturbed` with learnable Gaussian noise, or a module that contains some
            (DDP, Lightning).
        lr: step size; 0.1 and more is usual, since the step is divided by the curvature.
        effective_sample_size: λ, the number of training examples, at least 1.
        hess_init: h at the start, positive; sets all scales. None takes the scales that the net has.
        betas: (β₁, β₂), each from 0 to less than 1. 1 - β₂ is about 1e-5 for long runs, larger for short.
        weight_decay: δ, positive; the precision of the prior is λ δ.
        clip: largest magnitude of a step's direction, entry by entry.
        temperature: τ; the posterior has the scale of λ / τ examples. Below 1 it is cold.
        samples: calls of the closure in a step.
        debias: divide g by 1 - β₁ᵗ (by 1 - Π β₁ where it changes).
        rescale_lr: multiply ``lr`` by the initial h + δ, so that its size means about what it does for SGD.
        rest: what to do about parameters that are trained and not random: ``"raise"``, or ``"ignore"``
            where another optimiser has them.

    Raises:
        ArgumentError: for noise that is not learnable Gaussian with a scale of its own, parameters that are
            random twice, numbers out of range, or parameters that nobody would train. Nothing is changed.

    Example:
        >>> import flipout
        >>> from torch.nn.functional import mse_loss
        >>> x = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
        >>> y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
        >>> net = flipout.Perturbed(nn.Linear(3, 1), flipout.Gaussian(0.1, learnable=True))
        >>> optimiser = IVON(net, lr=0.1, effective_sample_size=256, betas=(0.9, 0.99))
        >>> for _ in range(200):
        ...     optimiser.zero_grad()
        ...     (0.5 * mse_loss(net(x), y)).backward()
        ...     optimiser.step()
        >>> mean = net.module.weight
        >>> bool((mean - torch.tensor([[1.0, -2.0, 0.5]])).abs().max() < 0.05)
        True
        >>> std = net.scales["weight"].exp()  # 1 / √(256 · (1 + δ)) = 0.0625, for inputs of variance one
        >>> bool((std - 0.0625).abs().max() < 0.02)
        True
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float,
        effective_sample_size: float,
        *,
        hess_init: float | None = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-4,
        clip: float = math.inf,
        temperature: float = 1.0,
        samples: int = 1,
        debias: bool = True,
        rescale_lr: bool = True,
        rest: str = "raise",
    ) -> None:
        options: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "effective_sample_size": effective_sample_size,
            "temperature": temperature,
            "clip": clip,
        }
        check_options(options)
        if hess_init is not None:
            good = is_number(hess_init) and math.isfinite(hess_init) and hess_init > 0
            require_number("hess_init", hess_init, good, "positive curvature, or None")
        self.samples = require_count("samples", samples, 1)
        self.debias, self.rescale_lr = bool(debias), bool(rescale_lr)
        if rest not in ("raise", "ignore"):
            raise ArgumentError(f'IVON(rest={rest!r}): choose "raise" or "ignore"')
        pairs = mean_scale_pairs(net)
        require_all_random(net, pairs, rest)
        curvature = _initial(pairs, hess_init, options)
        factor = _mean(curvature) + weight_decay
        groups = [
            {"params": [mean for mean, _ in pairs.values()], "names": list(pairs)},
            {"params": [scale for _, scale in pairs.values()], "names": list(pairs), "weight_decay": 0.0},
        ]
        self._written: dict[int, int] = {}
        super().__init__(groups, options)
        for group in self.param_groups:
            group["lr_factor"] = factor
        for (_, mean, scale), h in zip(self._each(), curvature, strict=True):
            self.state[mean] = {"momentum": torch.zeros_like(h), "hess": h, "decay": 1.0}
            self._write(scale, self.state[mean], options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves means, curvature and scales by the gradients that backward left.

        Args:
            closure: optional; zeroes the gradients, runs the net and backward, and returns the loss. Called ``samples`` times, each
                with a fresh draw; their gradients are averaged.

        Returns:
            The mean loss of the closure's calls, or None.

        Raises:
            ArgumentError: for options out of range or a sparse gradient; DrawError where a mean has
                a gradient and its scale has none, so that the loss was computed without noise, or where scales were moved by
                another optimiser. Nothing is changed then.
        """
        loss = None if closure is None else self._sampled(closure)
        group = self.param_groups[0]
        check_options(group)
        used = list(self._used())
        for _, mean, scale in used:
            self._update(mean, scale, group)
        return loss

    def curvature(self) -> dict[str, Tensor]:
        """The estimate h of the diagonal Hessian by parameter name: copies, in units of loss per squared weight."""
        return {name: self.state[mean]["hess"].clone() for name, mean, _ in self._each()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, and writes the net's scales from the curvature in it.

        Raises:
            ArgumentError: if it is of another net or another optimiser. Nothing is changed then.
        """
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        for i, (_, mean, scale) in enumerate(self._each()):
            own = self.state[mean]
            for key in ("momentum", "hess"):  # torch casts state to the parameter's dtype
                own[key] = saved[i][key].detach().to(device=mean.device, dtype=_wide(mean.dtype), copy=True)
            self._write(scale, own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimiser stands: it knows its parameters by the net.

        Raises:
            ArgumentError: always, from outside.
        """
        if len(self.param_groups) == 2:
            raise ArgumentError(
                "IVON takes its parameters from a net, in pairs of mean and scale; make a new IVON of the net, or another "
                "optimiser for parameters that are not random"
            )
        super().add_param_group(param_group)

    def _each(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, mean and scale of each random parameter."""
        means, scales = self.param_groups
        yield from zip(means["names"], means["params"], scales["params"], strict=True)

    def _used(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Those that the step's backward reached."""
        for name, mean, scale in self._each():
            if mean.grad is None or not mean.requires_grad:
                continue
            if scale.grad is None:
                raise DrawError(
                    f"{name!r} has a gradient and its scale (log_std) has none, so the loss was computed with mean weights: IVON "
                    "needs noise for its curvature; put the net into training mode (net.train()), or run it under net.sampling()"
                )
            if mean.grad.is_sparse or scale.grad.is_sparse:
                raise ArgumentError(
                    f"the gradient of {name!r} is sparse, and IVON moves every entry; pass sparse=False to the layer"
                )
            self._require_own(name, mean, scale)
            yield name, mean, scale

    def _require_own(self, name: str, mean: Tensor, scale: Tensor) -> None:
        """Raises DrawError where somebody else has moved a scale since this optimiser wrote it."""
        if self._written.get(id(scale)) == scale._version:
            return
        expected = _log_std(self.state[mean])
        if not torch.allclose(scale.detach().to(expected.dtype), expected, rtol=1e-2, atol=1e-2):
            raise DrawError(
                f"the scale of {name!r} is not what IVON wrote: another optimiser moves net.noise_parameters() as well, or a "
                "checkpoint of the net was loaded without that of its optimiser; load both (the net first), or make a new IVON "
                "with hess_init=None, which takes the scales as they are"
            )
        self._written[id(scale)] = scale._version

    def _update(self, mean: Tensor, scale: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[mean]
        g, h = state["momentum"], state["hess"]
        beta1, beta2 = group["betas"]
        decay, keep = group["weight_decay"], 1.0 - beta2
        assert mean.grad is not None
        assert scale.grad is not None
        width = h + state["weight_decay"]
        width.mul_(state["examples"])  # 1 / σ², of the draw
        off = width.mul_(scale.grad).sub_(h).mul_(keep)  # (1 - β₂)(ĥ - h)
        precision = h + decay
        h.add_(off).addcdiv_(off.square_(), precision, value=0.5)
        g.mul_(beta1).add_(mean.grad, alpha=1.0 - beta1)
        state["decay"] *= beta1
        torch.add(h, decay, out=precision)
        direction = torch.div(g, 1.0 - state["decay"] if self.debias else 1.0, out=off)
        direction.add_(mean, alpha=decay).div_(precision)
        if math.isfinite(group["clip"]):
            direction.clamp_(-group["clip"], group["clip"])
        mean.add_(direction, alpha=-group["lr"] * (group["lr_factor"] if self.rescale_lr else 1.0))
        self._write(scale, state, group, precision)

    def _write(
        self, scale: Tensor, state: dict[str, Any], options: Mapping[str, Any] | None = None, precision: Tensor | None = None
    ) -> None:
        """Sets the scale to what the curvature says under the options, or under those of the last time."""
        if options is not None:
            state["examples"] = options["effective_sample_size"] / options["temperature"]
            state["weight_decay"] = options["weight_decay"]
        with torch.no_grad():
            scale.copy_(_log_std(state, precision))
        self._written[id(scale)] = scale._version

    def _sampled(self, closure: Callable[[], Any]) -> Any:
        """Calls the closure ``samples`` times, and leaves the mean of the gradients."""
        if self.samples == 1:
            with torch.enable_grad():
                return closure()
        losses: list[Any] = []
        totals: dict[Tensor, Tensor] = {}
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for _ in range(self.samples):
            for tensor in tensors:
                tensor.grad = None
            with torch.enable_grad():
                losses.append(closure())
            for tensor in tensors:
                if tensor.grad is not None:
                    part = tensor.grad / self.samples
                    totals[tensor] = part if tensor not in totals else totals[tensor].add_(part)
                    tensor.grad = None
        for tensor, total in totals.items():
            tensor.grad = total
        return None if any(loss is None for loss in losses) else sum(losses) / self.samples

    def _check_state(self, state_dict: Any) -> None:
        groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
        names = groups[0].get("names") if groups else None
        if names is None or names != self.param_groups[0]["names"] or len(state_dict["state"]) != len(names):
            raise ArgumentError(
                f"load_state_dict: the state is of {'another optimiser' if names is None else names}; expected that of an IVON of "
                f"{self.param_groups[0]['names']}"
            )
        for i, (name, mean, _) in enumerate(self._each()):
            found = tuple(state_dict["state"][i]["hess"].shape)
            if found != tuple(mean.shape):
                raise ArgumentError(f"load_state_dict: the curvature of {name!r} has the shape {found}, not {tuple(mean.shape)}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._written = {}

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("samples", "debias", "rescale_lr")}
        return {**super().__getstate__(), **own}


def _initial(pairs: Mapping[str, tuple[Tensor, Tensor]], hess_init: float | None, options: Mapping[str, Any]) -> list[Tensor]:
    """The curvature to start from, for each parameter."""
    found = []
    for name, (mean, scale) in pairs.items():
        if hess_init is not None:
            found.append(torch.full_like(mean, hess_init, dtype=_wide(mean.dtype), requires_grad=False))
            continue
        examples = options["effective_sample_size"] / options["temperature"]
        h = scale.detach().to(_wide(mean.dtype)).mul(-2.0).exp().div_(examples).sub_(options["weight_decay"])
        if not bool((h > 0).all()):
            prior = 1 / math.sqrt(examples * options["weight_decay"])
            raise ArgumentError(
                f"IVON(hess_init=None): {name!r} has scales up to {float(scale.detach().max().exp()):.3g}, and the prior's is "
                f"{prior:.3g}; a posterior that is wider than its prior has negative curvature: lower the scales or weight_decay, "
                "or give hess_init"
            )
        found.append(h)
    return found


def _mean(tensors: list[Tensor]) -> float:
    """Over all entries."""
    return math.fsum(float(t.double().sum()) for t in tensors) / sum(t.numel() for t in tensors)


def _log_std(state: Mapping[str, Any], precision: Tensor | None = None) -> Tensor:
    """log σ of σ² = 1 / (λ (h + δ)); ``precision`` is h + δ, to be overwritten."""
    found: Tensor = state["hess"] + state["weight_decay"] if precision is None else precision
    return found.mul_(state["examples"]).log_().mul_(-0.5)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state: a curvature that moves by 1e-5 a step is lost in half precision."""
    return dtype if dtype == torch.float64 else torch.float32
