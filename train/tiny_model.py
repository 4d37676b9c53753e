"""``python -m train.tiny_model OUT`` writes the tiny checkpoint of :mod:`demo.tiny_model`. It needs a checkout."""

import sys

try:
    from demo.tiny_model import main
except ModuleNotFoundError as error:
    if error.name != "demo":
        raise
    sys.stderr.write(
        "error: the tiny checkpoint needs a checkout of the repository: run this command in its root folder\n"
    )
    sys.exit(2)

if __name__ == "__main__":
    main()
