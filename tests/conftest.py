"""Fixtures that several test files share; nothing here reaches the network."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path

import bases
import pytest
import small
import torch

from sdlora import family
from sdlora.family import Family
from sdlora.packs.file import Pack, load
from sdlora.studio import Studio


def pytest_collection_finish() -> None:
    """What the imported libraries hold stays; without this, each run's own collection walks through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def fixtures_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What fixtures of many tests compute goes here, never into the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a cache of its own, and programs that it starts have the same."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SDLORA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random base of SD 1's structure: pictures of 32 px, four pixels to a latent."""
    return small.make_base(tmp_path_factory.mktemp("bases") / "small-base", small.SMALL_UNET, text_layers=2, vae_levels=3)


@pytest.fixture(scope="session")
def sd15_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with every block of Stable Diffusion 1.5, only narrow: 512 px, eight pixels to a latent."""
    return small.make_base(tmp_path_factory.mktemp("bases") / "narrow-sd15", small.NARROW_SD15, text_layers=12, vae_levels=4)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random base of each family, with the true kinds of blocks: 64 px, eight pixels to a latent."""
    return {name: make(tmp_path_factory.mktemp("families") / f"small-{name}") for name, make in bases.MAKERS.items()}


@pytest.fixture
def loaded(base: Path) -> Family:
    """The small base, loaded afresh for each test."""
    return family.load(family.find(str(base)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of several shapes, three with captions; tests leave them as they are."""
    return small.draw_folder(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but all of one shape, which trains faster."""
    return small.draw_folder(tmp_path_factory.mktemp("data") / "squares", square=True)


@pytest.fixture(scope="session")
def pack_path(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of random weights for the small base."""
    loaded = family.load(family.find(str(base)), torch.device("cpu"), torch.float32)
    return small.random_pack(tmp_path_factory.mktemp("packs") / "mira.safetensors", loaded)


@pytest.fixture
def pack(pack_path: Path) -> Pack:
    return load(pack_path)


@pytest.fixture
def studio(base: Path) -> Studio:
    """The small base, ready to draw, without a pack."""
    return Studio.open(family.find(str(base)))
