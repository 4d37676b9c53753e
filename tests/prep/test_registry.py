"""Registry, expressions and drawing: which records are drawn, and what the messages tell a user to edit."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.annotations.registry import Registry, Source, find_all_sources, find_sources
from prep.annotations.shares import draw, parse_expression
from schemas.errors import ConfigError
from schemas.settings import MediaSettings

REPOSITORY = Path(__file__).resolve().parents[2]


def find_all(*arguments: str, registry: Path) -> list[Source]:
    return find_all_sources(arguments, registry=registry, media_root=None, media=MediaSettings())


def sources(
    expression: str, registry: Path | None = None, media_root: Path | None = None
) -> list[tuple[str, Fraction]]:
    datasets = find_sources(expression, registry=registry, media_root=media_root, media=MediaSettings())
    return [(source.name, source.rate) for source in datasets]


REGISTRY = """# comment
[a]
annotation_path = "a/*.json"
media_root = "a"
sampling_rate = 0.1

[a.media]
max_pixels = 784000

[b]
annotation_path = ["b/x.jsonl"]
data_path = "b"

[unset]
media_root = "a"
annotation_path = ""

[gone]
annotation_path = "nothing.json"
media_root = "a"

[typo]
annotation_paht = "a/one.json"

[rootless]
annotation_path = "b/x.jsonl"

[scattered]
annotation_path = ["a/one.json", "b/x.jsonl"]

[bad.media]
max_pixels = 3

[bad]
annotation_path = "b/x.jsonl"
media_root = "b"

[mistyped]
annotation_path = "b/x.jsonl"

