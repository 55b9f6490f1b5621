"""A tokenizer of characters, made on the spot: for small models of one's own, tests and examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["character_tokenizer"]


def character_tokenizer(characters: str | Iterable[str], length: int = 10**6) -> Any:
    """A tokenizer of Hugging Face's form with a token a character, beside ``<pad>`` (0), ``<eos>`` (1) and ``<unk>`` (2).

    Args:
        characters: that it knows, numbered from 3 on in order.
        length: the most tokens that its model takes.

    Returns:
        A ``transformers.PreTrainedTokenizerFast``, which ``save_pretrained`` saves with a model.

    Example:
        >>> tokenizer = character_tokenizer("abc")
        >>> tokenizer("cab!")["input_ids"], tokenizer.decode([5, 3, 4])
        ([5, 3, 4, 2], 'cab')
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<eos>", "<unk>")
    numbers = {token: i for i, token in enumerate((*special, *characters))}
    tokenizer: Any = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>",
        padding_side="left", model_max_length=length, clean_up_tokenization_spaces=False,
    )  # fmt: skip
