"""Writes the sections of docs/results.md from run folders: ``python docs/generate_results.py RUN ...``.

A section stands between ``<!-- variance-fc: begin -->`` and its end; only those of the runs named are replaced. Figures are
copied beside.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flipout.storage.files import read_json
from flipout.variance import VarianceCurve
from flipout.variance.named import label
from flipout_experiments.harness.claims import from_json
from flipout_experiments.harness.console import interval
from flipout_experiments.language.history_plot import draw_histories
from flipout_experiments.language.paper_tables import Pair, estimates, pairs, variance_sentence
from flipout_experiments.language.settings import METHODS, PAPER
from flipout_experiments.paper.variance.predicted_curves import limit

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"


def grid(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *[list(row) for row in rows]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def wall(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    longest = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if value >= 1)
    return f"{sum(seconds.values()) / 60:.1f} min of wall time ({longest})"


def machine(environment: dict[str, Any]) -> str:
    threads = environment["threads"]
    return f"{environment['processors']} processors, {threads} thread{'s' * (threads > 1)}, torch {environment['torch']}"


def source(result: dict[str, Any]) -> str:
    """The data, without the name of a folder of this machine."""
    folder = result["settings"].get("subject", result["settings"])["data_dir"]
    return str(result["data"]).replace(f"; {folder}", ", from --data-dir")


def about(result: dict[str, Any], environment: dict[str, Any]) -> str:
    settings = result["settings"].get("subject", result["settings"])
    facts = [source(result)]
    if "parameters" in result:
        facts.append(f"{result['parameters']:,} parameters")
    if "pretraining" in result:
        reached = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in result["pretraining"].items())
        facts.append(f"pre-trained: {reached}")
    first, several = settings["seed"], settings.get("seeds", 1)
    seeds = f"seeds {first} to {first + several - 1}" if several > 1 else f"seed {first}"
    facts.append(f"preset {result['preset']}, {seeds}")
    return f"*{'; '.join([*facts, wall(result), machine(environment)])}; begun {environment['started']}*"


def variance(result: dict[str, Any]) -> str:
    curve = VarianceCurve.from_dict(result["curve"])
    slopes_of = [f"slope, {label(name)}" for name in curve.points]
    header = ["layer", *slopes_of, "shared / flipout", "flipout / independent", "plateau of shared"]
    rows = []
    for panel, found in result["summary"].items():
        ratios = {name: f"{interval(from_json(each))} at N = {each['batch_size']:,}" for name, each in found["ratio"].items()}
        slopes = [interval(from_json(found["slope"][name])) for name in curve.points]
        plateau = interval(from_json(found["plateau"]["shared"]))
        rows.append([panel, *slopes, ratios["shared / flipout"], ratios.get("flipout / independent", ""), plateau])
    sizes = curve.batch_sizes("flipout")
    draws = ", ".join(f"{each.draws}" for each in curve.points["flipout"])
    text = f"N = {', '.join(f'{n:,}' for n in sizes)}; {draws} draws under flipout, twice as many under shared noise."
    return f"{grid(header, rows)}\n\n{text}"


def components(result: dict[str, Any]) -> str:
    rows = []
    for panel, found in result["components"].items():
        alpha, beta, gamma = (from_json(found[name]) for name in ("alpha", "beta", "gamma"))
        points = [point["within"] for point in result["points"] if point["panel"] == panel]
        over = [f"{alpha / beta:.3g}" if beta.low > 0 else "", f"{beta / gamma:.3g}" if gamma.low > 0 else "γ not seen"]
        rows.append([panel, interval(alpha), interval(beta), interval(gamma), *over, f"{sum(points)} of {len(points)}"])
    header = ["layer", "α", "β", "γ", "α / β", "β / γ", "predicted within the interval"]
    worth = " and ".join(f"{limit(result, name)} under {name}" for name in ("shared", "flipout"))
    settings, percent = result["settings"], round(100 * result["curve"]["confidence"])
    text = (
        f"{settings['bases']} base perturbations under each of two estimators, batches of {settings['batch_size']}. Predicted "
        f"within the {percent} % interval of the measured curve: {100 * result['within']:.0f} % of {len(result['points'])} points. "
        f"A batch is worth half of its examples at N = {worth}."
    )
    return f"{grid(header, rows)}\n\n{text}"


def large_batch(result: dict[str, Any]) -> str:
    parts = []
    for race in result["races"]:
        rows = []
        for pair, found in race["ratios"].items():
            for target, ratios in found.items():
                if target != "seconds_a_step":
                    costs = [told(ratios[cost]) for cost in ("steps_to", "seconds_to", "seconds_spent_to")]
                    rows.append([short(pair), target, *costs])
            rows.append([short(pair), "a step", "", told(found["seconds_a_step"]), ""])
        header = ["ratio", "to a training NLL of", "iterations", "seconds (median steps)", "seconds as spent"]
        parts.append(f"Noise: {race['noise']}.\n\n{grid(header, rows)}")
        targets = list(next(iter(race["runs"].values()))[0]["steps_to"])
        rows = []
        for name, runs in race["runs"].items():
            steps = [", ".join(f"{run['steps_to'][target] or '-'}" for run in runs) for target in targets]
            seconds = ", ".join(f"{run['seconds_a_step']:.2f}" for run in runs)
            last = ", ".join(f"{run['tests'][-1][1]:.3g}" for run in runs)
            rows.append([short(name), *steps, seconds, last])
        header = ["estimator", *(f"iterations to {target}" for target in targets), "seconds a step", f"last {result['measure']}"]
        parts.append(grid(header, rows))
    race, settings = result["settings"]["race"], result["settings"]
    parts.append(
        f"Batch {race['batch']:,}, Adam {race['learning_rate']:g}, at most {race['steps']} steps; {settings['seeds']} seeds, one "
        f"number of a row each; intervals are {100 * settings['confidence']:.0f} % t-intervals of the logarithm."
    )
    return "\n\n".join(parts)


def uncertainty(result: dict[str, Any]) -> str:
    parts = []
    for key, title in (("methods", "method"), ("beyond_point", "beyond the point estimate")):
        names = list(next(iter(result[key].values())))
        rows = [[short(method), *(interval(from_json(found[name])) for name in names)] for method, found in result[key].items()]
        parts.append(grid([title, *names], rows))
    return "\n\n".join(parts)


def told(found: dict[str, Any] | None) -> str:
    return "not reached by all" if found is None else interval(from_json(found))


def short(name: str) -> str:
    return name.replace("local_reparameterization", "LRT").replace("dropout", "MC dropout")


RENDER = {"variance": variance, "components": components, "large-batch": large_batch, "uncertainty": uncertainty}
ABOUT = {
    "variance": "variance of the gradient against the batch size, a panel a layer",
    "components": "variance of the gradient against the batch size, a panel a layer",
    "large-batch": "training loss over iterations and over seconds, and the test measure, under each estimator",
    "uncertainty": "reliability on test digits, calibration error and AUROCs of six methods",
}


def evolution(result: dict[str, Any]) -> str:
    if "rows" in result:
        header = [
            "net",
            "FlipES here, s",
            f"cpuES, {result['cores']} cores here, s",
            "cpuES, 40 such cores, s",
            "ratio to 40 cores",
        ]
        rows = [
            [f"{row['net']} {row['width']:g}", *(f"{row[name]:.3g}" for name in ("flipes", "cpues", "cpues_40_cores")),
             f"{row['cpues_40_cores'] / row['flipes']:.3g}"]
            for row in result["rows"]
        ]  # fmt: skip
        text = f"Seconds per update of {result['samples']:,} samples."
        if "cost_factor" in result["rows"][0]:
            settings = result["settings"]
            prices = f"{settings['price_gpu']:g} an hour for what runs FlipES and {settings['price_cpu']:g} for 40 cores"
            header.append("cost factor")
            rows = [[*cells, f"{row['cost_factor']:.3g}"] for cells, row in zip(rows, result["rows"], strict=True)]
            text += f" The cost factor is what cpuES costs over what FlipES does, at {prices}."
        return f"{grid(header, rows)}\n\n{text}"
    rows = [
        [name, interval(from_json(final["loss"])), f"{100 * final['test_accuracy']:.1f} %"]
        for name, final in result["final"].items()
    ]
    text = grid(["method", "final training loss, nats", "test accuracy"], rows)
    if "difference" in result:
        text += f"\n\nFlipES - IdealES, paired by seed: {interval(from_json(result['difference']))} nats."
    return text


def about_evolution(result: dict[str, Any], environment: dict[str, Any]) -> str:
    problem = result["settings"]["problem"]
    net = (
        ""
        if problem is None
        else f"{problem['net']} {problem['width']:g}, {problem['examples']} examples, {problem['updates']} updates; "
    )
    seeds = f"seeds {result['settings']['seeds']}; " if problem is not None else ""
    return f"*{net}{seeds}preset {result['preset']}; {wall(result)}; {machine(environment)}; begun {environment['started']}*"


def evolution_section(folder: Path, result: dict[str, Any], environment: dict[str, Any]) -> tuple[str, str]:
    figure = result["settings"]["figure"]
    shutil.copy(folder / "figures" / f"figure-{figure}.png", ROOT / "docs" / "figures" / f"evolution-{figure}.png")
    what = "seconds per update against the width of the net" if figure == "5" else "training loss against updates, a line a method"
    picture = f"![Figure {figure}: {what}](figures/evolution-{figure}.png)"
    return f"evolution-{figure}", f"{evolution(result)}\n\n{picture}\n\n{about_evolution(result, environment)}"


def section(folder: Path) -> tuple[str, str]:
    """The name of a run's section, and its text."""
    result, environment = read_json(folder / "result.json"), read_json(folder / "environment.json")
    if result["experiment"] == "evolution":
        return evolution_section(folder, result, environment)
    experiment, settings = result["experiment"], result["settings"]
    net = settings.get("subject", settings).get("net", "")
    kind = settings["noises"][0]["kind"] if "noises" in settings else ""
    name = "-".join(part for part in (experiment, net, kind) if part)
    figure = f"{name}.png"
    shutil.copy(folder / "figures" / f"{experiment}.png", ROOT / "docs" / "figures" / figure)
    picture = f"![{' of '.join(part for part in (experiment, net) if part)}: {ABOUT[experiment]}](figures/{figure})"
    return name, f"{RENDER[experiment](result)}\n\n{picture}\n\n{about(result, environment)}"


