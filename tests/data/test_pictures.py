"""Items as people look at them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset

from mas_embed.data import ImageFiles, NormalizedImages, Part, Split, picture_of, thumbnail_of, transform_splits
from mas_embed.runtime.preprocessing import Preprocessing, normalized


def colours(seed=0, channels=3, size=6):
    """An image in [0, 1] whose values are whole bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, size, size), generator=generator).float() / 255


def pixels(picture):
    array = np.asarray(picture)
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["tensor", "array", "list", "bytes"])
def test_an_image_in_memory_is_shown_as_it_is(channels, kind):
    image = colours(channels=channels)
    images = torch.stack([torch.zeros_like(image), image])
    inputs = {
        "tensor": images,
        "array": images.numpy(),
        "list": list(images),
        "bytes": (images * 255).round().byte(),
    }[kind]
    picture = picture_of(inputs, 1)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    torch.testing.assert_close(pixels(picture), image)


def test_normalized_colours_are_given_back():
    image, other = colours(1), Preprocessing((0.1, 0.5, 0.9), (2.0, 0.3, 0.1))
    torch.testing.assert_close(pixels(picture_of(NormalizedImages([image], other), 0)), image)
    torch.testing.assert_close(pixels(picture_of(normalized(image, other)[None], 0, other)), image)


@pytest.mark.parametrize("as_list", [False, True])
def test_the_normalization_of_a_run_is_known_of_its_parts(as_list):
    images = torch.stack([colours(seed) for seed in range(4)])
    part = Part(list(images) if as_list else images, torch.arange(4))
    (split,) = transform_splits([Split("s", part, part, part)], normalize="data")
    assert not torch.allclose(torch.as_tensor(split.query.inputs[2]), images[2])
    torch.testing.assert_close(pixels(picture_of(split.query.inputs, 2, split.query.preprocessing)), images[2])


def test_an_unknown_normalization_is_shown_from_black_to_white():
    image = torch.tensor([[[-3.0, 1.0], [-1.0, 5.0]]])
    assert np.asarray(picture_of(image[None], 0)).tolist() == [[0, 128], [64, 255]]
    assert np.asarray(picture_of(torch.full((1, 1, 2, 2), 7.0), 0)).tolist() == [[0, 0], [0, 0]]
    assert np.asarray(picture_of(torch.full((1, 1, 2, 2), torch.nan), 0)).tolist() == [[0, 0], [0, 0]]


def test_image_files_are_shown_as_a_whole(tmp_path):
    wide = Image.new("RGB", (40, 20), (200, 10, 10))
    wide.paste((10, 10, 200), (30, 0, 40, 20))  # outside of the centre
    wide.save(tmp_path / "wide.png")
    for options in ({}, {"normalization": "imagenet"}, {"channels": 1}):
        picture = picture_of(ImageFiles([tmp_path / "wide.png"], size=20, **options), 0)
        assert picture.size == (40, 20)
        right = picture.getpixel((35, 10))
        assert right == (10, 10, 200) or options == {"channels": 1}
    inputs = ConcatDataset([torch.zeros(2, 3, 4, 4), ImageFiles([tmp_path / "wide.png"], size=20)])
    assert picture_of(inputs, 1).size == (4, 4) and picture_of(inputs, 2).size == (40, 20)


def test_texts_are_cut():
    assert picture_of(["short", "x" * 400], 0) == "short"
    assert picture_of(["short", "x" * 400], 1) == "x" * 299 + "…"


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(2, 5),
        torch.zeros(2, 7, 5),
        torch.zeros(2, 4, 8, 8),
        torch.zeros(2, 3, 8, 1),
        torch.zeros(2, 3, 8, 8, dtype=torch.long),
        [{"input_ids": torch.zeros(3)}] * 2,
        [3, 4],
    ],
    ids=["vector", "sequence", "four channels", "a column", "integers", "tokens", "numbers"],
)
def test_other_items_have_no_picture(inputs):
    assert picture_of(inputs, 1) is None


def test_thumbnails_are_small_files():
    noise = Image.fromarray((torch.rand(300, 200, 3) * 255).byte().numpy())
    content = thumbnail_of(noise)
    found = Image.open(io.BytesIO(content))
    assert found.format == "JPEG" and found.size == (43, 64) and len(content) < 4000
    assert noise.size == (200, 300)  # unchanged
    small = Image.fromarray((colours(channels=1, size=8)[0] * 255).round().byte().numpy())
    content = thumbnail_of(small)
    found = Image.open(io.BytesIO(content))
    assert found.format == "PNG" and np.asarray(found).tolist() == np.asarray(small).tolist() and len(content) < 300
