from typing import Any

def resize(
    source: Any, source_shape: tuple[int, int, int], planes: Any, shape: tuple[int, int], down_first: bool, /
) -> None: ...
