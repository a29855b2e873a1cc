"""The doctor names what was planted and nothing else: each defect has its control, copies are found among pictures that are distinct."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from sdlora.data import doctor, fingerprints
from sdlora.data.doctor import REASONS, Finding
from sdlora.data.looks import Look, look, thumbnails

Picture = Image.Image
SIDE = 160


def draw(seed: int, ground: tuple[int, ...] | None = None) -> Picture:
    """A picture of its own for each seed: a slope of colour with shapes on it."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(0, 256, (2, 3)) if ground is None else np.array([ground, ground])
    slope = np.linspace(ends[0], ends[1], SIDE)[None].repeat(SIDE, 0)
    picture = Image.fromarray(slope.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for k in range(8):
        left, upper = rng.integers(20, SIDE - 60, 2).tolist()
        width, height = rng.integers(16, 48, 2).tolist()
        box, colour = (left, upper, left + width, upper + height), tuple(rng.integers(0, 256, 3).tolist())
        (pen.ellipse, pen.rectangle)[k % 2](box, fill=colour)
    return picture


def jpeg(picture: Picture, quality: int) -> Picture:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cropped(picture: Picture, sides: Sequence[int]) -> Picture:
    w, h = picture.size
    left, upper, right, lower = (0.05 * (side in sides) for side in range(4))
    return picture.crop((round(left * w), round(upper * h), round(w - right * w), round(h - lower * h)))


def blank(_: Picture) -> Picture:
    noise = np.random.default_rng(0).normal(128, 4, (SIDE, SIDE, 3))
    return Image.fromarray(noise.astype(np.uint8))


def codes(pictures: Mapping[str, Picture], resolution_px: int = 160) -> set[str]:
    return {finding.code for finding in doctor.examine({file: look(picture) for file, picture in pictures.items()}, resolution_px)}


# ---------------------------------------------------------------- one picture

FLAWS: list[tuple[str, Callable[[Picture], Picture]]] = [
    ("tiny", lambda picture: picture.resize((70, 70))),
    ("extreme-aspect", lambda picture: picture.resize((420, 160))),
    ("extreme-aspect", lambda picture: picture.resize((160, 420))),
    ("blurred", lambda picture: picture.filter(ImageFilter.GaussianBlur(0.015 * SIDE))),
    ("blurred", lambda picture: picture.resize((40, 40)).resize((600, 600), Image.Resampling.BICUBIC)),
    ("over-compressed", lambda picture: jpeg(picture, 5)),
    ("over-compressed", lambda picture: jpeg(picture, 8)),
    ("over-compressed", lambda picture: jpeg(picture, 5).crop((3, 5, 160, 160))),
    ("nearly-uniform", blank),
]
SOUND: list[Callable[[Picture], Picture]] = [
    lambda picture: picture,
    lambda picture: picture.resize((800, 800), Image.Resampling.LANCZOS),
    lambda picture: picture.resize((310, 150)),
    lambda picture: picture.resize((90, 90)),
    lambda picture: jpeg(picture, 90),
    lambda picture: picture.filter(ImageFilter.GaussianBlur(0.4)),
    lambda picture: ImageEnhance.Contrast(picture).enhance(0.3),
]


@pytest.mark.parametrize(("code", "spoil"), FLAWS)
def test_a_flaw_is_named_and_no_other(code: str, spoil: Callable[[Picture], Picture]) -> None:
    for seed in range(6):
        assert codes({"a.png": spoil(draw(seed))}) == {code}


@pytest.mark.parametrize("alter", SOUND)
def test_a_sound_picture_has_no_flaw(alter: Callable[[Picture], Picture]) -> None:
    for seed in range(6):
        assert codes({"a.png": alter(draw(seed))}) == set()


def test_a_straight_edge_on_the_grid_is_no_block() -> None:
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).rectangle((16, 24, 95, 103), fill="black")
    pixel_art = draw(0).resize((20, 20)).resize((160, 160), Image.Resampling.NEAREST)
    for one in (picture, pixel_art):
        assert codes({"a.png": one}) == set()


def test_a_look_keeps_in_json_and_is_small() -> None:
    seen = look(draw(0))
    text = json.dumps(asdict(seen))
    assert Look(**json.loads(text)) == seen
    assert len(text) < 5000
    assert thumbnails([seen]).shape == (1, 32, 32, 3)


