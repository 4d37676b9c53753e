"""``python -m train.order``: see :mod:`train.order.cli`."""

from train.order.cli import main

main()
