"""``flipout tune``: it raises a reward, a killed run goes on to the same bits, and what does not fit is told."""

import json
import os
import signal

import pytest
import torch
from typer.testing import CliRunner

import flipout
from flipout.errors import EvaluationError
from flipout.evolution import character_tokenizer
from flipout_experiments.commands.app import app
from flipout_experiments.harness.run import Run, silent
from flipout_experiments.tuning.inputs import PromptBatches, read_prompts
from flipout_experiments.tuning.tune import tune, tune_settings

transformers = pytest.importorskip("transformers")

REWARDS = """
import os, pathlib

def score(prompts, texts):
    return [text.count("a") for text in texts]

def broken(prompts, texts):
    raise RuntimeError("no judge")

def nothing(prompts, texts):
    return [float("nan")] * len(texts)

def dies_once(prompts, texts):
    mark = pathlib.Path(__file__).with_name("mark")
    if str(os.getpid()) != os.environ["DRIVER"] and not mark.exists():
        mark.touch()
        os._exit(1)
    return score(prompts, texts)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, prompts and rewards."""
    folder = tmp_path_factory.mktemp("tune")
    torch.manual_seed(0)
    tokenizer = character_tokenizer("abcdef ")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("a\nfed cab\nbad\nb\n")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def settings(place, reward="score", **changes):
    given = {"generations": 6, "population": 8, "max_new_tokens": 5, "batch": 2, "std": 0.1, "learning_rate": 0.05, **changes}
    return tune_settings(str(place / "model"), place / "prompts.txt", f"rewards.py:{reward}", **given, judge_every=3, save_every=2)


def run(place, out, resume=False, progress=silent, tell=lambda text: None, **changes):
    asked = settings(place, **changes)
    with Run.open(out, "tune", asked, resume) as opened:
        return opened.finish(tune(asked, opened, progress, tell, place))


def content(folder):
    """The result without its seconds, the metrics, and the bytes of the models."""
    result = json.loads((folder / "result.json").read_text())
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("models/*/*"))}
    return {**result, "seconds": None}, (folder / "metrics.jsonl").read_text(), files


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(place, tmp_path):
    whole = run(place, tmp_path / "whole")
    assert [point["generation"] for point in whole["judged"]] == [0, 3, 6]

    def killer(phase, done, total):
        if (phase, done) == ("tune", 3):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        run(place, tmp_path / "killed", progress=killer)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "killed/result.json").exists()
    run(place, tmp_path / "killed", resume=True)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    for name in ("best", "mean"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole/models" / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole/models" / name)
        assert tokenizer.decode(model.generate(torch.tensor([[3]]), max_new_tokens=2)[0])


def test_from_the_command_line_it_raises_the_reward(place, tmp_path):
    options = {
        "--model": place / "model", "--prompts": place / "prompts.txt", "--reward": f"{place}/rewards.py:score",
        "--out": tmp_path / "run",
        "--generations": 8, "--population": 16, "--max-new-tokens": 5, "--std": 0.1, "--learning-rate": 0.05,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    done = CliRunner().invoke(app, ["tune", *words])
    assert done.exit_code == 0, done.output
    for text in ("tokens/s", "of the population", "models/best", "figures/rewards.png"):
        assert text in done.output
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["reward_after"] > result["reward_before"] + 1
    assert result["reward_best"] == max(point["reward"] for point in result["judged"])


@pytest.mark.filterwarnings("ignore")  # what peft says of transformers' names
def test_adapters_alone_are_searched(place, tmp_path):
    pytest.importorskip("peft")
    run(place, tmp_path / "run", lora=2, generations=3)
    tuned, plain = (
        transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "run/models/mean", place / "model")
    )
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert changed
    assert all("c_attn.weight" in name or "c_proj.weight" in name or "c_fc.weight" in name for name in changed)
    with pytest.raises(flipout.ArgumentError, match="--lora-targets 'nowhere'"):
        run(place, tmp_path / "none", lora=2, lora_targets="nowhere")


@pytest.mark.filterwarnings("ignore")  # what Ray says of the machine
def test_a_worker_that_dies_changes_nothing(place, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("DRIVER", str(os.getpid()))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        for reward in ("score", "dies_once"):
            run(place, tmp_path / reward, reward=reward, generations=2, zscore=True, workers=1)
    finally:
        ray.shutdown()
    whole, disturbed = (content(tmp_path / reward) for reward in ("score", "dies_once"))
    assert (place / "mark").exists()
    assert whole[1:] == disturbed[1:]


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"reward": "broken"}, EvaluationError, "broken raised RuntimeError"),
        ({"reward": "nothing"}, flipout.ArgumentError, "returned nan"),
        ({"reward": "nowhere"}, flipout.ArgumentError, "no function nowhere"),
        ({"include": ("nothing*",)}, flipout.ArgumentError, "nothing"),
        ({"max_new_tokens": 15}, flipout.ArgumentError, "16 positions"),
        ({"population": 7}, flipout.ArgumentError, "population=7"),
        ({"estimator": "dense"}, flipout.ArgumentError, "estimator 'dense'"),
    ],
)
def test_what_does_not_fit_is_told_and_the_folder_stays_whole(place, tmp_path, changes, error, told):
    with pytest.raises(error, match=told):
        run(place, tmp_path / "run", **changes)
    assert not (tmp_path / "run/result.json").exists()
    assert not (tmp_path / "run/models").exists()


def test_checkpoints_that_are_none_are_told(place, tmp_path):
    config = transformers.BertConfig(vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    for model, told in (("encoder", "BertModel, which does not write"), ("nowhere", "no config.json")):
        asked = tune_settings(str(tmp_path / model), place / "prompts.txt", "rewards.py:score")
        with Run.open(tmp_path / f"run-{model}", "tune", asked) as opened, pytest.raises(flipout.ArgumentError, match=told):
            tune(asked, opened, silent, folder=place)


def test_a_run_does_not_go_on_with_other_prompts(place, tmp_path):
    with pytest.raises(EvaluationError):
        run(place, tmp_path / "run", reward="broken")
    with pytest.raises(flipout.ArgumentError, match="another configuration"):
        run(place, tmp_path / "run", reward="broken", resume=True, batch=3)


def test_prompts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n"b"\n')
    assert read_prompts(path) == [{"prompt": "a", "answer": 1}, "b"]
    for text, told in (("", "no line"), ("{", "line 1 is no JSON"), ('{"text": "a"}', "line 1 is")):
        path.write_text(text)
        with pytest.raises(flipout.ArgumentError, match=told):
            read_prompts(path)
    with pytest.raises(flipout.ArgumentError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")
    batches = PromptBatches(list("abcdef"), 2, seed=1)
    assert batches(3) == batches(3)
    assert len({tuple(batches(generation)) for generation in range(9)}) > 4
    assert PromptBatches(list("ab"), 0, 1)(5) == ["a", "b"]