def test_a_look_depends_on_the_pixels_and_their_shape() -> None:
    picture = draw(0)
    edited = picture.copy()
    edited.putpixel((3, 3), (1, 2, 3))
    turned = Image.frombytes("RGB", (SIDE // 2, SIDE * 2), picture.tobytes())
    assert len({look(one).digest for one in (picture, edited, turned)}) == 3


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (9, 9), (31, 40)])
def test_any_size_can_be_looked_at(size: tuple[int, int]) -> None:
    assert np.isfinite([value for value in asdict(look(Image.new("RGB", size, "red"))).values() if isinstance(value, float)]).all()


# ---------------------------------------------------------------- copies

COPIES: dict[str, Callable[[Picture], Picture]] = {
    "half": lambda picture: picture.resize((80, 80), Image.Resampling.LANCZOS),
    "larger": lambda picture: picture.resize((240, 240), Image.Resampling.BICUBIC),
    "jpeg 40": lambda picture: jpeg(picture, 40),
    "jpeg 85": lambda picture: jpeg(picture, 85),
    "one side": lambda picture: cropped(picture, [0]),
    "two sides": lambda picture: cropped(picture, [1, 2]),
    "all sides": lambda picture: cropped(picture, [0, 1, 2, 3]),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.93),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.07),
}


def grouped(findings: Sequence[Finding], code: str) -> set[frozenset[str]]:
    return {frozenset(finding.files) for finding in findings if finding.code == code}


@pytest.fixture(scope="module")
def distinct() -> dict[str, Picture]:
    return {f"{seed:02}": draw(seed, (255, 255, 255) if seed % 2 else None) for seed in range(60)}


@pytest.fixture(scope="module")
def seen(distinct: dict[str, Picture]) -> dict[str, Look]:
    return {file: look(picture) for file, picture in distinct.items()}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_among_distinct_pictures(kind: str, distinct: dict[str, Picture], seen: dict[str, Look]) -> None:
    planted = {f"{file} copy": look(COPIES[kind](picture)) for file, picture in distinct.items()}
    findings = list(doctor.of_set({**seen, **planted}))
    found = grouped(findings, "near-duplicate")
    true = {frozenset((file, f"{file} copy")) for file in distinct}
    assert len(found & true) >= 0.9 * len(true)
    assert len(found & true) >= 0.9 * len(found)
    assert not grouped(findings, "duplicate")


def test_equal_pictures_are_found_exactly(distinct: dict[str, Picture], seen: dict[str, Look]) -> None:
    planted = {f"{file} copy": look(picture.copy()) for file, picture in list(distinct.items())[::3]}
    findings = list(doctor.of_set({**seen, **planted}))
    assert grouped(findings, "duplicate") == {frozenset((file, f"{file} copy")) for file in list(distinct)[::3]}
    assert not grouped(findings, "near-duplicate")


def test_distinct_pictures_are_no_copies(seen: dict[str, Look]) -> None:
    findings = list(doctor.of_set(seen))
    assert not grouped(findings, "near-duplicate") | grouped(findings, "duplicate")


def test_pictures_that_differ_in_one_place_are_no_copies(distinct: dict[str, Picture]) -> None:
    """A mirror image, another colour, and one more spot: drawings of one family, not copies."""
    for file in list(distinct)[:10]:
        picture = distinct[file]
        spotted = picture.copy()
        ImageDraw.Draw(spotted).ellipse((70, 70, 100, 100), fill="white", outline="black", width=6)
        red, green, blue = picture.split()
        others = {"m": picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "c": Image.merge("RGB", (blue, red, green)), "s": spotted}
        looks = {name: look(one) for name, one in {"a": picture, **others}.items()}
        assert not grouped(list(doctor.of_set(looks)), "near-duplicate")


def test_many_versions_make_one_group() -> None:
    versions = {kind: copy(draw(1)) for kind, copy in COPIES.items()}
    found = grouped(list(doctor.of_set({file: look(picture) for file, picture in versions.items()})), "near-duplicate")
    assert found == {frozenset(COPIES)}


