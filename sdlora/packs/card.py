"""What stands beside a shared pack: the model card, the file by which web UIs know its trigger and scale, what it is as a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora import hub
from sdlora.packs import file, header, strict
from sdlora.packs.outline import OUTLINES
from sdlora.packs.sheet import Sheet, sheet

TAGS = ("text-to-image", "diffusers", "lora", "template:sd-lora")
WARNINGS = "sdlora.warnings"
SHOWN, TOLD = 300, 10_000
"""Characters of a field that a table shows, and that a card tells: a header may hold many millions."""


def about(path: Path) -> dict[str, Any]:
    """What a pack is, by its tensors first and its header second."""
    content = file.contents(path)
    pack, _ = file.judge(content, path)
    read, said = sheet(pack.tensors, pack.metadata), pack.metadata
    alphas = sorted({module.alpha for module in read.modules if module.alpha is not None})
    found = {
        "file": path.name,
        "bytes": len(content),
        "kind": ", ".join(sorted({module.kind or "unknown" for module in read.modules})),
        "layout": ", ".join(sorted(read.layouts)),
        "modules": len(read.modules),
        "unknown_tensors": len(read.strays),
        "ranks": sorted({module.rank for module in read.modules if module.rank is not None}),
        "alphas": alphas,
        "precision": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in pack.tensors.values()}),
        "base": pack.base or said.get("ss_sd_model_name", "")[: strict.MAX_WORDS],
        "base_unet_sha256": said.get("sdlora.base_unet_sha256", ""),
        "model": said.get("modelspec.architecture", "") or read.version,
        "trigger": pack.trigger,
        "scale": pack.recommended_scale,
        "privacy": said.get("sdlora.privacy", ""),
    }
    for key in ("title", "author", "description", "license", "tags", "date"):
        found[key] = said.get(f"modelspec.{key}", "")
    return found | {"thumbnail": "modelspec.thumbnail" in said, "warnings": warnings(said), "hashes": header.hashes(content, said)}


def warnings(said: Mapping[str, str]) -> list[str]:
    """What programs do otherwise than was trained, by a pack's own word; none where that is none of ours."""
    try:
        found = json.loads(said.get(WARNINGS, "[]"))
    except (ValueError, RecursionError):
        return []
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def cut(text: str, most: int) -> str:
    """A text as it is shown: its beginning, and how much more there is."""
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most:,} more characters)"


def sidecar(pack: file.Pack) -> str:
    """`NAME.json` of AUTOMATIC1111 and what came of it, which InvokeAI reads too; there a preferred weight of 0 means none."""
    said = pack.metadata
    table = {
        "description": cut(said.get("modelspec.description", ""), TOLD),
        "sd version": web_version(sheet(pack.tensors, said)),
        "activation text": pack.trigger,
        "preferred weight": pack.recommended_scale,
        "negative text": "",
        "notes": cut(said.get("modelspec.usage_hint", ""), TOLD),
    }
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def web_version(read: Sheet) -> str:
    """The model by the word that web UIs have for it: its version's own, without the mark of the base or the dash."""
    return read.version.partition("_b")[0].replace("_v", "").upper() or "Unknown"


def model_card(pack: file.Pack, pictures: Sequence[tuple[str, str]]) -> str:
    """`README.md` with the front matter that the hub reads; `pictures` are files and the prompts that they show."""
    said = {key: cut(value, TOLD) for key, value in pack.metadata.items() if key != WARNINGS}
    title = said.get("modelspec.title", pack.name)
    body = [f"# {title}", ""]
    body += [said["modelspec.description"], ""] if "modelspec.description" in said else []
    body += ["<Gallery />", ""] if pictures else []
    body += ["## Use", "", f"Say `{pack.trigger}` in the prompt, at scale {pack.recommended_scale:g}.", ""]
    body += ["```python", *_example(pack), "```", ""]
    for warning in warnings(pack.metadata):
        body += [f"**Beware:** {warning}.", ""]
    facts = {"Base": pack.base, "Author": said.get("modelspec.author"), "Pictures trained on": said.get("ss_num_train_images")}
    facts |= {"Steps": said.get("ss_steps"), "Rank": said.get("ss_network_dim"), "Hash (AutoV3)": said.get("sshs_model_hash", "")[:12]}
    body += ["## Facts", "", *(f"- {name}: {value}" for name, value in facts.items() if value), ""]
    return "\n".join(["---", *_front_matter(pack, pictures), "---", "", *body])


def _front_matter(pack: file.Pack, pictures: Sequence[tuple[str, str]]) -> list[str]:
    """YAML, of which JSON's strings are a part."""
    said = {key: cut(value, TOLD) for key, value in pack.metadata.items()}
    version = sheet(pack.tensors, pack.metadata).version
    models = ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"] if len(_encoders(version)) > 1 else ["stable-diffusion"]
    models += ["stable-diffusion-diffusers"] if len(models) == 1 else []
    own = [tag.strip() for tag in said.get("modelspec.tags", "").split(",") if tag.strip()]
    lines = ["library_name: diffusers", "tags:"]
    lines += [f"- {json.dumps(tag, ensure_ascii=False)}" for tag in dict.fromkeys([*TAGS, *(models if version else []), *own])]
    if hub.is_id(pack.base):
        lines += [f"base_model: {json.dumps(pack.base)}", "base_model_relation: adapter"]
    lines += [f"instance_prompt: {json.dumps(pack.trigger, ensure_ascii=False)}"] if pack.trigger else []
    lines += [f"license: {json.dumps(said['modelspec.license'], ensure_ascii=False)}"] if "modelspec.license" in said else []
    lines += ["widget:"] if pictures else []
    for name, prompt in pictures:
        lines += [f"- text: {json.dumps(prompt, ensure_ascii=False)}", "  output:", f"    url: {json.dumps(name, ensure_ascii=False)}"]
    return lines


def _encoders(version: str) -> tuple[int, ...]:
    return OUTLINES[version].encoders if version else ()


def _example(pack: file.Pack) -> list[str]:
    kind = "StableDiffusionXLPipeline" if len(_encoders(sheet(pack.tensors, pack.metadata).version)) > 1 else "StableDiffusionPipeline"
    base = pack.base or "the base that it was trained on"
    return [
        f"from diffusers import {kind}",
        "",
        f"pipeline = {kind}.from_pretrained({base!r})",
        f'pipeline.load_lora_weights(".", weight_name={pack.name + ".safetensors"!r})',
        f"pipeline({pack.trigger!r}).images[0]",
    ]


def rows(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`about` for reading: what is empty is left out, and what is a table itself is spread."""
    found = []
    for key, value in table.items():
        if isinstance(value, dict):
            found += [(inner, str(one)) for inner, one in value.items()]
        elif isinstance(value, list):
            found += [(key, ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value))] if value else []
        elif value not in ("", 0) or key == "scale":
            found.append((key, f"{value:,}" if key == "bytes" else str(value)))
    return [(name.replace("_", " "), cut(text, SHOWN)) for name, text in found]
