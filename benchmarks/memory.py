"""How much memory does a training step of a perturbed layer hold and peak at, against the plain layer?"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flipout
from benchmarks import peers
from benchmarks.harness import MIN_ROUNDS, PATIENCE, THREADS, forward_backward
from benchmarks.report import Row, Section, Target

LINEAR = (8192, 784, 512)
CONV_INPUT = (64, 64, 32, 32)
STD = 0.05
MARGIN = 1.10
MIB = 2**20

TEXT = f"""*saved*: bytes that autograd keeps between forward and backward, seen through `saved_tensors_hooks`; each storage counts
once and whole, parameters (noise scales included) not at all, the layer's input does. *bound*: what the plain layer keeps, one ΔW,
and one bit per sign, and {100 * (MARGIN - 1):.0f} % on top. *peak*: how far the resident set of a fresh process climbs during one
step, forward and backward, after the layer, its input and a small step have been made; gradients and the output are part of it."""


def _layer(kind: str, make: Callable[[], nn.Module], peer: Callable[[], nn.Module]) -> nn.Module:
    if kind == "plain":
        return make()
    if kind == "bayesian-torch":
        return peer()
    return flipout.Perturbed(make(), flipout.Gaussian(STD, learnable=kind == "learnable"))


def build(case: str, kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The layer, its input, and a small input to warm up on."""
    torch.manual_seed(0)
    if case == "linear":
        rows, width, out = LINEAR
        net = _layer(kind, lambda: nn.Linear(width, out), lambda: peers.linear(width, out))
        return net, torch.randn(rows, width, requires_grad=True), torch.randn(8, width, requires_grad=True)
    net = _layer(kind, lambda: nn.Conv2d(64, 64, 3, padding=1), lambda: peers.conv2d(64, 64, 3, 1))
    return net, torch.randn(CONV_INPUT, requires_grad=True), torch.randn(2, 64, 8, 8, requires_grad=True)


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that one forward pass saves for backward, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y: Any = net(x)  # kept alive, so that no storage is freed and its address used again
    del y
    return sum(storages.values())


def bound(case: str, plain: int) -> float:
    """Plain, one ΔW, one bit per sign, and the margin."""
    net, x, _ = build(case, "plain")
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    kernel = net.get_parameter("weight")
    signs = x.shape[0] * (kernel.shape[0] + kernel.shape[1])
    return MARGIN * (plain + weights + signs / 8)


def peak_bytes(case: str, kind: str) -> int:
    """The climb of the resident set during one step, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case", case, "--kind", kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def _peak_here(case: str, kind: str) -> int:
    torch.set_num_threads(THREADS)
    net, x, small = build(case, kind)
    forward_backward(net, small)()
    step = forward_backward(net, x)
    before = _resident_peak()
    step()
    return _resident_peak() - before


def _resident_peak() -> int:
    """Peak resident bytes of this process. Not ``ru_maxrss`` on Linux, which a child inherits from its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """Counts saved bytes and the peak for a linear layer and a convolution. Nothing is timed, so both arguments are idle."""
    section = Section("memory", "Memory of a training step", TEXT)
    kinds = ["plain", "learnable", "fixed"]
    missing = peers.why_missing()
    if missing:
        section.notes.append(missing)
    else:
        kinds.append("bayesian-torch")
    names = {"linear": "linear [8192, 784] → 512", "conv": "conv2d 64 → 64, 3×3, [64, 64, 32, 32]"}
    for case, name in names.items():
        saved = {kind: saved_bytes(*build(case, kind)[:2]) for kind in kinds}
        limit = bound(case, saved["plain"])
        for kind in kinds:
            cells = {"layer": kind, "saved, MiB": saved[kind] / MIB, "/ plain": saved[kind] / saved["plain"]}
            section.rows.append(Row(name, {**cells, "bound, MiB": limit / MIB, "peak, MiB": peak_bytes(case, kind) / MIB}))
        if case == "linear":
            for kind in ("learnable", "fixed"):
                section.targets.append(Target(f"saved, {name}, {kind}, MiB", saved[kind] / MIB, round(limit / MIB, 2)))
    return section


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=["linear", "conv"])
    parser.add_argument("--kind", choices=["plain", "learnable", "fixed", "bayesian-torch"])
    chosen = parser.parse_args()
    print(_peak_here(chosen.case, chosen.kind) if chosen.case else run().markdown())
