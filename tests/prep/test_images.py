"""Images: planes equal the reference processor's, probing agrees with decoding, and bad files have reason codes."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image, ImageOps
from PIL.ExifTags import Base as ExifTag
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_smart_resize

from prep.media.access import MediaRequest
from prep.media.fetch import open_media
from prep.media.images import decode_image, probe_image
from prep.media.paths import resolve_media
from prep.media.resize import smart_resize
from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.settings import MediaSettings

SETTINGS = MediaSettings()
SIZES = [(28, 28), (1, 1), (640, 480), (333, 777), (57, 2000), (1500, 1400), (199, 1)]
MODES = ["RGB", "L", "RGBA", "P", "CMYK", "LA", "1"]


def random_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, in any mode. RGBA and LA are transparent in places."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 4), dtype=np.uint8), "RGBA").resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-9, 10, (height, width, 1))
    rgba = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8), "RGBA")
    return rgba if mode == "RGBA" else rgba.convert("LA") if mode == "LA" else rgba.convert("RGB").convert(mode)


def source(path: Path) -> MediaSource:
    return MediaSource(path.name, path)


def reference_pixel_values(image: Image.Image) -> tuple[np.ndarray, list[int]]:
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": SETTINGS.min_pixels, "longest_edge": SETTINGS.max_pixels}
    )
    image = ImageOps.exif_transpose(image)
    if Version(transformers.__version__) < Version("5.23") and (
        "A" in image.getbands() or image.info.get("transparency") is not None
    ):
        # Older versions, such as the one for Python 3.10, drop transparency.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    out = processor(images=[image], return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"][0].tolist()


def planes_of_pixel_values(pixel_values: np.ndarray, grid: list[int]) -> np.ndarray:
    """Undo patchify and normalisation of the reference: (N, 1176) float32 -> (3, H, W) uint8."""
    _, h, w = grid
    # (h/2, w/2, 2, 2, channel, frame, 14, 14): merge blocks first, then the 2x2 patches of a block.
    patches = pixel_values.reshape(h // 2, w // 2, 2, 2, 3, 2, 14, 14)
    assert (patches[:, :, :, :, :, 0] == patches[:, :, :, :, :, 1]).all()
    planes = patches[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, 14 * h, 14 * w)
    mean = np.asarray(Qwen2VLImageProcessorPil.image_mean).reshape(3, 1, 1)
    std = np.asarray(Qwen2VLImageProcessorPil.image_std).reshape(3, 1, 1)
    return np.rint((planes.astype(np.float64) * std + mean) * 255).astype(np.uint8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_planes_equal_those_of_the_reference_processor(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    random_image(*size, mode).save(path)
    with Image.open(path) as image:
        pixel_values, grid = reference_pixel_values(image)
    planes = decode_image(source(path), SETTINGS)[0]
    assert list(probe_image(source(path), SETTINGS)[0]) == grid
    assert planes.dtype == np.uint8
    assert (planes == planes_of_pixel_values(pixel_values, grid)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "late.png"])
def test_exif_orientation_is_applied_by_decode_and_probe(tmp_path: Path, orientation: int, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    exif = Image.Exif()
    exif[ExifTag.Orientation] = orientation
    if kind == "late.png":
        # EXIF after the pixels, where Pillow finds it only by decoding them.
        random_image(300, 120).save(path)
        content, chunk = path.read_bytes(), b"eXIf" + exif.tobytes()[6:]
        late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:-12] + late + content[-12:])
    else:
        random_image(300, 120).save(path, exif=exif)
    with Image.open(path) as image:
        image.load()
        pixel_values, grid = reference_pixel_values(image)
    assert list(probe_image(source(path), SETTINGS)[0]) == grid
    assert (grid[1] > grid[2]) == (orientation >= 5)
    assert (decode_image(source(path), SETTINGS)[0] == planes_of_pixel_values(pixel_values, grid)).all()


def test_a_palette_with_a_transparent_colour_is_composited_onto_white(tmp_path: Path) -> None:
    image = random_image(64, 64).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    image.save(tmp_path / "x.png", transparency=3)
    with Image.open(tmp_path / "x.png") as opened:
        pixel_values, grid = reference_pixel_values(opened)
    assert (decode_image(source(tmp_path / "x.png"), SETTINGS)[0] == planes_of_pixel_values(pixel_values, grid)).all()


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 112 * 112).reshape(112, 112).astype(np.uint16)
    for name in ("x.png", "x.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        planes = decode_image(source(tmp_path / name), SETTINGS)[0]
        assert (planes[0] == np.rint(levels / 257).astype(np.uint8)).all()
        assert (planes[1] == planes[0]).all()


def test_grey_without_a_defined_white_is_rejected(tmp_path: Path) -> None:
    Image.fromarray(np.full((112, 112), 0.5, dtype=np.float32)).save(tmp_path / "x.tif")
    assert code_of(tmp_path / "x.tif") is ReasonCode.UNSUPPORTED_MEDIA
    Image.fromarray(np.full((112, 112), 70000, dtype=np.int32)).save(tmp_path / "y.tif")
    assert code_of(tmp_path / "y.tif") is ReasonCode.UNSUPPORTED_MEDIA


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animated_image_is_its_first_frame(tmp_path: Path, kind: str) -> None:
    first, second = random_image(112, 112, seed=1), random_image(112, 112, seed=2)
    options = {"lossless": True} if kind == "webp" else {}
    first.save(tmp_path / f"x.{kind}", save_all=True, append_images=[second], **options)
    first.save(tmp_path / f"one.{kind}", **options)
    animated, still = (decode_image(source(tmp_path / f"{name}.{kind}"), SETTINGS)[0] for name in ("x", "one"))
    assert np.abs(animated.astype(int) - still).max() <= (0 if kind != "gif" else 48)


@pytest.mark.parametrize("kind", ["webp", "avif", "tif", "bmp", "gif", "jp2"])
def test_other_formats_decode_as_pillow_decodes_them(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    random_image(250, 130).save(path)
    with Image.open(path) as image:
        pixel_values, grid = reference_pixel_values(image)
    assert list(probe_image(source(path), SETTINGS)[0]) == grid
    assert (decode_image(source(path), SETTINGS)[0] == planes_of_pixel_values(pixel_values, grid)).all()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64), st.integers(0, 64))
def test_sizes_equal_those_of_the_reference(height: int, width: int, low: int, more: int) -> None:
    bounds = {"min_pixels": low * 784, "max_pixels": (low + more) * 784}
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(MediaError) as caught:
            smart_resize(height, width, **bounds)
        assert caught.value.code is ReasonCode.BAD_ASPECT_RATIO
    else:
        assert smart_resize(height, width, **bounds) == reference_smart_resize(height, width, 28, **bounds)


def code_of(path: Path, settings: MediaSettings = SETTINGS) -> ReasonCode:
    with pytest.raises(MediaError) as caught:
        probe_image(source(path), settings)
        decode_image(source(path), settings)
    return caught.value.code


def test_a_truncated_image_is_unreadable(tmp_path: Path) -> None:
    for kind in ("jpg", "png", "webp"):
        path = tmp_path / f"x.{kind}"
        random_image(300, 200).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert code_of(path) is ReasonCode.MEDIA_UNREADABLE


def test_text_named_as_an_image_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("not an image")
    assert code_of(tmp_path / "x.jpg") is ReasonCode.UNSUPPORTED_MEDIA


def test_too_many_pixels_are_rejected_from_the_header(tmp_path: Path) -> None:
    random_image(100, 100).save(tmp_path / "x.png")
    assert code_of(tmp_path / "x.png", MediaSettings(max_source_pixels=9999)) is ReasonCode.MEDIA_TOO_LARGE


def test_an_extreme_aspect_ratio_is_rejected(tmp_path: Path) -> None:
    random_image(201, 1).save(tmp_path / "x.png")
    assert code_of(tmp_path / "x.png") is ReasonCode.BAD_ASPECT_RATIO


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(b"x")
    (root / "empty.png").write_bytes(b"")
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "out").symlink_to(tmp_path)
    (root / "sub" / "in.png").symlink_to(root / "a.png")
    (root / "link").symlink_to(".")
    (root / "chain").symlink_to("link/link/sub")
    (root / "sub" / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    (root / "Zu\u0308g.png").write_bytes(b"x")
    return root


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "./a.png",
        "sub/../a.png",
        "sub/in.png",
        "link/a.png",
        "link/sub/in.png",
        "chain/in.png",
        "sub/up/a.png",
        "out/root/a.png",
        "a.png/",
        "Zu\u0308g.png",
    ],
)
def test_names_inside_the_root_resolve(root: Path, name: str) -> None:
    assert resolve_media(root, name, max_bytes=10).open().read() == b"x"


def test_an_absolute_path_inside_the_root_resolves(root: Path) -> None:
    assert resolve_media(root, str(root / "a.png"), max_bytes=10).path == root / "a.png"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("../secret.png", "media_outside_root"),
        ("sub/../../secret.png", "media_outside_root"),
        ("../no such.png", "media_outside_root"),
        ("out.png", "media_outside_root"),
        ("out/secret.png", "media_outside_root"),
        ("sub/up/../secret.png", "media_outside_root"),
        ("chain/../../secret.png", "media_outside_root"),
        ("link/out.png", "media_outside_root"),
        ("//etc/passwd", "media_outside_root"),
        ("/etc/passwd", "media_outside_root"),
        ("..", "media_outside_root"),
        ("http://example.com/a.png", "media_outside_root"),
        ("file:///etc/passwd", "media_outside_root"),
        ("a.png\0.jpg", "media_outside_root"),
        ("%2e%2e/secret.png", "media_missing"),
        ("missing.png", "media_missing"),
        ("A.png", "media_missing"),
        ("Z\u00fcg.png", "media_missing"),
        ("loop", "media_unreadable"),
        ("loop/a.png", "media_unreadable"),
        ("pipe", "unsupported_media"),
        (".", "unsupported_media"),
        ("link/.", "unsupported_media"),
        ("a.png/b.png", "media_missing"),
        ("x" * 5000, "media_missing"),
        ("", "media_missing"),
        ("empty.png", "media_empty"),
        ("sub", "unsupported_media"),
    ],
)
def test_names_outside_the_root_or_of_no_file_have_a_reason_code(root: Path, name: str, code: str) -> None:
    with pytest.raises(MediaError) as caught:
        resolve_media(root, name, max_bytes=10)
    assert caught.value.code.value == code


def test_a_root_may_be_relative_or_a_link_or_the_root_of_the_file_system(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").symlink_to(root)
    assert resolve_media(tmp_path / "there", "sub/in.png", max_bytes=10).path == root / "a.png"
    assert resolve_media(tmp_path / "there", str(root / "a.png"), max_bytes=10).path == root / "a.png"
    assert resolve_media(Path("/"), str(root / "a.png"), max_bytes=10).path == root / "a.png"
    assert resolve_media(Path("/"), str(root / "a.png").lstrip("/"), max_bytes=10).path == root / "a.png"
    monkeypatch.chdir(root)
    assert resolve_media(Path(), "a.png", max_bytes=10).path == root / "a.png"
    with pytest.raises(MediaError, match="leads outside"):
        resolve_media(Path("sub"), "in.png", max_bytes=10)  # a link to root/a.png


def test_every_task_resolves_folders_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may have become a link to outside, or a relative root may have another working folder."""
    (root / "sub" / "b.png").write_bytes(b"x")
    with open_media([root], beginnings=False, scratch=tmp_path) as access:
        assert access.source(MediaRequest(root, "sub/b.png", 0, 10)).path == root / "sub" / "b.png"
    shutil.rmtree(root / "sub")
    (tmp_path / "b.png").write_bytes(b"secret")
    (root / "sub").symlink_to(tmp_path)
    with open_media([root], beginnings=False, scratch=tmp_path) as access, pytest.raises(MediaError) as caught:
        access.source(MediaRequest(root, "sub/b.png", 0, 10))
    assert caught.value.code is ReasonCode.MEDIA_OUTSIDE_ROOT
    for folder in (tmp_path, root):
        monkeypatch.chdir(folder)
        Path("c.png").write_bytes(b"x")
        with open_media([Path()], beginnings=False, scratch=tmp_path) as access:
            assert access.source(MediaRequest(Path(), "c.png", 0, 10)).path == folder / "c.png"


def test_a_file_above_the_byte_limit_is_not_opened(root: Path) -> None:
    with pytest.raises(MediaError) as caught:
        resolve_media(root, "a.png", max_bytes=0)
    assert caught.value.code is ReasonCode.MEDIA_TOO_LARGE
