"""The one decoder, against pixels that are known because the test painted them, and against plain PIL."""

import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image, ImageOps

from softlabel.errors import BadImageError, DataError
from softlabel.inputs.base import Decoding
from softlabel.inputs.content import content_hash
from softlabel.inputs.image_decode import decode_hashed, decode_image
from softlabel.inputs.image_transform import stack_images
from softlabel.inputs.jpeg import decode_plain_jpeg, have_equal_pixels

H, W = 6, 5
RNG = np.random.default_rng(7)
RGB_HW3 = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
GREY_HW = RNG.integers(0, 256, (H, W), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels_of(image: object) -> np.ndarray:
    decoded_CHW = decode_image(image)
    assert decoded_CHW.dtype == torch.uint8
    assert decoded_CHW.dim() == 3
    return decoded_CHW.permute(1, 2, 0).numpy()


def grey(values_HW: np.ndarray) -> np.ndarray:
    return np.repeat(values_HW[:, :, None], 3, axis=2)


def with_alpha(values: np.ndarray) -> np.ndarray:
    return np.dstack([values, RNG.integers(0, 256, (H, W), dtype=np.uint8)])


PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)


def palette_image(**options: object) -> bytes:
    image = Image.fromarray(GREY_HW)
    image = Image.frombytes("P", (W, H), image.tobytes())
    image.putpalette(PALETTE.tobytes())
    return encoded(image, "PNG", **options)


CMYK_HW4 = RNG.integers(0, 256, (H, W, 4), dtype=np.uint8)
# (1 - ink) * (1 - black), as every naive conversion has it.
CMYK_AS_RGB = np.rint((255 - CMYK_HW4[:, :, :3].astype(float)) * (255 - CMYK_HW4[:, :, 3:].astype(float)) / 255)
GREY16_HW = RNG.integers(0, 65536, (H, W), dtype=np.uint16)
BITS_HW = GREY_HW > 127


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encoded(Image.fromarray(RGB_HW3), "PNG"), RGB_HW3, id="rgb png"),
        pytest.param(encoded(Image.fromarray(RGB_HW3), "BMP"), RGB_HW3, id="rgb bmp"),
        pytest.param(encoded(Image.fromarray(RGB_HW3), "PPM"), RGB_HW3, id="rgb ppm"),
        pytest.param(encoded(Image.fromarray(RGB_HW3), "TIFF"), RGB_HW3, id="rgb tiff"),
        pytest.param(encoded(Image.fromarray(RGB_HW3), "WEBP", lossless=True), RGB_HW3, id="rgb webp"),
        pytest.param(encoded(Image.fromarray(GREY_HW), "PNG"), grey(GREY_HW), id="grey"),
        pytest.param(encoded(Image.fromarray(GREY16_HW), "PNG"), grey((GREY16_HW >> 8).astype(np.uint8)), id="grey 16"),
        pytest.param(
            encoded(Image.fromarray(GREY16_HW), "TIFF"), grey((GREY16_HW >> 8).astype(np.uint8)), id="tiff 16"
        ),
        pytest.param(
            encoded(Image.fromarray(GREY_HW.astype(np.int32) * 257), "TIFF"), grey(GREY_HW), id="16 bits in 32-bit tiff"
        ),
        pytest.param(encoded(Image.fromarray(BITS_HW), "PNG"), grey(BITS_HW.astype(np.uint8) * 255), id="1 bit"),
        pytest.param(palette_image(), PALETTE[GREY_HW], id="palette"),
        pytest.param(palette_image(transparency=bytes(range(256))), PALETTE[GREY_HW], id="palette, transparent"),
        pytest.param(palette_image(transparency=3), PALETTE[GREY_HW], id="palette, one transparent colour"),
        pytest.param(encoded(Image.fromarray(with_alpha(RGB_HW3)), "PNG"), RGB_HW3, id="rgba drops alpha"),
        pytest.param(
            encoded(Image.fromarray(with_alpha(GREY_HW[:, :, None])), "PNG"), grey(GREY_HW), id="la drops alpha"
        ),
    ],
)
def test_lossless_formats_become_the_painted_rgb(data: bytes, expected: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels_of(data), expected)


