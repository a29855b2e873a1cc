"""Pictures: scale 0 is the base bit for bit, a batch is its rows, a seed is diffusers' seed, and a picture says how it was made."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import small
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdlora import api, generate, pictures
from sdlora.errors import BAD_INPUT, UserError
from sdlora.generate import Recipe
from sdlora.packs.file import Pack
from sdlora.studio import Studio, parse_pack, parse_scale, parse_size


@pytest.fixture
def adapted(studio: Studio, pack: Pack) -> Studio:
    """The studio with one pack, `mira`."""
    studio.add(pack)
    return studio


def at(recipe: Recipe, *scales: float) -> list[Recipe]:
    return [recipe.at(scales=(("mira", scale),)) for scale in scales]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_scale_zero_is_the_base_bit_for_bit(adapted: Studio, guidance: float) -> None:
    recipe = adapted.recipe("a cat", guidance=guidance, steps=3)
    base = adapted.pixels([recipe] * 3)
    assert torch.equal(adapted.pixels(at(recipe, 0.0, 0.0, 0.0)), base)
    strip = adapted.pixels(at(recipe, 1.0, 0.0, -0.5))
    assert torch.equal(strip[1], base[1]), "also beside others at other scales"
    assert (strip[0] - base[0]).abs().max() > 1e-2, "the control: scale 1 is another picture"
    assert (strip[2] - base[2]).abs().max() > 1e-2
    adapted.remove("mira")
    assert torch.equal(adapted.pixels([recipe] * 3), base)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_batch_of_strengths_is_as_many_renders(adapted: Studio, guidance: float) -> None:
    recipes = at(adapted.recipe("a cat", guidance=guidance, steps=3), -1.0, 0.0, 0.25, 0.5, 1.0)
    together = adapted.pixels(recipes)
    for recipe, row in zip(recipes, together, strict=True):
        assert (adapted.pixels([recipe])[0] - row).abs().max() <= 1 / 255
    for size in (1, 2, 3):
        assert (adapted.pixels(recipes, batch=size) - together).abs().max() <= 1 / 255
    assert min((a - b).abs().max() for a, b in pairwise(together)) > 1 / 255


def test_the_text_encoders_scale_may_be_another(adapted: Studio) -> None:
    recipe = adapted.recipe("a cat", steps=3)

    def drawn(scale: float, text: float) -> torch.Tensor:
        return adapted.pixels([recipe.at(scales=(("mira", scale),), text_scales=(("mira", text),))])

    assert torch.equal(drawn(0.5, 0.5), adapted.pixels(at(recipe, 0.5)))
    assert torch.equal(drawn(0.0, 0.0), adapted.pixels([recipe]))
    four = [drawn(scale, text) for scale in (0.0, 1.0) for text in (0.0, 1.0)]
    assert min((a - b).abs().max() for a, b in combinations(four, 2)) > 1e-3, "each half alone, both and none are four pictures"
    with torch.no_grad():
        for dotted, _, delta in adapted.bank.deltas("mira"):  # the oracle: without its half in the UNet a pack is all text encoder
            for parameter in delta.parameters() if dotted.startswith("unet.") else ():
                parameter.zero_()
    assert torch.equal(drawn(1.0, 1.0), four[1])
    rows = [recipe.at(scales=(("mira", 1.0),), text_scales=(("mira", text),)) for text in (1.0, 0.0)]
    assert (adapted.pixels(rows)[0] - adapted.pixels(rows)[1]).abs().max() > 1e-3, "rows of a batch have their own"


def test_rows_of_a_batch_have_their_own_prompt_and_seed(adapted: Studio) -> None:
    recipe = adapted.recipe("a cat", steps=2)
    recipes = [recipe, recipe.at(seed=1), recipe.at(prompt="a dog"), recipe.at(negative="a dog"), *at(recipe, 1.0)]
    together = adapted.pixels(recipes)
    for i, one in enumerate(recipes):
        assert (adapted.pixels([one])[0] - together[i]).abs().max() <= 1 / 255
        assert all((together[i] - other).abs().max() > 1e-3 for other in together[i + 1 :])


def test_rendering_leaves_the_studio_as_it_was(adapted: Studio) -> None:
    recipe = adapted.recipe("a cat", steps=2)
    first = adapted.render(at(recipe, 1.0))[0]
    assert adapted.bank.route is None
    assert adapted.render(at(recipe, 1.0))[0].tobytes() == first.tobytes()


def test_a_recipe_that_names_no_pack_here_draws_the_base(adapted: Studio) -> None:
    recipe = adapted.recipe("a cat", steps=2)
    assert torch.equal(adapted.pixels([recipe.at(scales=(("unknown", 1.0),))]), adapted.pixels([recipe]))


def test_strips_show_the_base_and_every_scale(adapted: Studio) -> None:
    recipes = [adapted.recipe(prompt, steps=2) for prompt in ("a cat", "a dog", "a hen")]
    rows = adapted.strips(recipes, ["mira"], [0.0, 1.0])
    assert [len(row) for row in rows] == [3, 3, 3]
    assert all(row[0].tobytes() == row[1].tobytes() != row[2].tobytes() for row in rows), "the base is scale 0"
    assert len({row[0].tobytes() for row in rows}) == 3


# ---------------------------------------------------------------- diffusers


@pytest.mark.parametrize(("seed", "negative", "size"), [(0, "", (32, 32)), (7, "a dog", (48, 32)), (2**40 + 3, "", (32, 48))])
def test_a_seed_means_diffusers_picture(studio: Studio, base: Path, seed: int, negative: str, size: tuple[int, int]) -> None:
    recipe = studio.recipe("a cat", f"{size[0]}x{size[1]}", 3.0, seed=seed, steps=4, negative=negative)
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        recipe.prompt,
        negative_prompt=negative,
        num_inference_steps=4,
        guidance_scale=3.0,
        width=size[0],
        height=size[1],
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    ours = studio.pixels([recipe])
    assert ours.shape == theirs.shape == (1, 3, size[1], size[0])
    assert (ours - theirs).abs().max() <= 1e-4
    assert (studio.pixels([recipe.at(seed=seed + 1)]) - theirs).abs().max() > 1e-2, "the control: another seed"


def test_noise_is_that_of_torchs_own_generator(studio: Studio) -> None:
    recipe = studio.recipe("a cat", seed=5)
    wanted = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))[0]
    assert torch.equal(generate.initial_latents(studio.family, recipe), wanted)


# ---------------------------------------------------------------- files


def test_a_picture_carries_its_recipe(adapted: Studio, tmp_path: Path) -> None:
    recipe = adapted.recipe('a "cat", ümläut · 猫', steps=2, seed=3, negative="dog", scales=(("mira", 0.75),))
    drawn = adapted.render([recipe])[0]
    api.save_picture(tmp_path / "a.png", adapted, drawn, recipe)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.convert("RGB").tobytes() == drawn.tobytes()
        texts = picture.text  # type: ignore[attr-defined]
    table = json.loads(texts["sdlora"])
    assert (table.pop("base"), table.pop("packs")) == ("small-base", ["mira"])
    for own in ("scales", "text_scales"):
        table[own] = tuple((name, scale) for name, scale in table[own])
    assert Recipe(**table) == recipe
    assert adapted.render([Recipe(**table)])[0].tobytes() == drawn.tobytes()
    lines = texts["parameters"].splitlines()
    assert lines[0] == 'a "cat", ümläut · 猫 <lora:mira:0.75>'
    assert lines[1] == "Negative prompt: dog"
    assert all(part in lines[2] for part in ("Steps: 2", "Seed: 3", "Size: 32x32", "CFG scale: 3"))


def test_a_picture_is_a_png_or_nothing(adapted: Studio, tmp_path: Path) -> None:
    recipe = adapted.recipe("a cat", steps=1)
    with pytest.raises(UserError, match="E-GEN-07"):
        api.save_picture(tmp_path / "a.jpg", adapted, Image.new("RGB", (4, 4)), recipe)
    assert list(tmp_path.iterdir()) == []


def cells(rows: int, columns: int, size: tuple[int, int] = (32, 32)) -> tuple[Image.Image, set[tuple[int, int, int]]]:
    """A sheet of plain pictures, and their colours."""
    colours = [[(10 * r + 5, 20 * c + 5, 200) for c in range(columns)] for r in range(rows)]
    drawn = [[Image.new("RGB", size, colour) for colour in row] for row in colours]
    sheet = pictures.sheet(drawn, [f"row {r}" for r in range(rows)], [f"{c}" for c in range(columns)], "title")
    return sheet, {colour for row in colours for colour in row}


def test_a_sheet_has_room_for_every_picture_and_label() -> None:
    sheet, colours = cells(2, 3)
    seen = {colour: count for count, colour in sheet.getcolors(1 << 24) or []}
    (area,) = {seen[colour] for colour in colours}
    side = round(area**0.5)
    assert side**2 == area, "none is covered or cut"
    assert side % 32 == 0, "small ones are enlarged by a whole number"
    assert side > 96
    wider, taller, whole = cells(2, 4)[0], cells(3, 3)[0], cells(1, 1)[0]
    assert wider.width - sheet.width >= side
    assert wider.height == sheet.height
    assert taller.height - sheet.height >= side
    assert taller.width == sheet.width
    assert whole.width >= side
    assert cells(1, 1, (512, 256))[0].width - 512 < 40, "large ones are not"


def test_a_grid_has_a_row_for_each_prompt_and_seed(adapted: Studio, tmp_path: Path) -> None:
    recipes = [adapted.recipe(prompt, seed=seed, steps=1) for prompt in ("a cat", "a dog") for seed in (0, 1)]
    one, four = (api.grid(adapted, rows, [0.0, 1.0]) for rows in (recipes[:1], recipes))
    assert one.width == four.width == cells(1, 3)[0].width
    assert four.height == cells(4, 3)[0].height > one.height == cells(1, 3)[0].height
    api.save_sheet(tmp_path / "grid.png", lambda: four)
    with Image.open(tmp_path / "grid.png") as again:
        assert again.tobytes() == four.tobytes()


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("code", "size", "rest"),
    [
        ("E-GEN-01", "30x32", {}),
        ("E-GEN-01", "32x0", {}),
        ("E-GEN-01", "32", {}),
        ("E-GEN-01", "x32", {}),
        ("E-GEN-01", "-32x32", {}),
        ("E-GEN-01", "8000x8000", {}),
        ("E-GEN-01", "³²x32", {}),
        ("E-GEN-02", "", {"steps": 0}),
        ("E-GEN-02", "", {"steps": 501}),
        ("E-GEN-03", "", {"guidance": -1.0}),
        ("E-GEN-03", "", {"guidance": float("nan")}),
        ("E-GEN-03", "", {"guidance": 101.0}),
        ("E-GEN-04", "", {"seed": -1}),
        ("E-GEN-04", "", {"seed": 2**63}),
        ("E-GEN-05", "", {"prompt": "x" * 2001}),
        ("E-GEN-05", "", {"negative": "x" * 2001}),
    ],
)
def test_what_cannot_be_drawn_is_refused(studio: Studio, code: str, size: str, rest: dict[str, object]) -> None:
    with pytest.raises(UserError, match=code) as caught:
        studio.recipe(**{"prompt": "a cat", "size": size, **rest})  # type: ignore[arg-type]
    assert caught.value.exit_code == BAD_INPUT
    assert studio.recipe("a cat").prompt == "a cat", "the control"


def test_what_is_left_open_is_the_bases_own(studio: Studio) -> None:
    recipe = studio.recipe("a cat")
    assert (recipe.width, recipe.height, recipe.guidance) == (32, 32, 3.0)
    assert parse_size("640X512") == (640, 512)


@pytest.mark.parametrize("text", ["abc", "", "nan", "inf", "5", "-4.1", "1,5"])
def test_what_is_no_scale_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="E-GEN-06"):
        parse_scale(text)
    assert parse_scale("-0.5") == -0.5


def test_a_pack_may_carry_its_scale(tmp_path: Path) -> None:
    odd = tmp_path / "a:b.safetensors"
    odd.write_bytes(b"")
    for path in ("runs/a.safetensors", str(odd), r"C:\packs\a.safetensors"):
        assert parse_pack(path) == (Path(path), None, None)
        assert parse_pack(f"{path}:-1") == (Path(path), -1.0, None)
        assert parse_pack(f"{path}:0.8:0.5") == (Path(path), 0.8, 0.5)
    for odd_scale in ("much", "0.5:much", "0.5:9", "9:0.5", "nan"):
        with pytest.raises(UserError, match="E-GEN-06"):
            parse_pack(f"a.safetensors:{odd_scale}")


def test_prompts_that_are_cut_are_told(studio: Studio) -> None:
    long = "word " * 40
    assert studio.cut_prompts(["a cat", long]) == [long]


def test_one_pack_opened_twice_goes_by_two_names(adapted: Studio, pack: Pack) -> None:
    assert adapted.add(pack) == "mira+"
    recipe = adapted.recipe("a cat", steps=2)
    twice = adapted.pixels([recipe.at(scales=(("mira", 0.5), ("mira+", 0.5)))])
    assert (twice - adapted.pixels(at(recipe, 1.0))).abs().max() <= 1e-4


def test_the_packs_own_base_is_opened(base: Path, pack: Pack) -> None:
    assert api.open_studio([pack], str(base)).family.base.name == "small-base"
    with pytest.raises(UserError, match="E-BASE") as caught:
        api.open_studio([pack])
    assert "small-base" in str(caught.value)
    assert small.TOKENS == 16
