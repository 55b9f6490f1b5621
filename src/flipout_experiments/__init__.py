"""The experiments of the paper, the language product, the report and the command ``flipout``; nothing in :mod:`flipout` needs them."""