@pytest.mark.slow
def test_of_ten_thousand_pictures_few_are_laid_on_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs are compared by products of matrices; what takes long, the alignment, is for those that are near."""
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 256, (10_000, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    thumbs[9000:9050] = (thumbs[:50] * 0.95 + 2).astype(np.uint8)
    pairs, aligned = list[int](), fingerprints.aligned
    monkeypatch.setattr(fingerprints, "aligned", lambda target, *rest: (pairs.append(len(target)), aligned(target, *rest))[1])
    found = fingerprints.near_pairs(thumbs)
    assert 50 <= sum(pairs[::2]) <= 500, "of fifty million pairs; there are two alignments, the second of what the first leaves"
    assert [(pair.first, pair.second) for pair in found] == [(k, 9000 + k) for k in range(50)]


# ---------------------------------------------------------------- a uniform set


def framed(seed: int, ground: tuple[int, int, int], middle: tuple[int, int]) -> Picture:
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (SIDE, SIDE), ground)
    box = [middle[0] - 30, middle[1] - 30, middle[0] + 30, middle[1] + 30]
    pen = ImageDraw.Draw(picture)
    pen.ellipse(box, fill=tuple(rng.integers(0, 200, 3).tolist()))
    pen.rectangle((box[0] + 20, box[1] + 10 + seed, box[2] - 20, box[3] - 20), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return picture


GROUNDS = [(255, 255, 255), (200, 30, 30), (20, 120, 60), (40, 60, 200), (240, 200, 20), (90, 90, 90)]
MIDDLES = [(80, 80), (50, 60), (110, 60), (50, 110), (110, 110), (80, 40)]


@pytest.mark.parametrize(
    ("grounds", "middles", "expected"),
    [
        (GROUNDS, MIDDLES, set()),
        (GROUNDS[:1] * 6, MIDDLES, {"same-ground"}),
        (GROUNDS, MIDDLES[:1] * 6, {"same-framing"}),
        (GROUNDS[:1] * 6, MIDDLES[:1] * 6, {"same-ground", "same-framing"}),
        (GROUNDS[:1] * 5 + GROUNDS[1:2], MIDDLES, {"same-ground"}),
        (GROUNDS[:1] * 3 + GROUNDS[1:4], MIDDLES, set()),
        (GROUNDS[:1] * 3, MIDDLES[:1] * 3, set()),
    ],
)
def test_a_uniform_set_is_named(grounds: Sequence[tuple[int, int, int]], middles: Sequence[tuple[int, int]], expected: set[str]) -> None:
    pictures = {f"{k}.png": framed(k, ground, middle) for k, (ground, middle) in enumerate(zip(grounds, middles, strict=False))}
    assert codes(pictures) == expected


# ---------------------------------------------------------------- what is said


def words(text: str) -> list[tuple[int, int]]:
    """A tokenizer for the tests: a token is a word."""
    ends = [k for k in range(len(text) + 1) if k == len(text) or text[k] == " "]
    return [(start, end) for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False) if end > start]


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([["a red dog"], ["a cat"], ["two birds"]], set()),
        ([["a red dog"], [], ["two birds"]], set()),
        ([["a red dog"], ["  "], ["two birds"]], set()),
        ([["a dog"], ["a dog"], ["two birds"]], {"captions-identical"}),
        ([["a dog"], ["a dog"], ["b"], ["c"], ["d"]], set()),
        ([["one"], ["a cat", "1 2 3 4 5 6 7 8 9"]], {"caption-too-long"}),
        ([["one"], ["1 2 3 4 5 6"]], set()),
        ([["alone"]], set()),
    ],
)
def test_captions_are_judged(captions: Sequence[Sequence[str]], expected: set[str]) -> None:
    files = {f"{k}.png": texts for k, texts in enumerate(captions)}
    assert {finding.code for finding in doctor.of_captions(files, words, 6)} == expected


def test_the_dropped_text_is_said() -> None:
    (finding,) = doctor.of_captions({"a.png": ["a dog that runs along the beach"]}, words, 4)
    assert finding.detail.endswith("dropped: 'along the beach'")


@pytest.mark.parametrize(("trigger", "named"), [("dog", True), ("red dog", True), ("tavi", False), ("tavi dog", False), ("", False)])
def test_a_trigger_that_is_a_word_is_named(trigger: str, named: bool) -> None:
    found = list(doctor.of_trigger(trigger, lambda word: 1 if word in ("dog", "red") else 3))
    assert [finding.code for finding in found] == ["trigger-is-a-word"] * named


def test_every_code_has_its_reason_and_every_reason_a_test() -> None:
    tested = {code for code, _ in FLAWS} | {"duplicate", "near-duplicate", "same-ground", "same-framing"}
    tested |= {"captions-identical", "caption-too-long", "trigger-is-a-word"}
    assert set(REASONS) == tested


def test_warnings_come_before_notes() -> None:
    pictures = {f"{k}.png": framed(k, GROUNDS[0], MIDDLES[k]) for k in range(6)}
    pictures["b.png"] = pictures["5.png"].filter(ImageFilter.GaussianBlur(4))
    findings = doctor.examine({file: look(picture) for file, picture in pictures.items()}, 160)
    assert [finding.severity for finding in findings] == sorted((finding.severity for finding in findings), reverse=True)
    assert {finding.severity for finding in findings} == {"warn", "note"}
