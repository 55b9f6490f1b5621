"""Rewards of texts that other processes import: nothing but the standard library is loaded with them."""

import os


def lengths(prompts, texts):
    return [len(text) for text in texts]


def dies(prompts, texts):
    os._exit(1)
