import io
import logging
import os
import random
import signal
import struct
import zlib

import numpy as np
import pytest
import torch
from data.photographs import read_image
from PIL import Image
from torchvision.transforms import functional
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from mas_embed import UserError
from mas_embed.data import ImageFiles
from mas_embed.data.images import find_inside


def write(path, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def gradient(height, width):
    return np.arange(height * width).reshape(height, width) % 256


def test_an_image_of_the_right_size_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3))
    images = ImageFiles([write(tmp_path / "a.png", pixels)], size=4)
    assert images[0].dtype == torch.float32
    assert torch.equal((images[0] * 255).round().long(), torch.from_numpy(pixels).permute(2, 0, 1))


def test_greyscale_palette_and_transparency_become_rgb(tmp_path):
    grey = write(tmp_path / "grey.png", gradient(4, 4))
    Image.open(grey).convert("P").save(tmp_path / "palette.png")
    Image.open(grey).convert("RGBA").save(tmp_path / "alpha.png")
    Image.open(grey).convert("1").save(tmp_path / "bits.png")
    images = ImageFiles([tmp_path / f"{name}.png" for name in ("grey", "palette", "alpha", "bits")], size=4)
    for image in images:
        assert image.shape == (3, 4, 4)
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert images[0][0].flatten().tolist() == pytest.approx([value / 255 for value in range(16)])
    assert torch.equal(images[1], images[0])


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    values = np.array([[0, 257, 128], [65535, 255 * 256, 30000]], dtype=np.uint16)
    Image.fromarray(np.repeat(values, [1, 2], axis=0)).save(tmp_path / name)
    image = ImageFiles([tmp_path / name], size=3)[0]
    assert (image[0, :2] * 255).round().tolist() == [[0, 1, 0], [255, 254, 117]]
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_the_centre_is_cut_out_after_scaling(tmp_path):
    wide = np.zeros((8, 16))
    wide[:, 8:] = 255
    images = ImageFiles([write(tmp_path / "wide.png", wide)], size=2, short_side=4)  # 4x8, columns 3 and 4 of it
    assert images[0].shape == (3, 2, 2)
    assert bool((images[0][:, :, 0] < 0.5).all()) and bool((images[0][:, :, 1] > 0.5).all())


def test_imagenet_normalization(tmp_path):
    path = write(tmp_path / "a.png", np.full((2, 2, 3), 255))
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert ImageFiles([path], size=2, normalization="imagenet")[0][:, 0, 0].tolist() == pytest.approx(expected)


def test_images_that_fit_in_memory_are_decoded_once(tmp_path):
    path = write(tmp_path / "a.png", gradient(4, 4))
    cached, read_again = ImageFiles([path], size=4), ImageFiles([path], size=4, keep_megabytes=0)
    before = cached[0], read_again[0]
    write(path, 255 - gradient(4, 4))
    assert torch.equal(cached[0], before[0])
    assert not torch.equal(read_again[0], before[1])
    cached[0].zero_()
    assert torch.equal(cached[0], before[0])


def test_positions_are_those_of_a_list(tmp_path):
    images = ImageFiles([write(tmp_path / f"{i}.png", np.full((2, 2), i)) for i in range(3)], size=2)
    assert len(images) == len(list(images)) == 3
    assert torch.equal(images[-1], images[2])
    with pytest.raises(IndexError):
        images[3]


@pytest.mark.parametrize("index", [slice(0, 2), range(2), torch.tensor([0, 1]), "0", 0.0, None, [0]], ids=repr)
def test_an_index_that_is_no_whole_number_is_refused(tmp_path, index):
    images = ImageFiles([write(tmp_path / f"{i}.png", np.full((2, 2), i)) for i in range(3)], size=2)
    with pytest.raises(UserError, match="image files are indexed by one whole number, got "):
        images[index]
    assert torch.equal(images[np.int64(2)], images[2]) and torch.equal(images[torch.tensor(1)], images[1])


