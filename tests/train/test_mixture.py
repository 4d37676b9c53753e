"""Folders are mixed in exact proportions, and each is used epoch by epoch, every bin once."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import ConfigError
from tests.train.synthetic import make_bins, write_shards
from train.batches.stream import BinStream
from train.order.dealing import DataOrder
from train.shards.index import open_shards
from train.shards.mixture import Mixture, Source, mix, parse_sources

mixtures = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=5).map(
    lambda parts: Mixture(
        sizes=tuple(size for size, _ in parts), quotas=tuple(quota for _, quota in parts), bins_per_epoch=17
    )
)
far_positions = st.integers(0, 10**12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [Source(path="a")]),
        ("a,b/c", [Source(path="a"), Source(path="b/c")]),
        ("a:0.7, b:0.3", [Source(path="a", weight=Fraction(7, 10)), Source(path="b", weight=Fraction(3, 10))]),
        ("a:2epochs,b:.5epochs", [Source(path="a", epochs=Fraction(2)), Source(path="b", epochs=Fraction(1, 2))]),
        ("a:1epoch", [Source(path="a", epochs=Fraction(1))]),
        (
            "s3://k/a:3,s3://k/b:1",
            [Source(path="s3://k/a", weight=Fraction(3)), Source(path="s3://k/b", weight=Fraction(1))],
        ),
        ("http://h:8000", [Source(path="http://h:8000")]),
        ("http://h:8000/a:2", [Source(path="http://h:8000/a", weight=Fraction(2))]),
    ],
)
def test_sources_as_they_are_written(text: str, expected: list[Source]) -> None:
    assert list(parse_sources(text)) == expected


def test_an_existing_folder_takes_precedence_over_the_mixture_syntax(tmp_path: Path) -> None:
    (tmp_path / "a:0.5,b").mkdir()
    assert parse_sources(str(tmp_path / "a:0.5,b")) == (Source(path=str(tmp_path / "a:0.5,b")),)


def test_a_mixture_may_be_longer_than_a_file_name() -> None:
    names = [f"dataset_{index}" for index in range(1000)]
    assert [source.path for source in parse_sources(",".join(f"{name}:0.5" for name in names))] == names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,,b", "has an empty part"),
        ("a:0.7,b", "to a part of the folders"),
        ("a:0.7,b:2epochs", "to a part of the folders"),
        ("a:0.7,a:0.3", "names a twice"),
        ("a:0,b:1", "gives a the share 0"),
    ],
)
def test_malformed_sources_are_a_config_error(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_sources(text)


@settings(deadline=None)
@given(mixtures, far_positions, st.integers(1, 400))
def test_every_window_of_positions_has_the_exact_proportions(mixture: Mixture, start: int, length: int) -> None:
    """Within fewer positions than there are sources; over full cycles exactly."""
    sources, _ = mixture.draw(np.arange(start, start + length))
    cycle = sum(mixture.quotas)
    for source, quota in enumerate(mixture.quotas):
        count = int((sources == source).sum())
        assert abs(Fraction(length * quota, cycle) - count) < len(mixture.quotas)
    sources, _ = mixture.draw(np.arange(start, start + 3 * cycle))
    assert Counter(sources.tolist()) == {source: 3 * quota for source, quota in enumerate(mixture.quotas)}


@settings(deadline=None)
@given(mixtures, far_positions)
def test_positions_of_a_source_are_counted_without_gap_or_repeat(mixture: Mixture, start: int) -> None:
    """The count at any position equals that of counting from the beginning, cycle by cycle."""
    cycle = sum(mixture.quotas)
    counted = [0] * len(mixture.quotas)
    sources, earlier = mixture.draw(np.arange(2 * cycle))
    for source, before in zip(sources.tolist(), earlier.tolist()):
        assert before == counted[source]
        counted[source] += 1
    far, far_earlier = mixture.draw(np.arange(start, start + cycle))
    near, near_earlier = mixture.draw(np.arange(start % cycle, start % cycle + cycle))
    assert np.array_equal(far, near)
    assert np.array_equal(far_earlier - near_earlier, start // cycle * np.array(mixture.quotas)[far])


def test_seven_to_three_worked_out_by_hand() -> None:
    """The second source gets the positions p where 7 p / 10 does not pass an integer: 0, 3 and 6."""
    mixture = Mixture(sizes=(5, 5), quotas=(7, 3), bins_per_epoch=10)
    sources, earlier = mixture.draw(np.arange(10))
    assert [position for position, source in enumerate(sources.tolist()) if source == 1] == [0, 3, 6]
    assert earlier.tolist() == [0, 0, 1, 1, 2, 3, 2, 4, 5, 6]


def test_the_mixed_order_never_changes_between_versions() -> None:
    mixture = Mixture(sizes=(3, 5), quotas=(3, 2), bins_per_epoch=8)
    order = DataOrder(np.arange(8.0), seed=7, global_batch=8, mixture=mixture)
    assert [order.global_bins(step).tolist() for step in range(2)] == [
        [4, 1, 7, 2, 0, 6, 2, 3],
        [0, 1, 5, 1, 3, 2, 0, 4],
    ]


def test_a_share_of_bins_does_not_depend_on_how_many_bins_there_are() -> None:
    """Weights are shares of all positions. The first folder has a hundredth of the bins, so it is repeated."""
    mixture = mix(parse_sources("a:0.7,b:0.3"), [10, 990])
    assert mixture is not None
    assert (mixture.quotas, mixture.bins_per_epoch) == ((7, 3), 1000)
    order = DataOrder(np.ones(1000), seed=0, global_batch=10, epochs=1, mixture=mixture)
    assert order.num_steps == 100
    uses = Counter(bin_id for step in range(100) for bin_id in order.global_bins(step).tolist())
    assert [uses[bin_id] for bin_id in range(10)] == [70] * 10
    assert sum(uses[bin_id] for bin_id in range(10, 1000)) == 300
    assert max(uses[bin_id] for bin_id in range(10, 1000)) == 1


def test_epochs_of_a_folder_define_how_often_each_bin_is_used() -> None:
    mixture = mix(parse_sources("a:2epochs,b:0.5epochs"), [30, 40])
    assert mixture is not None
    assert mixture.bins_per_epoch == 2 * 30 + 20
    order = DataOrder(np.ones(70), seed=0, global_batch=16, epochs=1, mixture=mixture)
    assert order.num_steps == order.steps_per_epoch == 5
    uses = Counter(bin_id for step in range(5) for bin_id in order.global_bins(step).tolist())
    assert [uses[bin_id] for bin_id in range(30)] == [2] * 30
    assert sorted(uses[bin_id] for bin_id in range(30, 70)) == [0] * 20 + [1] * 20


@pytest.mark.slow
@settings(deadline=None)
@given(mixtures, st.integers(0, 2**63), st.integers(1, 25))
def test_each_source_is_used_epoch_by_epoch_every_bin_once(mixture: Mixture, seed: int, batch: int) -> None:
    """No bin is skipped or repeated where steps, cycles or epochs of a source meet."""
    order = DataOrder(np.ones(sum(mixture.sizes)), seed=seed, global_batch=batch, mixture=mixture)
    num_steps = -(-4 * max(mixture.sizes) * sum(mixture.quotas) // (min(mixture.quotas) * batch))
    sequence = np.concatenate([order.global_bins(step) for step in range(min(num_steps, 300))])
    for first, size in zip(mixture.first_bins.tolist(), mixture.sizes):
        uses = sequence[(sequence >= first) & (sequence < first + size)]
        for start in range(0, uses.size - size + 1, size):
            assert sorted(uses[start : start + size].tolist()) == list(range(first, first + size))


def test_folders_keep_their_proportions_on_the_way_to_the_trainer(tmp_path: Path) -> None:
    write_shards(tmp_path / "few", make_bins(seed=1, num_bins=3))
    write_shards(tmp_path / "many" / "x", make_bins(seed=2, num_bins=6))
    write_shards(tmp_path / "many" / "y", make_bins(seed=3, num_bins=6))
    index = open_shards(f"{tmp_path / 'few'}:0.75,{tmp_path / 'many'}:0.25")
    assert index.mixture == Mixture(sizes=(3, 12), quotas=(3, 1), bins_per_epoch=15)
    plain = open_shards(f"{tmp_path / 'few'},{tmp_path / 'many'}")
    assert plain.mixture is None
    assert plain.num_bins == index.num_bins == 15
    assert plain.fingerprint != index.fingerprint
    assert open_shards(f"{tmp_path / 'few'}:3,{tmp_path / 'many'}:1").fingerprint == index.fingerprint
    order = DataOrder(index.cost(), seed=0, global_batch=8, mixture=index.mixture)
    with BinStream(index, order, rank=0, world_size=1, accumulation=8, per_device=1, end_step=4) as stream:
        for batch in stream:
            assert sum(bin_id < 3 for bin_id in batch.bins) == 6
    forgotten = DataOrder(index.cost(), seed=0, global_batch=8)
    with pytest.raises(ConfigError, match="Create the order with the mixture of the index"):
        BinStream(index, forgotten, rank=0, world_size=1, accumulation=8, per_device=1)


def test_an_impossible_mixture_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="a holds no bins"):
        mix(parse_sources("a:1,b:2"), [0, 4])
    with pytest.raises(ConfigError, match="Give weights of fewer digits"):
        mix(parse_sources("a:0.1234567890123,b:0.7"), [4, 4])
    with pytest.raises(ConfigError, match="the mixture covers 8 bins, but there are costs of 9"):
        DataOrder(np.ones(9), seed=0, global_batch=1, mixture=Mixture(sizes=(4, 4), quotas=(1, 1), bins_per_epoch=8))


def test_shares_of_folders_follow_from_weights_epochs_or_bins(tmp_path: Path) -> None:
    """``a`` has 6 bins; ``b`` is two folders of 1 and 3."""
    for name, num_bins in (("a", 6), ("b/c", 1), ("b/d", 3)):
        write_shards(tmp_path / name, make_bins(num_bins=num_bins))
    a, b = tmp_path / "a", tmp_path / "b"
    assert open_shards(f"{a},{b}").shares() == pytest.approx([0.6, 0.1, 0.3])
    assert open_shards(f"{a}:0.2,{b}:0.8").shares() == pytest.approx([0.2, 0.2, 0.6])
    assert open_shards(f"{b}:3epochs,{a}:0.5epochs").shares() == pytest.approx([0.2, 0.6, 0.2])
