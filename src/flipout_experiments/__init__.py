"""The paper's experiments, language models, the report and the command ``flipout``. Nothing in :mod:`flipout` needs them."""
