"""Recurrent layers under the paper's methods in plain Python: lists of floats, one sequence and one unit at a time.

Written from the definitions: Appendix D (19)-(22) for the LSTM, and each method's own paper for where its mask is.
"""

import math


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def matvec(W, x):
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in W]


def add(*vectors):
    return [sum(values) for values in zip(*vectors, strict=True)]


def times(x, mask):
    return x if mask is None else [v * m for v, m in zip(x, mask, strict=True)]


def mix(old, new, zones):
    return new if zones is None else [z * o + (1 - z) * n for o, n, z in zip(old, new, zones, strict=True)]


def cell(mode, W, x, h, c, update_mask):
    """New h and c. W: weight_ih, weight_hh, bias_ih, bias_hh as nested lists."""
    gx, gh = add(matvec(W[0], x), W[2]), add(matvec(W[1], h), W[3])
    units = len(c)
    if mode == "GRU":
        r = [sigmoid(gx[j] + gh[j]) for j in range(units)]
        z = [sigmoid(gx[units + j] + gh[units + j]) for j in range(units)]
        n = [math.tanh(gx[2 * units + j] + r[j] * gh[2 * units + j]) for j in range(units)]
        update = times([(1 - z[j]) * n[j] for j in range(units)], update_mask)
        return z, update
    gates = add(gx, gh)
    if mode.startswith("RNN"):
        return [math.tanh(g) if mode == "RNN_TANH" else max(g, 0.0) for g in gates], None
    i = [sigmoid(g) for g in gates[:units]]
    f = [sigmoid(g) for g in gates[units : 2 * units]]
    g = [math.tanh(v) for v in gates[2 * units : 3 * units]]
    o = [sigmoid(v) for v in gates[3 * units :]]
    c = add(times(f, c), times(times(i, g), update_mask))
    return [o[j] * math.tanh(c[j]) for j in range(units)], c


class Masks:
    """The zeros and ones that were drawn, in their order, as masks of one sequence at one step."""

    def __init__(self, drawn):
        self.left = [mask.tolist() for mask in drawn]

    def take(self, p):
        """The next one, as a function of step and sequence; scaled by 1/(1-p)."""
        mask = self.left.pop(0)

        def at(t, n):
            step = mask[t] if len(mask) > 1 else mask[0]  # one that lasts over the sequence, or one a step
            return [v / (1 - p) for v in step[n]]

        return at

    def zones(self):
        mask = self.left.pop(0)
        return lambda t, n: mask[t][n]


def run(mode, weights, xs, method, masks, states, active=True):
    """A stack of layers over sequences.

    Args:
        weights: ``weights[n][k]``: of sequence n, layer k, the four tensors as nested lists.
        xs: ``xs[n][t]``: inputs.
        states: ``h[k][n]`` and ``c[k][n]``.

    Returns:
        Outputs ``[n][t]``, last h and c ``[k][n]``.
    """
    h, c = states
    rows, steps = len(xs), len(xs[0])
    units = len(h[0][0])
    none = lambda t, n: None  # noqa: E731

    def next_mask(dropout):
        return masks.take(dropout.p) if dropout is not None and active else none

    mask = next_mask(method.inputs)
    ys = [[times(xs[n][t], mask(t, n)) for t in range(steps)] for n in range(rows)]
    last_h, last_c = [], []
    for k in range(len(h)):
        if k:
            mask = next_mask(method.between)
            ys = [[times(ys[n][t], mask(t, n)) for t in range(steps)] for n in range(rows)]
        hidden, update = next_mask(method.hidden), next_mask(method.update)
        zone_c = zone_h = none
        if method.zoneout is not None:
            expected = {"cell": method.zoneout.cell, "hidden": method.zoneout.hidden}
            if mode == "LSTM" and method.zoneout.cell:
                zone_c = masks.zones() if active else (lambda t, n, p=expected["cell"]: [p] * units)
            if method.zoneout.hidden:
                zone_h = masks.zones() if active else (lambda t, n, p=expected["hidden"]: [p] * units)
        outputs, hs, cs = [], [], []
        for n in range(rows):
            state, memory, out = h[k][n], c[k][n], []
            for t in range(steps):
                new, second = cell(mode, weights[n][k], ys[n][t], times(state, hidden(t, n)), memory, update(t, n))
                if mode == "GRU":
                    new = add(times(new, state), second)  # z ∘ h + update
                state = mix(state, new, zone_h(t, n))
                memory = mix(memory, second, zone_c(t, n)) if mode == "LSTM" else memory
                out.append(state)
            outputs.append(out)
            hs.append(state)
            cs.append(memory)
        ys = outputs
        last_h.append(hs)
        last_c.append(cs)
    mask = next_mask(method.outputs)
    return [[times(ys[n][t], mask(t, n)) for t in range(steps)] for n in range(rows)], last_h, last_c
