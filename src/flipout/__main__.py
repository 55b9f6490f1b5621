"""``python -m flipout``."""

from flipout.cli import main

if __name__ == "__main__":
    main()
