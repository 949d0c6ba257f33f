"""The program that `accelerate launch` starts on every rank: `progscale train` with the same options."""

import sys
from pathlib import Path

# A checkout works without being installed too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from progscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
