"""The screen Share without a browser: what it says of a pack, what it writes, makes, sends and takes."""

import os
import zipfile
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import small
import torch

from sdlora import api, family
from sdlora.packs import file
from webui import app
from webui.house import House
from webui.share import Share

ODD = "<b>bold</b>"


@pytest.fixture
def house(base: Path, tmp_path: Path) -> House:
    root, outputs = tmp_path / "root", tmp_path / "outputs"
    for folder in (root, outputs):
        folder.mkdir()
    loaded = family.load(family.find(str(base)), torch.device("cpu"), torch.float32)
    pack = file.load(small.random_pack(tmp_path / "mira.safetensors", loaded))
    said = {**pack.metadata, "modelspec.title": ODD, "ss_base_model_version": "sd_v1", "sdlora.privacy": "public"}
    file.save(root / "mira.safetensors", pack.tensors, lambda sha: {**said, "sshs_model_hash": sha})
    return app.new_house(root, outputs)


@pytest.fixture
def share(house: House) -> Share:
    with gr.Blocks() as page:
        return Share(house, page.load)


def values(share: Share, **said: Any) -> dict[Any, Any]:
    """What the page sends."""
    fields = {share.pack: "mira.safetensors", share.repository: "owner/mira", share.private: True, share.shown: None, share.trigger: "mira",
              share.scale: 1.0, **dict.fromkeys(share.fields.values(), "")}  # fmt: skip
    return fields | {getattr(share, name, None) or share.fields[name]: value for name, value in said.items()}


def test_it_says_who_opens_a_pack_and_what_becomes_public(share: Share) -> None:
    told = share.look(values(share))
    assert told[share.readers].count("<tr>") == 7, "six programs under a head"
    assert "diffusers" in told[share.readers]
    assert "sdlora.base" in told[share.public]
    assert ODD not in told[share.public]
    assert "&lt;b&gt;bold" in told[share.public], "a header is text, whatever it says"
    assert told[share.trigger] == "mira"
    assert told[share.command].startswith("sdlora pack check ")
    nothing = share.look({**values(share), share.pack: None})
    assert "no pack yet" in nothing[share.readers]
    with pytest.raises(gr.Error, match="E-UI-01"):
        share.look(values(share, pack="../mira.safetensors"))


def test_facts_are_written_and_the_weights_left_alone(share: Share, house: House) -> None:
    path = house.projects.root / "mira.safetensors"
    before = file.load(path)
    told = share.describe(values(share, title="Mira", license="cc-by-4.0", scale=0.8))
    after = file.load(path)
    assert after.sha256 == before.sha256
    assert after.metadata["modelspec.title"] == "Mira"
    assert after.recommended_scale == 0.8
    for word in ("pack edit", "modelspec.license=cc-by-4.0", "--scale 0.8"):
        assert word in told[share.command]
    assert "--trigger" not in told[share.command], "what stays is not written"
    with pytest.raises(gr.Error, match="E-UI-17"):
        share.describe(values(share, title="Mira", license="cc-by-4.0", scale=0.8))


def test_a_bundle_is_made_where_it_may_be_given_out(share: Share, house: House) -> None:
    told = share.make(values(share))
    assert "mira.zip" in str(told[share.download].value)
    path = house.easel.folder.parent / "bundles" / "mira.zip"
    with zipfile.ZipFile(path) as archive:
        assert {"mira.safetensors", "mira.json", "README.md", "SHA256SUMS"} <= set(archive.namelist())
    assert "sdlora pack bundle" in told[share.command]


def test_nothing_is_sent_but_what_was_shown(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(api.Push, "send", lambda push: sent.append(push.repository) or "hub/owner/mira")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    told = share.rehearse(values(share))
    assert "no HF_TOKEN" in told[share.sending]
    assert not told[share.send].interactive
    monkeypatch.setenv("HF_TOKEN", "secret")
    told = share.rehearse(values(share))
    assert told[share.send].interactive
    assert "visible to you alone" in told[share.sending]
    assert "secret" not in told[share.sending]
    for other in ({}, {"shown": told[share.shown], "private": False}, {"shown": told[share.shown], "repository": "other/mira"}):
        with pytest.raises(gr.Error, match="E-UI-18"):
            share.go(values(share, **other))
    assert sent == []
    assert "hub/owner/mira" in share.go(values(share, shown=told[share.shown]))[share.sending]
    assert sent == ["owner/mira"]


def test_a_page_that_others_reach_sends_nothing(house: House, share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    share.house = House(type(house.projects)(house.projects.root, listens=True), house.links, house.live, house.easel)
    with pytest.raises(gr.Error, match="E-UI-06"):
        share.rehearse(values(share))


def test_somebodys_pack_is_looked_through_and_listed(share: Share, house: House, tmp_path: Path) -> None:
    share.make(values(share))
    zipped = house.easel.folder.parent / "bundles" / "mira.zip"
    told = share.take({**values(share), share.received: str(zipped)})
    assert "mira.safetensors" in told[share.told]
    assert told[share.pack].value == "received/mira/mira.safetensors"
    assert share.take({**values(share), share.received: str(zipped)})[share.pack].value == "received/mira-2/mira.safetensors"
    bad = house.easel.folder.parent / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("a.pkl", b"x")
    for path, code in ((bad, "E-PACK-12"), (tmp_path / "mira.safetensors", "E-UI-06"), (Path(os.devnull), "E-UI-06")):
        with pytest.raises(gr.Error, match=code):
            share.take({**values(share), share.received: str(path)})
    assert not (house.projects.root / "received" / "bad").exists()
