"""The command ``flowmaps compare``."""

from flowmaps.cli.commands import run_command

if __name__ == "__main__":
    run_command("compare")
