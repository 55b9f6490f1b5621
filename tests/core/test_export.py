"""Export: the clean mean module, and one member's copy, are ordinary modules to torch.export and to ONNX."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from laws import distance
from torch import Tensor, nn

import flipout

N = 3


class Small(nn.Module):
    """Convolution, attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(2, 8, 3, padding=1)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(self.embed(x).transpose(1, 2)).mean(1))
        return y


def recurrent() -> nn.Module:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.rnn(x)[0])
            return y

    return Tagger()


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformer": (Small, (2, 5)),
    "lstm": (recurrent, (4, 5)),
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)), (5,)),
}


def exported(name: str) -> tuple[dict[str, nn.Module], Tensor, dict[str, Tensor]]:
    """The mean module and members 0 and 2 after a training pass, an input, and what each must return."""
    make, shape = MODULES[name]
    torch.manual_seed(0)
    net = flipout.Perturbed(make(), flipout.Gaussian(0.2), generator=torch.Generator().manual_seed(0))
    x = torch.randn(N, *shape)
    net.train()(x).square().mean().backward()
    net.eval()
    with net.hold(members=N) as draw:
        modules = {"mean": net.module, "member 0": draw.module(0).eval(), "member 2": draw.module(2).eval()}
        y = net(x).detach()
    single = {n: y[n : n + 1] for n in range(N)}
    expected = {"mean": net(x).detach(), "member 0": single[0], "member 2": single[2]}
    return modules, x, expected


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")  # of torch's own LSTM, wrapped or not
@pytest.mark.parametrize("name", MODULES)
def test_torch_export(name: str) -> None:
    modules, x, expected = exported(name)
    for kind, module in modules.items():
        batch = torch.export.Dim("batch", min=1, max=64)
        with torch.no_grad():
            program = torch.export.export(module, (torch.cat([x, x]),), dynamic_shapes=({0: batch},))
        y = program.module()(x)
        row = slice(None) if kind == "mean" else slice(int(kind[-1]), int(kind[-1]) + 1)
        assert distance(y[row], expected[kind]) < 1e-5
        assert not any("flipout" in str(node.target) for node in program.graph.nodes)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        assert torch.equal(torch.export.load(buffer).module()(x), y)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", ["transformer", "mlp"])
def test_onnx(name: str) -> None:
    pytest.importorskip("onnxscript", reason="the ONNX exporter needs the onnxscript package")
    runtime = pytest.importorskip("onnxruntime", reason="running the exported graph needs the onnxruntime package")
    modules, x, expected = exported(name)
    for kind in ("mean", "member 2"):
        program = torch.onnx.export(modules[kind], (x,), dynamo=True, verbose=False)
        session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        row = slice(None) if kind == "mean" else slice(2, 3)
        assert distance(torch.from_numpy(y)[row], expected[kind]) < 1e-4


def test_a_member_is_a_plain_copy() -> None:
    modules, x, _ = exported("mlp")
    state = modules["member 0"].state_dict()
    fresh = MODULES["mlp"][0]()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), modules["member 0"](x))
    assert type(modules["member 0"]) is nn.Sequential
    assert all(type(parameter) is nn.Parameter for parameter in modules["member 0"].parameters())