LAYOUTS = {
    "plain": lambda array: array,
    "columns first": np.asfortranarray,
    "reversed": lambda array: np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
    "read-only": lambda array: np.frombuffer(array.tobytes(), np.uint8).reshape(array.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("values", "expected"), [(RGB_HW3, RGB_HW3), (with_alpha(RGB_HW3), RGB_HW3), (GREY_HW, grey(GREY_HW))]
)
def test_arrays_and_tensors_of_every_layout_are_copied(values: np.ndarray, expected: np.ndarray, layout: str) -> None:
    given = LAYOUTS[layout](values)
    planes = LAYOUTS[layout](values if values.ndim == 2 else values.transpose(2, 0, 1))
    for image in (given, torch.from_numpy(planes.copy(order="K"))):
        found = decode_image(image)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
        assert found.permute(1, 2, 0).is_contiguous()
        found.zero_()
        assert np.array_equal(np.asarray(image), given if image is given else planes)


def test_cmyk_is_converted_by_the_naive_formula() -> None:
    data = encoded(Image.frombytes("CMYK", (W, H), CMYK_HW4.tobytes()), "TIFF")
    assert np.abs(pixels_of(data).astype(float) - CMYK_AS_RGB).max() <= 1


def test_cmyk_jpeg_is_not_inverted() -> None:
    """Adobe writes its CMYK JPEGs inverted; white paper must come out white."""
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert pixels_of(encoded(white, "JPEG")).min() > 250


def plain_pil(data: bytes) -> np.ndarray | None:
    """The pixels by PIL alone; None where it refuses."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except Exception:
        return None


def paint(width: int, height: int, mode: str) -> Image.Image:
    rng = np.random.default_rng(width)
    channels = len(mode) if mode != "L" else 1
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse).astype(int)[:, :, :1] + rng.normal(0, 20, (height, width, channels))
    return Image.fromarray(
        noisy.clip(0, 255).astype(np.uint8).squeeze(2) if mode == "L" else noisy.clip(0, 255).astype(np.uint8), mode
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0, "quality": 100},
        {"subsampling": 1, "optimize": True},
        {"subsampling": 2, "quality": 5},
        {"progressive": True},
        {"restart_marker_blocks": 2, "comment": b"\xff\xda\xff\xe1"},
        {"icc_profile": b"profile" * 40},
    ],
    ids=str,
)
def test_jpeg_pixels_are_those_of_pil(mode: str, options: dict[str, object]) -> None:
    for width, height in ((1, 1), (7, 5), (16, 17), (125, 94)):
        data = encoded(paint(width, height, mode), "JPEG", **options)
        assert np.array_equal(pixels_of(data), plain_pil(data))
        if have_equal_pixels():
            assert (decode_plain_jpeg(data) is None) == (mode == "CMYK")


def test_both_decoders_give_the_same_pixels_with_the_wheels_of_today() -> None:
    assert have_equal_pixels()


def test_a_damaged_jpeg_is_what_pil_makes_of_it() -> None:
    rng, refused = np.random.default_rng(0), 0
    for number in range(300):
        data = bytearray(encoded(paint(40, 30, "RGB"), "JPEG", progressive=number % 2 == 0))
        if number % 3 == 0:
            del data[int(rng.integers(1, len(data))) :]
        else:
            data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
        expected = plain_pil(bytes(data))
        if expected is None:
            refused += 1
            with pytest.raises(BadImageError):
                decode_image(bytes(data))
        else:
            assert np.array_equal(pixels_of(bytes(data)), expected)
    assert 50 < refused < 250


def test_sixteen_bit_colour_keeps_the_upper_byte() -> None:
    """Written by hand, because PIL cannot write one."""
    import struct
    import zlib

    colour = RNG.integers(0, 65536, (H, W, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + colour[y].astype(">u2").tobytes() for y in range(H))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(pixels_of(data), (colour >> 8).astype(np.uint8))


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (W, H), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(pixels_of(data), np.full((H, W, 3), (255, 0, 0), dtype=np.uint8))


TURNED = {
    1: RGB_HW3,
    2: RGB_HW3[:, ::-1],
    3: RGB_HW3[::-1, ::-1],
    4: RGB_HW3[::-1],
    5: RGB_HW3.transpose(1, 0, 2),
    6: np.rot90(RGB_HW3, -1),
    7: np.rot90(RGB_HW3, 2).transpose(1, 0, 2),
    8: np.rot90(RGB_HW3),
}


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 0, 9])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(Image.fromarray(RGB_HW3), format, exif=exif, **options)
    assert np.array_equal(pixels_of(data), TURNED.get(orientation, RGB_HW3))


def test_only_encoded_bytes_are_turned_and_only_if_wanted() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(RGB_HW3), "PNG", exif=exif)
    left_over = Image.open(io.BytesIO(data)).convert("RGB")
    assert left_over.getexif()[0x0112] == 6
    assert np.array_equal(pixels_of(left_over), RGB_HW3)
    as_it_lies = decode_image(data, Decoding(upright=False))
    assert np.array_equal(as_it_lies.permute(1, 2, 0).numpy(), RGB_HW3)


def test_bits_of_16_bit_images() -> None:
    narrow = encoded(Image.fromarray(GREY16_HW >> 4), "PNG")
    assert np.array_equal(decode_image(narrow, Decoding(bits=12))[0].numpy(), GREY16_HW >> 8)
    assert np.array_equal(decode_image(narrow, Decoding(bits=16))[0].numpy(), GREY16_HW >> 12)
    with pytest.raises(BadImageError, match="expected at most 8 bits"):
        decode_image(narrow, Decoding(bits=8))


def test_exif_orientation_of_a_jpeg_and_of_a_grey_one() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in (Image.fromarray(RGB_HW3), Image.fromarray(GREY_HW)):
        data = encoded(image, "JPEG", exif=exif)
        plain = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        assert plain.size == (H, W)
        assert np.array_equal(pixels_of(data), np.asarray(plain))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_spoil_good_pixels() -> None:
    data = encoded(Image.fromarray(RGB_HW3), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert np.array_equal(pixels_of(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20000, 2), (2, 20000), (1, 7)])
def test_odd_sizes(width: int, height: int) -> None:
    painted = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(pixels_of(encoded(Image.fromarray(painted), "PNG")), painted)


def whole_jpeg() -> bytes:
    noisy = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noisy), "JPEG", quality=95)


def zlib_cut_png() -> bytes:
    return encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG")[:600]


BAD = {
    "nothing": (b"", "empty"),
    "zeros": (bytes(5000), "not an image"),
    "text": (b"<html>404 Not Found</html>", "not an image"),
    "half a jpeg": (whole_jpeg()[:2000], "truncated"),
    "a jpeg's head": (whole_jpeg()[:20], "damaged"),
    "half a png": (zlib_cut_png(), "truncated"),
    "half a gif": (encoded(Image.fromarray(RGB_HW3), "GIF")[:30], "damaged"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    "float tiff": (encoded(Image.fromarray(GREY_HW.astype(np.float32)), "TIFF"), "floating-point"),
    "32-bit tiff": (encoded(Image.fromarray(GREY_HW.astype(np.int32) + 70000), "TIFF"), "16 bits"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_say_why(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadImageError, match=reason) as caught:
        decode_image(data)
    assert " at 0x" not in str(caught.value), "an address in the reason would make two runs' manifests differ"


def test_a_decompression_bomb_is_refused_before_it_fills_the_memory() -> None:
    small = encoded(Image.new("1", (8, 8)), "PNG")
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">II", 60000, 60000) + small[24:29]
    bomb = small[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    with pytest.raises(BadImageError, match="bomb"):
        decode_image(bomb)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damage_anywhere_is_a_bad_image_or_an_image(format: str) -> None:
    """No damage may surface as another exception: one such file would end a run of days."""
    whole = encoded(Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8)), format)
    rng = np.random.default_rng(11)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(0, 256)
        damaged = damaged[: rng.integers(1, len(whole) + 1)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                decoded_CHW = decode_image(bytes(damaged))
            except BadImageError:
                refused += 1
            else:
                assert decoded_CHW.shape[0] == 3
    assert refused > 20


def test_pixels_that_a_dataset_has_decoded() -> None:
    for image in (
        Image.fromarray(RGB_HW3),
        RGB_HW3,
        with_alpha(RGB_HW3),
        torch.from_numpy(RGB_HW3).permute(2, 0, 1),
        torch.from_numpy(with_alpha(RGB_HW3)).permute(2, 0, 1),
    ):
        assert np.array_equal(pixels_of(image), RGB_HW3)
    for image in (Image.fromarray(GREY_HW), GREY_HW, GREY_HW[:, :, None], torch.from_numpy(GREY_HW)[None]):
        assert np.array_equal(pixels_of(image), grey(GREY_HW))


def test_decoded_pixels_are_a_copy() -> None:
    source = RGB_HW3.copy()
    decode_image(source).zero_()
    decode_image(torch.from_numpy(source).permute(2, 0, 1)).zero_()
    assert np.array_equal(source, RGB_HW3)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(torch.rand(3, 8, 8), id="float tensor"),
        pytest.param(RGB_HW3.astype(np.float32), id="float array"),
        pytest.param(RGB_HW3.transpose(2, 0, 1), id="channels first as array"),
        pytest.param(torch.zeros(8, 8, 3, dtype=torch.uint8), id="channels last as tensor"),
        pytest.param("photo.jpg", id="a path"),
        pytest.param(None, id="nothing"),
    ],
)
def test_a_source_of_the_wrong_kind_of_pixels_is_not_a_bad_image(image: object) -> None:
    """Skipping image after image would end in an empty store: the source is wrong, and says so."""
    with pytest.raises(DataError, match="expected") as caught:
        decode_image(image)
    assert not isinstance(caught.value, BadImageError)


def test_an_unreadable_file_keeps_its_reason() -> None:
    with pytest.raises(BadImageError, match="Permission denied"):
        decode_image(pickle.loads(pickle.dumps(BadImageError("cannot be read: Permission denied"))))


def test_content_hash_is_xxh3_of_the_bytes_or_of_the_pixels_in_whatever_holds_them() -> None:
    assert content_hash(b"") == 0x2D06800538D394C2  # the published value of XXH3_64bits for no input
    tensor = torch.from_numpy(RGB_HW3).permute(2, 0, 1)
    same = [Image.fromarray(RGB_HW3), RGB_HW3, tensor, tensor.contiguous(), np.asfortranarray(RGB_HW3)]
    seed = xxhash.xxh3_64_intdigest(f"|u1 {H}x{W}x3".encode())
    (found,) = {content_hash(image) for image in same} | {decode_hashed(image)[1] for image in same}
    assert found == xxhash.xxh3_64_intdigest(RGB_HW3.tobytes(), seed) & ~0xFFFF | 0x7870
    grey_images = [Image.fromarray(GREY_HW), GREY_HW, GREY_HW[:, :, None], torch.from_numpy(GREY_HW)[None]]
    (of_grey,) = {content_hash(image) for image in grey_images} | {decode_hashed(image)[1] for image in grey_images}
    palette = Image.open(io.BytesIO(palette_image()))
    others = [GREY16_HW, Image.fromarray(BITS_HW), GREY_HW.T, palette, with_alpha(RGB_HW3), RGB_HW3[::-1]]
    assert len({found, of_grey, *map(content_hash, others)}) == 8
    assert content_hash(Image.fromarray(GREY16_HW)) == content_hash(GREY16_HW.astype(">u2")) == content_hash(GREY16_HW)
    assert content_hash(BadImageError("gone")) is None


def test_stacked_images_are_a_channels_last_batch() -> None:
    images_CHW = [decode_image(RNG.integers(0, 256, (4, 9, 3), dtype=np.uint8)) for _ in range(3)]
    batch_BCHW = stack_images(images_CHW)
    assert torch.equal(batch_BCHW, torch.stack(images_CHW))
    assert batch_BCHW.is_contiguous(memory_format=torch.channels_last)
