"""``python -m train.generate``."""

from train.generate.cli import main

main()
