"""``python -m train.tiny_model OUT``: see :mod:`demo.tiny_model`, which is part of a checkout."""

from demo.tiny_model import main

if __name__ == "__main__":
    main()
