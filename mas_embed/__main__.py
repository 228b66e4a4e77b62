"""The program `mas-embed`, also as `python -m mas_embed`: imports the command line, which takes seconds, and runs it."""

import os

from mas_embed.runtime.signals import exit_codes_of_signals


def main() -> None:
    """Runs the command line."""
    with exit_codes_of_signals():
        os.environ["MPLBACKEND"] = "agg"  # no window is opened, and a backend that does not exist would end the program
        from mas_embed.cli import main as run

        run()


if __name__ == "__main__":
    main()
