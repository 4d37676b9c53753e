"""``python -m train.memory``: see :mod:`train.memory.budget`."""

from train.memory.budget import main

main()