def regularization(folders: list[Path]) -> tuple[str, str]:
    """The section of a level, from runs of one method each or of all: they must agree in everything else."""
    results = [read_json(folder / "result.json") for folder in folders]
    environments = [read_json(folder / "environment.json") for folder in folders]
    settings = [{**result["settings"], "methods": None, "draws": None} for result in results]  # each variance tells its draws
    level = settings[0]["level"]
    if any(each != settings[0] for each in settings):
        sys.exit(f"{', '.join(map(str, folders))}: runs of {level} with other settings cannot stand in one table")
    rows = {name: row for result in results for name, row in result["rows"].items()}
    merged = {**results[0], "rows": {name: rows[name] for name in METHODS[level] if name in rows}}
    valid, test, best = (estimates(merged, split) for split in ("valid", "test", "best_epoch"))
    lines = []
    for name, row in merged["rows"].items():
        published = [f"{value:g}" for value in PAPER[level].get(name, ())] or ["", ""]
        sampled = "" if row["sampled"][0] is None else f"{sum(row['sampled']) / len(row['sampled']):.4g}"
        watched = f"{sum(min(each) for each in row['watched']) / len(row['watched']):.4g}"
        seen = [interval(found[name], digits=4) for found in (valid, test)]
        lines.append([name, *published, *seen, f"{best[name].value:.0f}", watched, sampled])
    header = ["method", "paper, valid", "paper, test", "valid", "test", "best epoch", "watched", "watched, samples"]
    parts = [grid(header, lines)]
    if missing := [name for name in METHODS[level] if name not in rows]:
        parts.append(f"Not run at this size: {', '.join(missing)}.")
    parts += told_apart(pairs(merged))
    sentences = [variance_sentence(name, found) for result in results for name, found in result["variance"].items()]
    parts += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences]
    figure = f"regularization-{level}.png"
    drawn = draw_histories({name: row["watched"] for name, row in merged["rows"].items()}, merged["unit"])
    drawn.savefig(ROOT / "docs" / "figures" / figure)
    parts.append(f"![validation against epochs, a line a training, {level}](figures/{figure})")
    seconds = [f"{'+'.join(result['rows'])} {sum(result['seconds'].values()) / 60:.1f} min" for result in results]
    threads = {environment["threads"] for environment in environments}
    parts.append(
        f"*{source(merged)}; the first {merged['trained_on']:,} tokens to train on; {merged['parameters']:,} parameters; preset "
        f"{merged['preset']}, {settings[0]['seeds']} seeds from {settings[0]['seed']}; wall time {', '.join(seconds)}; "
        f"{environments[0]['processors']} processors, {'/'.join(map(str, sorted(threads)))} threads a run, torch "
        f"{environments[0]['torch']}; begun {min(environment['started'] for environment in environments)}*"
    )
    return f"regularization-{level}", "\n\n".join(parts)


