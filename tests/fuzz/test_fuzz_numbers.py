"""Statistics of any numbers: those of a plain computation, or a clear error."""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from clear import attempt
from hypothesis import given, settings
from hypothesis import strategies as st

from flipout import bayes, data
from flipout.intervals import Estimate, combine, estimate_mean, log_log_slope, ratio, t_quantile
from flipout.moments import Moments
from flipout.storage.files import plain, read_json, write_json

ANY = st.floats(allow_nan=True, allow_infinity=True)
TAME = st.floats(-1e6, 1e6)


@given(st.lists(st.lists(TAME, min_size=3, max_size=3), max_size=6), TAME)
def test_moments_are_means_and_variances(rows, shift):
    moments = Moments()
    values = torch.tensor(rows, dtype=torch.float64).view(-1, 3) + shift
    for row in values:
        moments.add({"w": row})
    found = attempt(moments.variance)
    assert (found is not None) is (len(rows) >= 2)
    if found is not None:
        assert found["w"] == pytest.approx(float(values.var(0).sum()), rel=1e-6, abs=1e-4)
        assert moments.mean["w"].tolist() == pytest.approx(values.mean(0).tolist(), rel=1e-9, abs=1e-6)


@given(st.lists(TAME, max_size=6), st.floats(-0.5, 1.5))
def test_a_mean_has_student_s_interval(samples, confidence):
    found = attempt(lambda: estimate_mean(samples, confidence))
    if found is None:
        assert not samples or not 0 < confidence < 1
        return
    assert found.value == pytest.approx(statistics.fmean(samples), abs=1e-9)
    if len(samples) > 1 and max(samples) > min(samples) and confidence > 1e-4:  # below, SciPy rounds (1 + confidence) / 2
        half = scipy.stats.t.ppf((1 + confidence) / 2, len(samples) - 1) * np.std(samples, ddof=1) / len(samples) ** 0.5
        assert found.high - found.value == pytest.approx(half, rel=1e-3, abs=1e-9)
    elif len(samples) == 1:
        assert found.high == math.inf


@given(st.floats(-0.5, 1.5), st.floats(-1.0, 300.0))
def test_quantiles_are_student_s(confidence, degrees):
    found = attempt(lambda: t_quantile(confidence, degrees))
    assert (found is not None) is (0 < confidence < 1 and degrees >= 1)
    if found is not None and 0.01 < confidence < 0.995:
        assert found == pytest.approx(scipy.stats.t.ppf((1 + confidence) / 2, degrees), rel=1e-2)


def estimates(value):
    return st.builds(lambda v, e, d: Estimate(v, v - e, v + e, e, d), value, st.floats(0, 1e3), st.integers(1, 50))


@given(estimates(TAME), estimates(TAME), TAME, TAME)
def test_sums_and_ratios_of_estimates(a, b, first, second):
    found = combine([first, second], [a, b])
    assert found.value == pytest.approx(first * a.value + second * b.value, rel=1e-9, abs=1e-6)
    error = math.hypot(first * a.standard_error, second * b.standard_error)
    assert found.standard_error == pytest.approx(error, rel=1e-9, abs=1e-12)
    share = attempt(lambda: ratio(a, b))
    assert (share is not None) is (a.value > 0 and b.value > 0)
    if share is not None:
        assert share.value == pytest.approx(a.value / b.value, rel=1e-9)
        assert share.low <= share.value <= share.high


@given(st.lists(st.tuples(st.floats(0.5, 1e4), estimates(st.floats(-1.0, 1e4))), max_size=5))
def test_a_slope_is_that_of_least_squares(points):
    sizes, found = [size for size, _ in points], [each for _, each in points]
    slope = attempt(lambda: log_log_slope(sizes, found))
    fits = len(set(sizes)) >= 2 and all(each.value > 0 for each in found)
    assert (slope is not None) is fits
    if fits and min(abs(math.log(a / b)) for a in set(sizes) for b in set(sizes) if a != b) > 1e-3:
        expected = np.polyfit(np.log(sizes), np.log([each.value for each in found]), 1)[0]
        assert slope.value == pytest.approx(expected, rel=1e-4, abs=1e-6)


# --- predictions ---------------------------------------------------------------------------------------------------------------


@st.composite
def judged(draw):
    """Probabilities and labels, most of them sound."""
    rows, classes = draw(st.integers(0, 5)), draw(st.integers(2, 4))
    logits = torch.tensor(draw(st.lists(st.floats(-5, 5), min_size=rows * classes, max_size=rows * classes)), dtype=torch.float64)
    mean = logits.view(rows, classes).softmax(-1)
    if rows and draw(st.booleans()) and draw(st.booleans()):
        mean[draw(st.integers(0, rows - 1)), 0] = draw(st.sampled_from((float("nan"), -0.5, 2.0, float("inf"))))
    labels = torch.tensor(draw(st.lists(st.integers(-1 if draw(st.booleans()) else 0, classes - 1), min_size=rows, max_size=rows)))
    return mean, labels.to(draw(st.sampled_from((torch.int64, torch.int32, torch.int16, torch.float32))))


