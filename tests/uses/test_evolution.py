"""Laws of an evolution strategy: the update is the explicit sum, and noise depends on nothing but where it is used."""

import math
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import flipout
from flipout.evolution import EvolutionStrategy
from flipout.evolution.counters import Counters, Place
from flipout.evolution.shaping import centered_rank, find_shaping, sign, zscore

ESTIMATORS = {"flipout": flipout.Flipout(), "low_rank": flipout.LowRank(2), "independent": flipout.Independent()}


class Mixed(nn.Module):
    """A convolution, a norm, a linear map, a gain of its own, and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.LayerNorm(4)
        self.head = nn.Linear(3 * 4 * 4, 5)
        self.gain = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x):
        hidden = torch.relu(self.norm(self.conv(x)))
        return self.head(hidden.flatten(1)) * self.gain * self.frozen


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def raw(fitness):
    return fitness


def total(module, members):
    """A fitness that depends on all weights."""
    return module(torch.linspace(-1, 1, 6 * members.count, dtype=torch.float64).view(-1, 6)).square().sum(1)


@pytest.mark.parametrize("base", ["rademacher", "gaussian"])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("per_base", [None, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_update_is_the_explicit_sum(estimator, per_base, antithetic, base):
    module = Mixed().double()
    std, population = 0.3, 10
    es = EvolutionStrategy(
        module, std, population, estimator=ESTIMATORS[estimator], base=base, members_per_base=per_base, antithetic=antithetic,
        fitness_shaping=raw, seed=3,
    )  # fmt: skip
    means = {name: p.detach().clone() for name, p in module.named_parameters()}
    seen, outputs = [], []
    x = torch.randn(10, 2, 4, 4, dtype=torch.float64)

    def evaluate(module, members):
        seen.extend(members.weights(n) for n in range(members.count))
        y = module(x[members.start : members.start + members.count])
        outputs.append(y)
        return y.sum(1)

    fitness = es.step(evaluate)
    assert len(seen) == population
    for n, weights in enumerate(seen):  # the batched pass is that of the members' weights
        y = torch.func.functional_call(module, weights, (x[n : n + 1],))
        torch.testing.assert_close(torch.cat(outputs)[n : n + 1], y)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, means[name])
        if name == "frozen":
            assert parameter.grad is None
            continue
        explicit = sum(f * (w[name] - means[name]) for f, w in zip(fitness, seen, strict=True)) / (population * std**2)
        torch.testing.assert_close(parameter.grad, -explicit)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_members_2p_and_2p_plus_1_are_mirrored(estimator):
    module = mlp()
    means = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    es = EvolutionStrategy(module, 0.1, 12, estimator=ESTIMATORS[estimator])
    means = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with es.ask() as members:
        for p in range(6):
            plus, minus = members.weights(2 * p), members.weights(2 * p + 1)
            for name, mean in means.items():
                torch.testing.assert_close(plus[name] + minus[name], 2 * mean)
                assert not torch.equal(plus[name], minus[name])


@pytest.mark.parametrize("base", ["rademacher", "gaussian"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chunks_change_nothing_bit_for_bit(estimator, base):
    grads, weights = [], []
    for chunk in (2, 6, 10, 64):
        module = mlp(torch.float32)
        es = EvolutionStrategy(module, 0.1, 26, estimator=ESTIMATORS[estimator], base=base, chunk=chunk, members_per_base=16)
        drawn = []

        def evaluate(module, members, drawn=drawn):
            drawn.extend(members.weights(n) for n in range(members.count))
            return torch.stack([sum(w.sum() for w in each.values()) for each in drawn[-members.count :]])

        es.step(evaluate)
        grads.append([p.grad for p in module.parameters()])
        weights.append(drawn)
    for other, found in zip(grads[1:], weights[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
        assert all(torch.equal(a[name], b[name]) for a, b in zip(weights[0], found, strict=True) for name in a)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_any_member_of_any_generation_is_found_again(estimator):
    module = mlp()
    es = EvolutionStrategy(module, 0.1, 20, estimator=ESTIMATORS[estimator], members_per_base=8, seed=5)
    kept = {}
    for generation in range(3):
        with es.ask(8, 14) as members:
            kept[generation] = [members.module(n).state_dict() for n in range(members.count)]
            assert not any(part._forward_hooks or part._forward_pre_hooks for part in members.module(0).modules())
        es.tell(torch.arange(20.0))
    other = EvolutionStrategy(module, 0.1, 20, estimator=ESTIMATORS[estimator], members_per_base=8, seed=5)
    for generation, states in kept.items():
        for n, state in enumerate(states):
            found = other.member(generation, 8 + n).state_dict()
            assert all(torch.equal(found[name], value) for name, value in state.items())
    assert not torch.equal(kept[0][0]["0.weight"], kept[1][0]["0.weight"])


def test_seeds_generations_bases_and_members_have_noise_of_their_own():
    def weights(seed=0, generation=0, n=0):
        module = mlp()
        return EvolutionStrategy(module, 0.1, 64, members_per_base=32, seed=seed).member(generation, n)[0].weight

    found = [weights(), weights(seed=1), weights(generation=1), weights(n=2), weights(n=32)]
    for i, a in enumerate(found):
        assert not any(torch.equal(a, b) for b in found[:i])


def test_bits_are_fair_and_independent_across_members_and_counters():
    noise, n, size = Counters(7), 4096, 256
    bits = [
        flipout.signs.unpack(noise.bits(place, 0, n, size).contiguous(), size, torch.float64)
        for place in (Place(0, 0, 0), Place(0, 0, 1), Place(1, 0, 0), Place(0, 1, 0))
    ]
    for found in bits:
        assert abs(float(found.mean())) * math.sqrt(n * size) < 4
        columns = found.mean(0) * math.sqrt(n)
        assert float(columns.abs().max()) < 5  # 256 z-scores
        products = (found.t() @ found / math.sqrt(n)).fill_diagonal_(0)
        assert float(products.abs().max()) < 6  # 32,640 of them
        neighbours = (found[1:] * found[:-1]).sum() / math.sqrt((n - 1) * size)
        assert abs(float(neighbours)) < 4
    for i, a in enumerate(bits):
        assert all(abs(float((a * b).sum())) / math.sqrt(n * size) < 4 for b in bits[:i])


def test_normals_follow_their_law():
    z = Counters(0).normals(Place(0, 0, 0), 0, 1000, 999).double().flatten()
    n = len(z)
    assert abs(float(z.mean())) * math.sqrt(n) < 4
    assert abs(float(z.square().mean()) - 1) / math.sqrt(2 / n) < 4
    assert abs(float(z.pow(4).mean()) - 3) / math.sqrt(96 / n) < 4
    edges = torch.linspace(-3, 3, 13, dtype=torch.float64)
    expected = torch.special.ndtr(edges)
    for edge, p in zip(edges, expected, strict=True):
        assert abs(float((z < edge).double().mean() - p)) / math.sqrt(float(p * (1 - p)) / n) < 4.5


def cosine_to_the_gradient(population, **options):
    """Of the update to the true gradient G of a linear fitness tr(Gᵀ W) over a 64 x 96 matrix; G = U Vᵀ of rank 8."""
    module = nn.Linear(96, 64, bias=False)
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(8, 64, generator=generator), torch.randn(8, 96, generator=generator)
    es = EvolutionStrategy(module, 0.1, population, fitness_shaping="zscore", **options)
    es.step(lambda module, members: (module(members.expand(v)) * u).sum((1, 2)))
    return float(torch.cosine_similarity(-module.weight.grad.flatten(), (u.t() @ v).flatten(), 0))


def test_one_gaussian_base_caps_the_cosine_at_one_over_root_three_and_a_rademacher_base_does_not():
    n = 65_536
    rademacher = cosine_to_the_gradient(n, antithetic=False)
    gaussian = cosine_to_the_gradient(n, antithetic=False, base="gaussian")
    assert rademacher >= 0.95  # independent members: 1/√(1 + 6144/65536) = 0.956
    assert 0.5 < gaussian <= 0.6  # 1/√3 = 0.577
    small = cosine_to_the_gradient(4096, antithetic=False, base="gaussian", members_per_base=64)
    assert small > 0.97 / math.sqrt(1 + 6144 / 4096)  # many bases: as independent members


# --- fitness ------------------------------------------------------------------------------------------------------------


def test_shapings():
    fitness = torch.tensor([3.0, 1.0, 3.0, 9.0, -2.0], dtype=torch.float64)
    assert centered_rank(fitness).tolist() == [0.125, -0.25, 0.125, 0.5, -0.5]
    assert centered_rank(torch.ones(1)).tolist() == [-0.5 + 0.0]
    assert centered_rank(torch.arange(101.0)).sum().abs() < 1e-5
    assert zscore(fitness).mean().abs() < 1e-12
    assert (zscore(fitness).std(correction=0) - 1).abs() < 1e-12
    assert zscore(torch.ones(3)).tolist() == [0, 0, 0]
    assert sign(fitness).tolist() == [0, -1, 0, 1, -1]
    for shaping in ("centered_rank", "sign"):  # the order alone counts
        assert torch.equal(find_shaping(shaping)(fitness), find_shaping(shaping)(fitness.exp()))


def test_ranks_are_of_the_whole_population_not_of_a_chunk():
    grads = []
    for chunk in (2, 40):
        module = mlp()
        EvolutionStrategy(module, 0.1, 40, chunk=chunk).step(
            lambda _, members: torch.arange(members.start, members.start + members.count) ** 2
        )
        grads.append(module[0].weight.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0


def test_the_update_climbs():
    module = mlp(torch.float32)
    x, y = torch.randn(30, 6), torch.randn(30, 3)
    es = EvolutionStrategy(module, lambda generation: 0.1 / (1 + 0.1 * generation), 128)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.03, weight_decay=1e-4)

    def evaluate(module, members):
        return members.mean(-(module(members.expand(x)) - y).square())

    first = es.step(evaluate).mean()
    optimiser.step()
    assert es.std == pytest.approx(0.1 / 1.1)
    for _ in range(60):
        last = es.step(evaluate).mean()
        optimiser.step()
    assert last > 0.7 * first


def test_expanded_repeated_and_row_blocks_agree():
    module, x = mlp(), torch.randn(7, 6, dtype=torch.float64)
    for estimator in ESTIMATORS.values():
        es = EvolutionStrategy(module, 0.2, 10, estimator=estimator)
        with es.ask() as members:
            expanded = module(members.expand(x))
            repeated = module(members.repeat(x))
            one = module(members.repeat(x[:1]))
            for n in (0, 9):
                torch.testing.assert_close(expanded[n], members.module(n)(x))
        torch.testing.assert_close(repeated.view(10, 7, 3), expanded)
        torch.testing.assert_close(one, expanded[:, 0])
        assert members.mean(repeated[:, 0]).shape == members.mean(expanded).shape == (10,)
        with pytest.raises(flipout.BatchError, match="do not divide into 10 members"):
            members.mean(torch.ones(12))


def test_a_pair_that_sees_one_batch_shares_its_signed_product(monkeypatch):
    module, x = mlp(), torch.randn(7, 6, dtype=torch.float64)
    counts = []
    for few in (2**20, 0):  # signs as numbers, signs as bits
        monkeypatch.setattr("flipout.evolution.noise._FEW_SIGNS", few)
        es = EvolutionStrategy(module, 0.2, 10, seed=4)
        for rows in ("expand", "repeat"):
            with es.ask() as members, FlopCounterMode(display=False) as counter:
                y = module(members.expand(x) if rows == "expand" else members.repeat(x)).reshape(10, 7, 3)
            counts.append(counter.get_total_flops())
            for n in (0, 1, 9):
                torch.testing.assert_close(y[n], es.member(0, n)(x))
    product = 2 * 7 * 6 * 5  # of the first layer, for one member
    assert counts[1] - counts[0] == (10 - 1) * product + (10 - 5) * product
    assert counts[2:] == counts[:2]


def test_discrete_losses_and_hard_units_learn():
    """Accuracy itself as the fitness of a net with a step function inside: neither has a gradient."""

    class Hard(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.second((self.first(x) > 0).float())

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    module = Hard()
    es = EvolutionStrategy(module, 0.2, 200)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(40):
        es.step(lambda module, members: members.mean((module(members.expand(x)).argmax(2) == labels).double()))
        optimiser.step()
    assert (module(x).argmax(1) == labels).float().mean() > 0.85


def test_sampled_units_learn_under_common_random_numbers():
    """Bernoulli units: what they draw is common to a pair, so that its difference is the weights' alone."""

    class Sampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 16), nn.Linear(16, 2)
            self.uniform = None

        def forward(self, x):
            return self.second((torch.sigmoid(4 * self.first(x)) > self.uniform).float())

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 2, generator=generator)
    labels = (x[:, 0] > 0.3).long()
    module = Sampled()
    es = EvolutionStrategy(module, 0.2, 100)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)

    def evaluate(module, members):
        drawn = [torch.rand(100, 16, generator=torch.Generator().manual_seed(int(seed))) for seed in members.seeds[::2]]
        module.uniform = torch.stack(drawn).repeat_interleave(2, 0)
        return members.mean((module(members.expand(x)).argmax(2) == labels).double())

    first = es.step(evaluate).mean()
    optimiser.step()
    for _ in range(30):
        last = es.step(evaluate).mean()
        optimiser.step()
    assert last > max(0.8, first)


