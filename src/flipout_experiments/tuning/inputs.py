"""What ``flipout tune`` is given: a checkpoint, prompts in a file, a reward by name."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flipout.errors import ArgumentError
from flipout.storage.files import save_failed
from flipout.streams import stream

__all__ = ["NamedReward", "PromptBatches", "fingerprint", "load_model", "read_prompts", "save_model", "with_adapters"]

#: Streams of the batches of prompts and of the adapters' first weights.
_BATCHES, _ADAPTERS = 40, 41


class NamedReward:
    """The function ``module:function`` or ``file.py:function``, found again in whatever process it is called.

    Args:
        name: of it. Modules are looked for in the folder as well.
        folder: that the command was given in.

    Raises:
        ArgumentError: if there is no such function.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, str(folder.resolve())
        self.__name__ = name
        self._function: Any = None
        self._find()

    def __call__(self, prompts: list[Any], texts: list[str]) -> Any:
        return self._find()(prompts, texts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}

    def _find(self) -> Any:
        if self._function is None:
            place, colon, function = self.name.rpartition(":")
            if not colon or not place or not function:
                raise ArgumentError(f"reward {self.name!r}: expected module:function or file.py:function")
            module = self._module(place)
            self._function = getattr(module, function, None)
            if not callable(self._function):
                raise ArgumentError(f"reward {self.name!r}: {place} has no function {function}")
        return self._function

    def _module(self, place: str) -> Any:
        try:
            if place.endswith(".py"):
                path = Path(self.folder, place)
                spec = importlib.util.spec_from_file_location(path.stem, path)
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
            if self.folder not in sys.path:
                sys.path.insert(0, self.folder)
            return importlib.import_module(place)
        except Exception as error:
            raise ArgumentError(f"reward {self.name!r}: {place} cannot be imported ({type(error).__name__}: {error})") from error


class PromptBatches:
    """A batch of prompts for each generation: the same for the same seed and generation.

    Args:
        prompts: all of them.
        size: of a batch; 0 for all prompts, in their order.
        seed: of the choice.
    """

    def __init__(self, prompts: list[Any], size: int, seed: int) -> None:
        self.prompts, self.size, self.seed = prompts, size, seed

    def __call__(self, generation: int) -> list[Any]:
        if not 0 < self.size < len(self.prompts):
            return self.prompts
        order = torch.randperm(len(self.prompts), generator=stream(self.seed, _BATCHES, generation))
        return [self.prompts[i] for i in order[: self.size].tolist()]


def read_prompts(path: Path) -> list[Any]:
    """The prompts of a file: a line each, or in a file named ``.jsonl`` a JSON text or object with ``"prompt"`` a line.

    Raises:
        ArgumentError: if it cannot be read, is empty, or a line is none of these.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ArgumentError(f"the prompts {path} cannot be read ({error})") from error
    if not lines:
        raise ArgumentError(f"the prompts {path}: the file has no line")
    if path.suffix != ".jsonl":
        return list(lines)
    found: list[Any] = []
    for i, line in enumerate(lines):
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ArgumentError(f"the prompts {path}: line {i + 1} is no JSON ({error})") from error
        if not isinstance(item.get("prompt") if isinstance(item, dict) else item, str):
            raise ArgumentError(f'the prompts {path}: line {i + 1} is {item!r}; expected a text, or an object with "prompt"')
        found.append(item)
    return found


def fingerprint(*paths: Path) -> str:
    """A hash of files, and of folders by the names and sizes of their files and what their ``config.json`` says."""
    found = hashlib.sha256()
    for path in paths:
        if path.is_file():
            found.update(path.read_bytes())
            continue
        for each in sorted(p for p in path.iterdir() if p.is_file()):
            found.update(f"{each.name} {each.stat().st_size}\n".encode())
            found.update(each.read_bytes() if each.name == "config.json" else b"")
    return found.hexdigest()


def load_model(model: str, device: str, download: bool = False) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        model: a folder in Hugging Face's form; with ``download`` also a name on the hub.
        device: where it goes.
        download: fetch what is not there.

    Raises:
        ArgumentError: if there is none, or it is an encoder.
    """
    if not download and not Path(model, "config.json").is_file():
        raise ArgumentError(f"{model} is no checkpoint: it has no config.json. A name on the hub is fetched with --download")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        with _quiet():
            config = AutoConfig.from_pretrained(model, local_files_only=not download)
            kinds = list(config.architectures or [])
            if kinds and not set(kinds) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
                raise ArgumentError(f"{model} is a {kinds[0]}, which does not write texts: give a causal language model")
            found: Any = AutoModelForCausalLM.from_pretrained(model, local_files_only=not download)
            tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=not download)
    except ArgumentError:
        raise
    except Exception as error:
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise ArgumentError(f"{model} cannot be loaded ({told}): give the folder of a checkpoint with its tokenizer") from error
    return found.eval().to(device), tokenizer


def with_adapters(model: Any, rank: int, targets: str, seed: int) -> Any:
    """The model with LoRA adapters, the only parameters that are trained (Hu et al. 2022).

    Raises:
        ArgumentError: if peft is not installed, or the targets match nothing.
    """
    if importlib.util.find_spec("peft") is None:
        raise ArgumentError("--lora needs peft, which is not installed: pip install 'flipout[peft]'")
    from peft import LoraConfig, get_peft_model

    names: Any = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    words = int(stream(seed, _ADAPTERS).initial_seed() % 2**31)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft says of Conv1D, and of deprecated names of its own
            torch.manual_seed(words)
            return get_peft_model(model, LoraConfig(r=rank, target_modules=names, lora_dropout=0.0)).eval()
    except ValueError as error:
        raise ArgumentError(f"--lora-targets {targets!r}: {str(error).splitlines()[0]}") from error


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Saves a model and its tokenizer as an ordinary checkpoint, whole or not at all; adapters become part of the weights.

    Raises:
        SaveError: if it cannot be written.
    """
    unfinished = folder.with_name(f".{folder.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with _quiet():
            (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise save_failed(folder, error) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and remarks of transformers."""
    from transformers import utils

    logging: Any = utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
