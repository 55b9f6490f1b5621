"""``python -m flipout``."""

from flipout_experiments.cli import main

if __name__ == "__main__":
    main()