def png_bytes(width, height):
    """The header of a PNG file of this size, with fewer pixels than it promises."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (20_000, 20_000, "it has too many pixels"),
        (2**31 - 1, 1, "it has too many pixels"),
        (0, 5, "it is not an image"),
    ],
)
def test_sizes_that_no_image_has_are_refused(tmp_path, width, height, reason):
    (tmp_path / "a.png").write_bytes(png_bytes(width, height))
    with pytest.raises(UserError, match=f"cannot read the image .*a.png: {reason}"):
        read_image(tmp_path / "a.png", size=4, short_side=4)


def test_decoding_that_runs_out_of_memory_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", gradient(4, 4))
    for error, reason in (
        (MemoryError(), "too many pixels"),
        (struct.error("x"), "it is not"),
        (OverflowError(), "it is not"),
    ):

        def fail(*args, error=error):
            raise error

        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match=f"cannot read the image .*a.png: .*{reason}"),
        ):
            patch.setattr(Image.Image, "convert", fail)
            read_image(path, size=4, short_side=4)


@pytest.mark.parametrize("shape", [(20_000, 1), (1, 20_000)])
def test_a_thin_image_takes_little_memory(tmp_path, monkeypatch, shape):
    path = write(tmp_path / "thin.png", np.repeat([0, 255], 10_000).reshape(shape))
    scaled = []
    monkeypatch.setattr(functional, "resize", lambda image, size: scaled.append(image.size) or resize(image, size))
    image = read_image(path, size=64, short_side=256)
    assert [sorted(size) for size in scaled] == [[1, 16]]  # as a whole, its 20,000 pixels would become 1.3 billion
    along = image[0].float().mean(1 if shape[1] == 1 else 0)  # the centre, where black turns to white
    assert image.shape == (3, 64, 64) and along[0] < 128 < along[-1]


@pytest.mark.parametrize("shape", [(7, 9), (30, 8), (8, 128), (129, 8), (4, 4)])
def test_other_images_are_scaled_as_a_whole(tmp_path, shape):
    path = write(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (*shape, 3)))
    whole = resize(Image.open(path).convert("RGB"), [10])
    expected = pil_to_tensor(center_crop(whole, [6]))
    is_equal = torch.equal(read_image(path, size=6, short_side=10), expected)
    assert is_equal or max(shape) > 16 * min(shape)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_damaged_files_are_read_or_named(tmp_path, form):
    whole, random_bytes = io.BytesIO(), random.Random(0)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8, 3)).astype(np.uint8)).save(whole, form)
    path = tmp_path / "damaged.img"
    for number in range(120):
        content = bytearray(whole.getvalue())
        if number % 4 == 0:
            content = content[: random_bytes.randrange(len(content))]
        for _ in range(number % 4):
            content[random_bytes.randrange(len(content))] = random_bytes.randrange(256)
        path.write_bytes(content)
        try:
            message = None
            assert read_image(path, size=4, short_side=4).shape == (3, 4, 4)
        except UserError as error:
            message = str(error)
        assert message is None or message.startswith(f"cannot read the image {path}: ")


def test_what_pillow_warns_of_is_not_shown(tmp_path, monkeypatch, capfd):
    palette = Image.fromarray(gradient(4, 4).astype(np.uint8)).convert("P")
    palette.save(tmp_path / "palette.png", transparency=b"\x01\x02")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # of 16: a DecompressionBombWarning
    assert read_image(tmp_path / "palette.png", size=4, short_side=4).shape == (3, 4, 4)
    logging.getLogger("PIL.TiffImagePlugin").error("more samples than can be decoded")
    assert capfd.readouterr() == ("", "")


def test_a_pipe_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    signal.alarm(20)
    for path, kind in ((tmp_path / "pipe.png", "a pipe, a socket or a device"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=f"cannot read the image {path}: it is {kind}, not a file"):
            read_image(path, size=4, short_side=4)
    signal.alarm(0)


def test_files_that_are_not_images_are_named(tmp_path):
    whole = write(tmp_path / "whole.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3))).read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("torn", "text", "empty"):
        with pytest.raises(
            UserError, match=rf"cannot read the image .*{name}.jpg: it is not an image, or it is truncated"
        ):
            ImageFiles([tmp_path / f"{name}.jpg"], size=8)[0]
    with pytest.raises(UserError, match=r"cannot read the image .*gone.jpg: No such file"):
        ImageFiles([tmp_path / "gone.jpg"], size=8)[0]


def test_wrong_options():
    with pytest.raises(UserError, match="1 <= size <= short_side <= 16384, got size 8 and short_side 4"):
        ImageFiles([], size=8, short_side=4)
    for size in (0, 10**9):
        with pytest.raises(UserError, match=f"1 <= size <= short_side <= 16384, got size {size} and short_side {size}"):
            ImageFiles([], size=size)
    with pytest.raises(UserError, match="keep_megabytes must be at least 0, got -1"):
        ImageFiles([], size=8, keep_megabytes=-1)
    with pytest.raises(UserError, match="normalization must be 'none' or 'imagenet', got 'mean'"):
        ImageFiles([], size=8, normalization="mean")


@pytest.mark.parametrize(
    ("link", "remedy"),
    [
        ("../secret.png", "; give paths inside it"),
        ("/etc/passwd", "; give paths inside it"),
        ("sub/../../secret.png", "; give paths inside it"),
        ("link/secret.png", " by a symbolic link; put the files themselves there"),
        ("gone.jpg", " by a symbolic link; put the files themselves there"),
    ],
)
def test_no_link_leads_outside(tmp_path, link, remedy):
    folder, outside = tmp_path / "images", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    for parent in (tmp_path, outside):
        write(parent / "secret.png", gradient(2, 2))
    (folder / "link").symlink_to(outside)
    (folder / "gone.png").symlink_to(outside / "secret.png")
    with pytest.raises(UserError, match=f"the list lists .* which lies outside .*images{remedy}"):
        find_inside(folder, link, listed_in="the list")


def test_a_png_replaces_a_missing_jpg(tmp_path):
    png = write(tmp_path / "a.b.png", gradient(2, 2))
    assert find_inside(tmp_path, "a.b.jpg", listed_in="line 1") == png
    jpg = write(tmp_path / "a.b.jpg", gradient(2, 2))
    assert find_inside(tmp_path, "a.b.jpg", listed_in="line 1") == jpg
    for link in ("c.jpg", "", "c", "a\0b.png", "c" * 5000, "c" * 5000 + ".jpg"):
        with pytest.raises(UserError, match="line 1 lists '[^\0]*', but there is no such file") as caught:
            find_inside(tmp_path, link, listed_in="line 1")
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG"])
def test_an_image_may_have_another_suffix(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", gradient(2, 2))
    for listed in ("a.jpg", "a.png", "a.JPG", "a.jpeg"):
        found = find_inside(tmp_path, listed, listed_in="line 1")
        assert found.samefile(path)
