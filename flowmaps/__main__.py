"""``python -m flowmaps``, the same as the command ``flowmaps``."""

from flowmaps.cli.commands import main

if __name__ == "__main__":
    main()
