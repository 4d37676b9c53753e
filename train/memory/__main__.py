"""``python -m train.memory``: see :mod:`train.memory.cli`."""

from train.memory.cli import main

main()
