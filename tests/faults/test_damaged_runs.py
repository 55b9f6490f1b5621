"""Files of a run that are cut short or changed by a bit: told, never gone on from."""

import json
import shutil

import pytest
import torch
from runs import Settings, contents, resumed, toss, unfinished

import flipout
from flipout.evolution import EvolutionStrategy, load_checkpoint, save_checkpoint
from flipout.storage.blocks import BlockFile
from flipout.storage.states import read_state, write_state
from flipout_experiments.harness.metrics_file import MetricsFile
from flipout_experiments.harness.run import Run
from flipout_experiments.report import write_report

STATE = {"x": torch.arange(6.0), "step": 3, "name": "a", "moments": [torch.ones(2), 0.5]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "cannot be read"),
        ("config.json", b"[]", "not a JSON object"),
        ("seconds.json", b'{"first": 1', "cannot be read"),
        ("environment.json", b"", "cannot be read"),
        ("checkpoints/state.pt", b"garbage", "the checkpoint .* cannot be read"),
        ("checkpoints/state.pt", b"", r"the checkpoint .* cannot be read \(it is too short\).*--out"),
        ("metrics.jsonl", b"", "had .* when the last checkpoint was saved"),
    ],
)
def test_damage_is_told_and_the_rest_left_alone(tmp_path, name, content, message):
    folder = unfinished(tmp_path / "run")
    (folder / name).write_bytes(content)
    before = contents(folder)
    with pytest.raises(flipout.ArgumentError, match=message), resumed(folder):
        pass
    after = contents(folder)
    changed = {path.name for path in before if after[path] != before[path]}
    assert changed <= {"environment.json", "metrics.jsonl"}  # every attempt is noted, and what a resumed run logs anew cut off


def test_a_checkpoint_of_something_else_is_told(tmp_path):
    folder = unfinished(tmp_path / "run")
    write_state(folder / "checkpoints" / "state.pt", {"x": 1})
    with pytest.raises(flipout.ArgumentError, match="it was not saved by a run"), resumed(folder):
        pass


def test_every_flipped_bit_of_a_state_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    write_state(path, STATE)
    whole = path.read_bytes()
    bad = bytearray(whole)
    bad[whole.index(STATE["x"].numpy().tobytes()) + 7] ^= 1
    path.write_bytes(bad)
    assert not torch.equal(torch.load(path, weights_only=True)["x"], STATE["x"])  # torch itself says nothing
    for place in range(0, len(whole) - len("crc32:00000000"), 3):
        bad = bytearray(whole)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(flipout.ArgumentError, match="its check sum is that of other bytes"):
            read_state(path)
    path.write_bytes(whole)
    assert torch.equal(read_state(path)["x"], STATE["x"])


def test_a_state_that_was_cut_short_is_noticed_wherever_it_was(tmp_path):
    path = tmp_path / "a.pt"
    write_state(path, STATE)
    whole = path.read_bytes()
    for length in range(0, len(whole) - len("crc32:00000000"), 11):
        path.write_bytes(whole[:length])
        with pytest.raises(flipout.ArgumentError, match=r"a\.pt cannot be read .* take another copy of it, or start anew"):
            read_state(path)


def test_a_state_without_a_check_sum_is_read_as_it_is(tmp_path):
    torch.save(STATE, tmp_path / "plain.pt")
    assert torch.equal(read_state(tmp_path / "plain.pt")["x"], STATE["x"])
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(flipout.ArgumentError, match="it holds a list"):
        read_state(tmp_path / "list.pt")


def test_a_checkpoint_that_does_not_fit_leaves_every_part_as_it_was(tmp_path):
    def parts(units):
        module = torch.nn.Linear(3, 1)
        return EvolutionStrategy(module, 0.1, 8), torch.optim.SGD([{"params": [p]} for p in module.parameters()][:units], lr=1.0)

    es, optimiser = parts(1)
    save_checkpoint(tmp_path / "es.pt", es, optimiser=optimiser)
    other, two_groups = parts(2)
    other.generation = 7
    weights = other.module.weight.detach().clone()
    with pytest.raises(flipout.ArgumentError, match=r"has another optimiser \(.*make every part as it was made then"):
        load_checkpoint(tmp_path / "es.pt", other, optimiser=two_groups)
    assert other.generation == 7
    assert torch.equal(other.module.weight, weights)
    assert len(two_groups.param_groups) == 2


def test_a_line_of_the_metrics_that_cannot_be_read_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \xff\n')
    metrics = MetricsFile(path, length=path.stat().st_size)
    try:
        with pytest.raises(flipout.ArgumentError, match=r"line 2 of .*metrics\.jsonl cannot be read"):
            list(metrics.records())
    finally:
        metrics.close()


def test_a_finished_run_whose_metrics_are_gone_still_has_its_result(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    assert toss(folder, resume=True) == json.loads((undisturbed / "result.json").read_text())


@pytest.mark.parametrize("content", ['{"question": 1', "[]", '{"question": {}}', '{"question": [], "blocks": {}}', '{"blocks": 3}'])
def test_a_damaged_file_of_finished_blocks_is_told(content, tmp_path):
    path = tmp_path / "curve.json"
    path.write_text(content)
    with pytest.raises(flipout.ArgumentError, match=r"curve\.json"):
        BlockFile(path, {"seed": 0})
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ('{"experiment": "variance"', "cannot be read"),
        ('{"experiment": "variance"}', r"result\.json cannot be shown \(KeyError"),
        ('{"experiment": "variance", "estimators": 3, "curves": [1]}', r"result\.json cannot be shown"),
        ('{"experiment": "coin", "seconds": 3}', "has no seconds"),
    ],
)
def test_a_damaged_result_makes_no_page(content, message, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "result.json").write_text(content)
    with pytest.raises(flipout.ArgumentError, match=message):
        write_report([tmp_path / "run"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_state_that_could_not_be_loaded_is_refused_while_the_one_before_is_there(tmp_path):
    with Run.open(tmp_path / "run", "try", Settings()) as run:
        run.save_checkpoint("state", {"x": 1})
        for bad in ({"x": Settings()}, {"x": lambda: 0}):
            run._proven.clear()
            with pytest.raises(flipout.ArgumentError, match="more than tensors"):
                run.save_checkpoint("state", bad)
        assert run.load_checkpoint("state") == {"x": 1}