[mistyped.media]
max_pixel = 100352
"""


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    for name in ("a/one.json", "a/two.json", "b/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    path = tmp_path / "datasets.toml"
    path.write_text(REGISTRY)
    return path


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a", [("a", Fraction(1))]),
        ("a%50, b%200,c%0.5", [("a", Fraction(1, 2)), ("b", Fraction(2)), ("c", Fraction(1, 200))]),
        ("a%1000", [("a", Fraction(10))]),
    ],
)
def test_expressions_are_read_exactly(expression: str, expected: list[tuple[str, Fraction]]) -> None:
    assert parse_expression(expression) == expected


@pytest.mark.parametrize("expression", ["", "a,", "a%", "a%x", "a%0", "a%1001", "a%-5", "a,a%50", "%50"])
def test_wrong_expressions_are_refused(expression: str) -> None:
    with pytest.raises(ConfigError):
        parse_expression(expression)


def test_a_dataset_has_sorted_files_its_own_rate_and_its_own_media_settings(registry: Path) -> None:
    source, other = find_sources("a%50,b", registry=registry, media_root=None, media=MediaSettings(min_pixels=7840))
    assert source.file_names == ("one.json", "two.json")
    assert source.rate == Fraction(1, 20)
    assert (source.media.min_pixels, source.media.max_pixels) == (7840, 784000)
    assert other.media == MediaSettings(min_pixels=7840)
    assert other.media_root == registry.parent / "b"


@pytest.mark.parametrize(
    ("name", "line", "part"),
    [
        ("unset", 16, "annotation_path"),
        ("gone", 19, "nothing.json"),
        ("typo", 23, "[typo] has the unknown key 'annotation_paht'; did you mean annotation_path?"),
        ("scattered", 28, "media root"),
        ("bad", 31, "max_pixels"),
        ("mistyped", 42, "[mistyped.media] has the unknown key 'max_pixel'; did you mean max_pixels?"),
    ],
)
def test_a_wrong_entry_names_the_file_and_the_line_to_edit(registry: Path, name: str, line: int, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sources(name, registry)
    assert f"{registry}:{line}" in str(caught.value)
    assert part in str(caught.value)


def test_an_unknown_dataset_lists_those_that_are_known(registry: Path) -> None:
    with pytest.raises(ConfigError, match="registered: a, b, unset"):
        sources("nope", registry)


@pytest.mark.parametrize("name", ["cambrian_737k", "mp_doc", "clevr_mc", "videochatgpt"])
def test_the_shipped_registry_says_which_line_to_edit_before_a_path_is_set(name: str) -> None:
    path = REPOSITORY / "datasets.toml"
    with pytest.raises(ConfigError) as caught:
        sources(f"{name}%50", path)
    line = int(str(caught.value).split(":")[1])
    lines = path.read_text().splitlines()
    assert lines[line - 1].startswith("annotation_path")
    assert lines[line - 2] == f"[{name}]"


def test_an_annotation_file_is_a_dataset_with_its_folder_as_media_root(tmp_path: Path) -> None:
    (tmp_path / "x.v1.jsonl").write_text("")
    dataset = find_sources(str(tmp_path / "x.v1.jsonl"), registry=None, media_root=None, media=MediaSettings())[0]
    assert (dataset.name, dataset.media_root, dataset.file_names) == ("x.v1", tmp_path, ("x.v1.jsonl",))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("")
    for expression, registry, root, part in [
        (str(tmp_path / "no.jsonl"), None, None, "no.jsonl does not exist"),
        (str(tmp_path / "x.jsonl"), None, tmp_path / "no", "is not a folder"),
        ("a", tmp_path / "no.toml", None, "no.toml does not exist"),
        ("a", None, tmp_path, "--media-root"),
    ]:
        with pytest.raises(ConfigError, match=part):
            sources(expression, registry, root)


@pytest.mark.parametrize("expression", ["a,b/x.jsonl", "one.json,two.json.gz", "a,b/", "x.jsonl,y.jsonl%50"])
def test_paths_joined_by_commas_are_refused_with_the_alternative(
    registry: Path, tmp_path: Path, expression: str
) -> None:
    """Also where there is no registry."""
    for file in (registry, tmp_path / "none.toml"):
        with pytest.raises(ConfigError, match="Give each annotation file as an argument of its own"):
            sources(expression, file)


def test_a_path_that_is_not_there_is_missing_whether_there_is_a_registry_or_not(registry: Path, tmp_path: Path) -> None:
    for file in (registry, tmp_path / "none.toml"):
        with pytest.raises(ConfigError, match="annotation file b/c does not exist"):
            sources("b/c", file)


def test_a_file_with_a_share_is_a_dataset_named_by_its_stem(tmp_path: Path) -> None:
    (tmp_path / "x.v1.jsonl").write_text("")
    assert sources(f"{tmp_path}/x.v1.jsonl%12.5") == [("x.v1", Fraction(1, 8))]
    with pytest.raises(ConfigError, match="takes 1001 %"):
        sources(f"{tmp_path}/x.v1.jsonl%1001")


def test_a_file_whose_name_ends_like_a_share_is_itself(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl%50").write_text("")
    assert sources(f"{tmp_path}/x.jsonl%50") == [("x.jsonl%50", Fraction(1))]


def test_the_media_root_of_a_dataset_is_by_default_the_folder_of_its_files(registry: Path) -> None:
    assert find_all("rootless", registry=registry)[0].media_root == registry.parent / "b"
    with pytest.raises(ConfigError, match="lie in 2 folders, so its media root must be set"):
        find_all("scattered", registry=registry)


def test_datasets_of_all_arguments_are_joined_unless_two_have_the_same_name(registry: Path) -> None:
    folder = registry.parent
    (folder / "a" / "x.json").write_text("[]")
    datasets = find_all(f"{folder}/a/one.json%50", f"{folder}/b/x.jsonl", "a%200", registry=registry)
    assert [(source.name, source.rate) for source in datasets] == [("one", 1 / 2), ("x", 1), ("a", Fraction(1, 5))]
    with pytest.raises(ConfigError, match=r"a/x.json and .*b/x.jsonl would both be the dataset 'x'"):
        find_all(f"{folder}/b/x.jsonl", f"{folder}/a/x.json%50", registry=registry)


def test_every_entry_is_listed_with_its_state(registry: Path) -> None:
    states = {row.name: row.state for row in Registry.read(registry).listed()}
    assert states["a"] == "ready"
    assert "not set" in states["unset"]
    assert "does not exist" in states["gone"]
    assert "annotation_paht" in states["typo"]


@given(st.integers(0, 300), st.fractions(min_value=Fraction(1, 100), max_value=4), st.integers(0, 3))
def test_exactly_the_share_is_drawn_and_spread_evenly(num: int, rate: Fraction, seed: int) -> None:
    copies = draw(num, rate, seed=seed, dataset="d")
    assert int(copies.sum()) == num * rate.numerator // rate.denominator
    assert num == 0 or int(copies.max()) - int(copies.min()) <= 1
    assert (draw(num, rate, seed=seed, dataset="d") == copies).all()


@given(st.integers(1, 300), st.integers(1, 99), st.integers(1, 99))
def test_a_smaller_share_is_a_subset_of_a_larger_one(num: int, first: int, second: int) -> None:
    small, large = sorted((Fraction(first, 100), Fraction(second, 100)))
    assert (draw(num, small, seed=0, dataset="d") <= draw(num, large, seed=0, dataset="d")).all()


def test_datasets_and_seeds_draw_differently() -> None:
    base = draw(1000, Fraction(1, 2), seed=0, dataset="d")
    assert (base != draw(1000, Fraction(1, 2), seed=1, dataset="d")).any()
    assert (base != draw(1000, Fraction(1, 2), seed=0, dataset="e")).any()
    assert base.dtype == np.uint16