@settings(max_examples=80)
@given(judged(), st.sampled_from((1, 2, 15, 0, -1, 2.5)))
def test_metrics_are_what_they_say(drawn, bins):
    mean, labels = drawn
    rows, classes = mean.shape
    sound = rows > 0 and not labels.is_floating_point() and bool((mean >= 0).all()) and bool(((mean.sum(1) - 1).abs() < 1e-3).all())
    sound = sound and int(labels.min()) >= 0 and int(labels.max()) < classes
    index = labels.long()
    expected = {}
    if sound:
        sure, chosen = mean.max(1)
        right = (chosen == index).double()
        truth = torch.eye(classes, dtype=torch.float64)[index]
        expected = {
            bayes.accuracy: float(right.mean()),
            bayes.negative_log_likelihood: float(-(mean * truth).sum(1).log().mean()),
            bayes.brier_score: float((mean - truth).square().sum(1).mean()),
        }
    for metric in (bayes.accuracy, bayes.negative_log_likelihood, bayes.brier_score):
        found = attempt(lambda metric=metric: metric(mean, labels))
        assert (found is not None) is sound
        if sound and (metric is not bayes.accuracy or len(mean.unique()) == mean.numel()):
            assert found == pytest.approx(expected[metric], abs=1e-6)
    gap = attempt(lambda: bayes.calibration_error(mean, labels, bins))
    assert (gap is not None) is (sound and type(bins) is int and bins > 0)
    if gap is not None and bins == 1:
        assert gap == pytest.approx(abs(float(sure.mean() - right.mean())), abs=1e-6)


@given(st.lists(ANY, max_size=5), st.lists(st.floats(-3, 3), max_size=5))
def test_the_area_under_the_curve_counts_pairs(inside, outside):
    found = attempt(lambda: bayes.ood_auroc(torch.tensor(inside), torch.tensor(outside)))
    sound = bool(inside) and bool(outside) and bool(torch.tensor(inside).isfinite().all())
    assert (found is not None) is sound
    if sound:
        a, b = torch.tensor(inside)[:, None], torch.tensor(outside)[None]
        assert found == pytest.approx(float(((b > a).double() + (b == a).double() / 2).mean()), abs=1e-6)


@given(st.lists(st.floats(-4, 4), max_size=24), st.integers(0, 3), st.integers(0, 4), st.booleans())
def test_uncertainty_has_two_parts(numbers, members, rows, logits):
    outputs = torch.tensor((numbers * 24 or [0.0] * 24)[: members * rows * 2], dtype=torch.float64).view(members, rows, 2)
    found = attempt(lambda: bayes.Classification.of(outputs if logits else outputs.softmax(-1)))
    sums = bool(((outputs.sum(-1) - 1).abs() < 1e-3).all()) and bool((outputs >= 0).all())
    assert (found is not None) is (members > 0 and (not logits or sums))
    if found is not None and not logits and rows:
        each = outputs.softmax(-1)
        whole = -(each.mean(0) * each.mean(0).log()).sum(-1)
        own = -(each * each.log()).sum(-1).mean(0)
        torch.testing.assert_close(found.entropy, whole)
        torch.testing.assert_close(found.mutual_information, (whole - own).clamp_min(0))


@given(st.one_of(ANY, st.integers(-1, 9), st.booleans(), st.just("x")), st.one_of(ANY, st.integers(-1, 9)), ANY)
def test_temperatures_lie_between_none_and_one(step, steps, part):
    for schedule in (bayes.linear_annealing, bayes.cyclical_annealing):
        found = attempt(lambda schedule=schedule: schedule(step, steps, part))
        assert found is None or 0 <= found <= 1
    found = attempt(lambda: bayes.minibatch_weight(step, steps))
    assert found is None or 0 <= found <= steps
    loss = attempt(lambda: bayes.elbo_loss(torch.tensor(2.0), part, steps, 1.0))
    assert (loss is not None) is (type(steps) is int and steps > 0)
    if loss is not None and math.isfinite(part):
        assert float(loss.loss) == pytest.approx(2.0 + part / steps, rel=1e-5) or abs(part) > 1e30


# --- files and data ------------------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), ANY, st.text(), st.binary(max_size=2), st.just(Path("a")), st.just(np.float32(2.5)),
    st.just(np.arange(3)), st.just(torch.arange(2.0)), st.complex_numbers(), st.just(object()),
    st.text(st.characters(categories=("Cs",)), min_size=1, max_size=1),  # half a character; JSON joins two
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)


@given(VALUES)
def test_what_goes_into_a_file_comes_out_of_it(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "a.json"
    if attempt(lambda: write_json(path, {"value": value}) or True):
        assert read_json(path) == plain({"value": value}) == json.loads(json.dumps(plain({"value": value}), allow_nan=False))
    else:
        assert not path.exists()


@given(st.integers(0, 30), st.integers(-1, 5), st.integers(-1, 6))
def test_windows_of_a_text_follow_one_another(length, batch, steps):
    tokens = torch.arange(length)
    found = attempt(lambda: data.text_batches(tokens, batch, steps))
    assert (found is not None) is (batch > 0 and steps > 0 and length // max(batch, 1) > steps)
    for i, (inputs, targets) in enumerate(found or []):
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs[:, 0], torch.arange(batch) * (length // batch) + i * steps)
