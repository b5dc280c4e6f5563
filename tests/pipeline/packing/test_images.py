"""Pixels, geometry, repairs and metadata of sound files that `pack_image` has packed."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from pipeline.packing.images import RejectedError, check_image, pack_image
from tests.trees import encode

ORIENTATION = 0x0112
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
QUADRANTS = ((RED, GREEN), (BLUE, WHITE))


def decode(jpeg: bytes) -> Image.Image:
    image = Image.open(BytesIO(jpeg))
    image.load()
    return image


def quadrants(height: int = 32, width: int = 64) -> np.ndarray:
    """Return a picture whose quarters distinguish all its orientations."""
    return np.array(QUADRANTS, np.uint8).repeat(height // 2, 0).repeat(width // 2, 1)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def blocks(values: list, side: int = 16) -> np.ndarray:
    """Return a row of squares, one for each value."""
    return np.array([values]).repeat(side, 0).repeat(side, 1)


def shown(content: bytes, side: int = 16) -> np.ndarray:
    """Return the colours at the centres of the squares of `blocks`, packed without resizing."""
    packed = pack_image(content, "original", side, 100)
    return np.asarray(packed.pixels, int)[side // 2, side // 2 :: side]


# EXIF 2.3, tag 0x0112: the sides of the upright picture that show the stored row 0 and column 0.
STORED = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_rotated_as_exif_says(orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](quadrants())))
    packed = pack_image(encode(stored, kind, exif=exif, quality=95), "original", 32, 95)
    assert (packed.width, packed.height) == decode(packed.jpeg).size == packed.pixels.size == (64, 32)
    for picture in (packed.pixels, decode(packed.jpeg)):
        centres = np.asarray(picture, int)[8::16, 16::32]
        np.testing.assert_allclose(centres, QUADRANTS, atol=8)
    assert ORIENTATION not in decode(packed.jpeg).getexif() or orientation == 1
    if kind != "TIFF":  # whose plugin rotates by itself
        assert ("rotated" in packed.repairs) == (orientation != 1)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_undefined_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encode(Image.fromarray(quadrants()), "JPEG", exif=exif)
    assert pack_image(content, "original", 32, 90).jpeg == encode(Image.fromarray(quadrants()), "JPEG")
    assert check_image(content, 32).jpeg is content


def test_cmyk_is_not_inverted():
    ink = np.array([(0, 0, 0, 0), (0, 0, 0, 255), (0, 255, 255, 0), (255, 0, 0, 0)], np.uint8)
    image = Image.fromarray(np.ascontiguousarray(blocks(ink.tolist()).astype(np.uint8)), "CMYK")
    for content in (encode(image, "JPEG", quality=100), encode(image, "TIFF")):
        colours = [WHITE, (0, 0, 0), RED, (0, 255, 255)]
        np.testing.assert_allclose(shown(content), colours, atol=4)
        assert "not RGB" in pack_image(content, "original", 16, 90).repairs


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_gray_is_repeated_in_all_three_channels(kind):
    values = [0, 60, 128, 255]
    content = encode(Image.fromarray(blocks(values).astype(np.uint8)), kind)
    np.testing.assert_allclose(shown(content), [[value] * 3 for value in values], atol=1)
    packed = pack_image(content, "256", 16, 90)
    assert "not RGB" in packed.repairs
    assert decode(packed.jpeg).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_to_eight(kind):
    values = np.array([0, 256, 1000, 32768, 65534, 65535])
    content = encode(Image.fromarray(blocks(values.tolist()).astype(np.uint16)), kind)
    expected = values * 255 / 65535
    np.testing.assert_allclose(shown(content), np.stack([expected] * 3, 1), atol=1)
    assert shown(content)[-1].tolist() == [255, 255, 255]


def test_transparent_pixels_become_white():
    rgba = [(*RED, 255), (*RED, 0), (0, 0, 0, 128), (0, 0, 0, 0)]
    image = Image.fromarray(blocks(rgba).astype(np.uint8))
    np.testing.assert_allclose(shown(encode(image, "PNG")), [RED, WHITE, (127,) * 3, WHITE], atol=1)

    palette = Image.fromarray(blocks([0, 1, 2]).astype(np.uint8), "P")
    palette.putpalette([*RED, *GREEN, *BLUE])
    for kind in ("PNG", "GIF"):
        assert shown(encode(palette, kind, transparency=1)).tolist() == [[*RED], [*WHITE], [*BLUE]]
    gray = Image.fromarray(blocks([0, 90]).astype(np.uint8))
    assert shown(encode(gray, "PNG", transparency=90)).tolist() == [[0] * 3, [255] * 3]
    rgb = Image.fromarray(blocks([RED, BLUE]).astype(np.uint8))
    assert shown(encode(rgb, "PNG", transparency=RED)).tolist() == [[*WHITE], [*BLUE]]


@pytest.mark.parametrize("kind", ["MPO", "GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_pictures_is_packed(kind):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE))
    content = encode(first, kind, save_all=True, append_images=[second])
    np.testing.assert_allclose(shown(content), [RED], atol=4)
    assert "not a JPEG" in pack_image(content, "256", 16, 90).repairs


# Sizes whose shorter side becomes 32 without rounding.
GEOMETRIES = [((96, 64), (48, 32)), ((64, 128), (32, 64)), ((33, 33), (32, 32))]
GEOMETRIES += [((8, 16), (32, 64)), ((1, 1), (32, 32))]


@pytest.mark.parametrize("geometry", ["256", "short256", "original"])
@pytest.mark.parametrize(("before", "after"), GEOMETRIES)
def test_the_shorter_side_is_resized_and_only_256_is_cropped(before, after, geometry):
    image = noise(*before)
    expected = image.resize(after, Image.Resampling.BILINEAR)
    if geometry == "256":
        left, top = (after[0] - 32) // 2, (after[1] - 32) // 2
        expected = expected.crop((left, top, left + 32, top + 32))
    packed = pack_image(encode(image, "PNG"), geometry, 32, 90)
    np.testing.assert_array_equal(packed.pixels, expected)
    size = before if geometry == "original" else expected.size
    assert (packed.width, packed.height) == decode(packed.jpeg).size == size


@pytest.mark.parametrize("before", [(301, 200), (200, 301), (257, 256), (320, 20), (20, 400)])
def test_short256_keeps_the_aspect_ratio(before):
    packed = pack_image(encode(noise(*before), "PNG"), "short256", 64, 90)
    assert min(packed.width, packed.height) == 64
    scale = 64 / min(before)
    np.testing.assert_allclose((packed.width, packed.height), np.multiply(before, scale), atol=0.5)


@pytest.mark.parametrize(("longer", "fits"), [(160, True), (200, True), (201, False), (210, False)])
def test_pictures_longer_than_20_to_1_are_too_elongated(longer, fits):
    for size in ((longer, 10), (10, longer)):
        for geometry in ("256", "original"):
            content = encode(Image.new("RGB", size), "JPEG")
            if fits:
                assert pack_image(content, geometry, 16, 90).width
            else:
                with pytest.raises(RejectedError, match=r"^too elongated$"):
                    pack_image(content, geometry, 16, 90)


def test_the_jpeg_has_the_pixels_and_the_requested_quality():
    smooth = Image.fromarray(
        np.linspace((0, 60, 250), (250, 130, 0), 64).astype(np.uint8)[None].repeat(64, 0)
    )
    packed = {q: pack_image(encode(smooth, "PNG"), "256", 64, q) for q in (30, 95)}
    error = np.abs(np.asarray(decode(packed[95].jpeg), int) - np.asarray(packed[95].pixels, int))
    assert error.mean() < 2
    assert JpegImagePlugin.get_sampling(decode(packed[95].jpeg)) == 2  # 4:2:0
    for quality, each in packed.items():
        reference = decode(encode(smooth, "JPEG", quality=quality))
        assert decode(each.jpeg).quantization == reference.quantization


METADATA = {
    "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0",
    "icc_profile": b"a profile",
    "comment": b"a comment",
    "xmp": b"<x/>",
}


@pytest.mark.parametrize("progressive", [False, True])
def test_reencoded_jpegs_are_baseline_without_metadata(progressive):
    content = encode(noise(64, 48), "JPEG", progressive=progressive, dpi=(300, 300), **METADATA)
    assert set(METADATA) <= set(decode(content).info)  # the input has them
    for geometry in ("256", "short256", "original") if progressive else ("256", "short256"):
        image = decode(pack_image(content, geometry, 32, 90).jpeg)
        assert {name for name, _ in image.applist} == {"APP0"}  # JFIF's own
        assert not {*METADATA, "progressive"} & set(image.info)
        assert image.getexif() == {}


@pytest.mark.parametrize("is_decoded", [True, False])
def test_original_keeps_a_plain_jpeg_but_not_its_metadata(is_decoded):
    image = noise(40, 48)
    kept = encode(image, "JPEG", quality=77)
    assert pack_image(kept, "original", 32, 90, is_decoded).jpeg is kept
    for metadata in (METADATA, {"exif": METADATA["exif"]}, {"comment": b"a comment"}):
        content = encode(image, "JPEG", quality=77, **metadata)
        assert content != kept
        assert pack_image(content, "original", 32, 90, is_decoded).jpeg == kept


def adobe(transform: int) -> bytes:
    return b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])


def test_adobes_colour_segment_is_kept():
    plain = encode(noise(16, 16), "JPEG")
    content = plain[:20] + adobe(1) + plain[20:]
    assert pack_image(content, "original", 16, 90).jpeg is content


def other_jpegs(image: Image.Image) -> list[bytes]:
    """Return JPEGs that Pillow accepts but other decoders may refuse."""
    plain = encode(image, "JPEG")
    coarse = encode(image, "JPEG", qtables=[[300] * 64] * 2)  # tables of 16 bits, so SOF1 instead of SOF0
    assert b"\xff\xc1" in coarse
    return [
        coarse,
        coarse.replace(b"\xff\xc1", b"\xff\xc0"),  # baseline in name only
        encode(image, "JPEG", keep_rgb=True),  # not YCbCr inside
        plain[:20] + adobe(0) + plain[20:],  # nor this one, according to Adobe's segment
        plain[:20] + b"junk!" + plain[20:],  # after the JFIF segment: Pillow skips it, DALI refuses it
        plain[:20] + b"\xff\xd0" + plain[20:],  # a restart marker before the scan
    ]


@pytest.mark.parametrize("is_decoded", [True, False])
def test_original_reencodes_everything_but_plain_jpegs(is_decoded):
    image = noise(40, 48)
    others = [
        *other_jpegs(image),
        encode(image, "JPEG", progressive=True),
        encode(image.convert("L"), "JPEG"),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image, "MPO", save_all=True, append_images=[image]),
        encode(image, "PNG"),
    ]
    for content in others:
        packed = pack_image(content, "original", 32, 90, is_decoded)
        assert packed.jpeg != content
        assert packed.pixels is not None
        jpeg = decode(packed.jpeg)
        assert (jpeg.format, jpeg.mode, jpeg.size) == ("JPEG", "RGB", (40, 48))
        assert "progressive" not in jpeg.info


@pytest.mark.parametrize("is_decoded", [True, False])
def test_check_image_keeps_files_that_any_decoder_accepts_and_rejects_others(is_decoded):
    image, rotated = noise(40, 48), Image.Exif()
    rotated[ORIENTATION] = 6
    for settings in ({}, METADATA, {"progressive": True}):
        for content in (encode(picture, "JPEG", **settings) for picture in (image, image.convert("L"))):
            kept = check_image(content, 32, is_decoded)
            assert kept.jpeg is content
            assert (kept.width, kept.height, kept.repairs) == (40, 48, ())
            assert (kept.pixels is None) == (not is_decoded)
    reasons = {
        "not a JPEG": encode(image, "PNG"),
        "not RGB": encode(image.convert("CMYK"), "JPEG"),
        "rotated": encode(image, "JPEG", exif=rotated),
        "truncated": encode(image, "JPEG")[:-200],
        "empty": b"",
        "too elongated": encode(noise(21, 1), "JPEG"),
    }
    for reason, content in [*reasons.items(), *(("not plain", other) for other in other_jpegs(image))]:
        with pytest.raises(RejectedError, match=f"^{reason}$"):
            check_image(content, 32, is_decoded)


def test_headers_are_trusted_only_if_the_file_ends_like_a_jpeg():
    content = bytearray(encode(noise(64, 64), "JPEG"))
    content[-400:-2] = bytes(398)  # the headers are sound, and the picture is not
    assert pack_image(bytes(content), "original", 64, 90, decode=False).pixels is None
    assert pack_image(bytes(content) + b"more", "original", 64, 90, decode=False).pixels is not None
    with pytest.raises(RejectedError, match="truncated"):
        pack_image(bytes(content[:-402]), "original", 64, 90, decode=False)


@pytest.mark.parametrize(
    "zero", [slice(0, 2), slice(2, 4), slice(0, 4)]
)  # height and width in the frame header
def test_a_jpeg_whose_header_has_no_pixels_is_rejected_also_by_its_headers(zero):
    content = bytearray(encode(noise(64, 64), "JPEG"))
    at = content.index(b"\xff\xc0") + 5
    for index in range(at + zero.start, at + zero.stop):
        content[index] = 0
    with pytest.raises(RejectedError):
        pack_image(bytes(content), "original", 64, 90, decode=False)
    with pytest.raises(RejectedError):
        check_image(bytes(content), 64, decode=False)
