"""`python -m mas_embed`: the command line."""

from mas_embed.cli import main

if __name__ == "__main__":
    main()