def test_a_pair_shares_its_seeds_and_chunks_do_not_move_them():
    es = EvolutionStrategy(mlp(), 0.1, 20)
    with es.ask() as members:
        seeds = members.seeds
    assert torch.equal(seeds[::2], seeds[1::2])
    assert len(seeds.unique()) == 10
    assert 0 <= int(seeds.min()) <= int(seeds.max()) < 2**31
    with es.ask(6, 10) as members:
        assert torch.equal(members.seeds, seeds[6:10])


# --- state --------------------------------------------------------------------------------------------------------------


def run(generations, state=None):
    module = mlp(torch.float32)
    es = EvolutionStrategy(module, 0.1, 32, seed=1)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    if state is not None:
        es.load_state_dict(state["es"]), module.load_state_dict(state["module"]), optimiser.load_state_dict(state["optimiser"])
    x = torch.linspace(-1, 1, 24).view(4, 6)
    for _ in range(generations):
        es.step(lambda module, members: members.mean(-module(members.expand(x)).square()))
        optimiser.step()
    return {"es": es.state_dict(), "module": module.state_dict(), "optimiser": optimiser.state_dict()}


def test_a_resumed_run_is_the_run(tmp_path):
    torch.save(run(3), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, whole = run(4, state), run(7)
    assert resumed["es"] == whole["es"]
    assert all(torch.equal(resumed["module"][name], value) for name, value in whole["module"].items())


def test_a_state_of_another_strategy_is_refused():
    state = EvolutionStrategy(mlp(), 0.1, 32, seed=1).state_dict()
    with pytest.raises(flipout.ArgumentError, match=r"seed was 1 and is 2; .*antithetic was True and is False"):
        EvolutionStrategy(mlp(), 0.1, 32, seed=2, antithetic=False).load_state_dict(state)


def test_the_module_is_its_own_between_and_after_evaluations():
    module = mlp()
    before = pickle.dumps(module)
    es = EvolutionStrategy(module, 0.1, 8)
    with pytest.raises(ZeroDivisionError):
        es.step(lambda module, members: 1 / 0)
    assert es.generation == 0
    assert pickle.dumps(module) == before
    assert all(p.grad is None for p in module.parameters())
    es.step(total)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 7}, "population=7: antithetic pairs need an even number; add one, or pass antithetic=False"),
        ({"population": 1, "antithetic": False}, "population=1: expected an integer of at least 2"),
        ({"population": 8.0}, "population=8.0: expected an integer"),
        ({"std": 0.0}, "std=0.0: a standard deviation is positive and finite"),
        ({"std": -1}, "std=-1"),
        ({"std": float("nan")}, "std=nan"),
        ({"std": lambda generation: -1.0}, "std=-1.0 at generation 0"),
        ({"members_per_base": 3}, "members_per_base=3: antithetic pairs need an even number"),
        ({"chunk": 3}, "chunk=3: antithetic pairs"),
        ({"base": "cauchy"}, 'base=\'cauchy\': choose "rademacher" or "gaussian"'),
        ({"fitness_shaping": "rank"}, "fitness_shaping='rank': choose 'centered_rank', 'zscore', 'sign'"),
        ({"on_nan": "skip"}, 'on_nan=\'skip\': choose "error" or "worst"'),
        ({"estimator": flipout.Shared()}, "estimator=Shared()"),
        ({"estimator": flipout.Flipout(granularity="token")}, "need weights of their own"),
        ({"seed": -1}, "seed=-1"),
        ({"include": "nothing*"}, "include pattern 'nothing*' matches no parameter"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises((flipout.ArgumentError, flipout.UnsupportedNoiseError), match=re.escape(message)):
        EvolutionStrategy(mlp(), **{"std": 0.1, "population": 8, **options})


def test_bad_fitness_is_refused_and_the_state_kept():
    module = mlp()
    es = EvolutionStrategy(module, 0.1, 8)
    with pytest.raises(flipout.DrawError, match="tell\\(\\) without ask"):
        es.tell(torch.ones(8))
    with es.ask(), pytest.raises(flipout.DrawError, match="tell\\(\\) inside ask"):
        es.tell(torch.ones(8))
    with es.ask(), pytest.raises(flipout.DrawError, match="ask\\(\\) inside ask"), es.ask():
        pass
    with pytest.raises(flipout.ArgumentError, match=r"the fitness has shape \(7,\); expected one number for each of 8 members"):
        es.tell(torch.ones(7))
    with pytest.raises(flipout.ArgumentError, match=r"evaluate returned for members 0 to 7 has shape \(8, 1\)"):
        es.step(lambda module, members: torch.ones(8, 1))
    with pytest.raises(flipout.ArgumentError, match="is a NoneType, not a number"):
        es.step(lambda module, members: None)
    fitness = torch.arange(8.0)
    fitness[3], fitness[6] = float("nan"), float("inf")
    with pytest.raises(
        flipout.ArgumentError, match=r"2 members is not finite \(members 3, 6\); on_nan=\"worst\" makes it the worst"
    ):
        es.tell(fitness)
    assert es.generation == 0
    assert all(p.grad is None for p in module.parameters())
    es.tell(torch.arange(8.0))
    assert es.generation == 1


def test_fitness_that_is_not_finite_can_be_the_worst():
    grads = []
    for bad in (float("nan"), float("inf"), 0.0):
        module = mlp()
        es = EvolutionStrategy(module, 0.1, 8, on_nan="worst")
        fitness = torch.tensor([5.0, 1.0, 7.0, 0.0, 2.0, 3.0, bad, 4.0])
        es.step(lambda module, members, fitness=fitness: fitness)
        grads.append(module[0].weight.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    with pytest.raises(flipout.ArgumentError, match="no member has finite fitness"):
        es.step(lambda module, members: torch.full((8,), float("nan")))


def test_a_shaping_of_ones_own_is_checked():
    module = mlp()
    for shaping, message in (
        (lambda f: f / 0, "not finite for fitness that is"),
        (lambda f: f[1:], r"what fitness_shaping returned has"),
    ):
        with pytest.raises(flipout.ArgumentError, match=message):
            EvolutionStrategy(module, 0.1, 8, fitness_shaping=shaping).step(total)
    assert all(p.grad is None for p in module.parameters())


def test_constant_fitness_warns_and_moves_nothing():
    module = mlp()
    es = EvolutionStrategy(module, 0.1, 8)
    with pytest.warns(UserWarning, match=r"all 8 members of generation 0 have the fitness 2.5"):
        es.step(lambda module, members: torch.full((8,), 2.5))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())
    assert es.generation == 1


def test_dropped_pairs_are_left_out_and_the_rest_is_normalised():
    module, whole = mlp(), mlp()
    es = EvolutionStrategy(module, 0.1, 8, fitness_shaping=raw)
    f, kept = torch.tensor([3.0, 1.0, float("nan"), 5.0, 2.0, 7.0, 0.5, 0.25], dtype=torch.float64), torch.ones(8, dtype=torch.bool)
    kept[2:4] = False
    with es.ask() as members:
        expected = members.weighted_sum(torch.where(kept, f, 0.0))
    es.tell(f, kept=kept)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, -expected[name] / (6 * 0.1**2))
    es = EvolutionStrategy(whole, 0.1, 8)
    with es.ask():
        pass
    half = kept.clone()
    half[2] = True
    with pytest.raises(flipout.ArgumentError, match="one member of an antithetic pair without the other"):
        es.tell(f, kept=half)
    with pytest.raises(flipout.ArgumentError, match="no member is kept"):
        es.tell(f, kept=torch.zeros(8, dtype=torch.bool))
    with pytest.raises(flipout.ArgumentError, match=r"expected torch\.bool"):
        es.tell(f, kept=torch.ones(8))


def test_ranges_that_are_none_are_refused():
    es = EvolutionStrategy(mlp(), 0.1, 16, members_per_base=8)
    for start, stop in ((0, 0), (1, 4), (0, 5), (-2, 2), (8, 18)):
        with pytest.raises(flipout.ArgumentError, match=f"members {start} to {stop}: expected"), es.ask(start, stop):
            pass
    with pytest.raises(flipout.ArgumentError, match="members 0 to 15 span several base perturbations of 8 members"), es.ask():
        pass
    with pytest.raises(flipout.MemberError, match="member 16 is out of range"):
        es.member(0, 16)
    with es.ask(0, 8) as members, pytest.raises(flipout.DrawError, match="fixed by their counters"):
        members.resample([0])


def test_no_warning_is_given_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EvolutionStrategy(mlp(), 0.1, 8).step(total)