def told_apart(found: list[Pair]) -> list[str]:
    """A sentence a pair, under what they have in common."""
    kinds = {
        "Told apart, in the paper's order": [pair for pair in found if pair.told_apart and (pair.paper or 0) > 0],
        "Told apart, against the paper's order": [pair for pair in found if pair.told_apart and (pair.paper or 0) < 0],
        "Told apart": [pair for pair in found if pair.told_apart and not pair.paper],
        "Not told apart at this size": [pair for pair in found if not pair.told_apart],
    }
    return [f"{kind}:\n\n" + "\n".join(f"- {pair};" for pair in each)[:-1] + "." for kind, each in kinds.items() if each]


def sections(folders: list[Path]) -> list[tuple[str, str]]:
    """Names and texts; runs of one level of the regularisation tables make one section."""
    found, levels = [], {}
    for folder in folders:
        result = read_json(folder / "result.json")
        if result["experiment"] == "regularization":
            levels.setdefault(result["settings"]["level"], []).append(folder)
        else:
            found.append(section(folder))
    return found + [regularization(each) for each in levels.values()]


def main(folders: list[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, body in sections([Path(folder) for folder in folders]):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        text, count = re.subn(f"{begin}.*?{end}", lambda _, b=begin, t=body, e=end: f"{b}\n{t}\n{e}", text, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"{PAGE} has {count} sections {begin}")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
