"""How the original implementation of latent diffusion calls the layers of a UNet that diffusers calls otherwise."""

from collections.abc import Container, Iterable, Iterator

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def names(blocks: int, layers: int, attended: Container[int]) -> Iterator[tuple[str, str]]:
    """Beginnings of diffusers' layer names, and what they are called in the original implementation.

    `blocks` resolutions, `layers` residual blocks at each on the way down (one more on the way up), and which blocks on the way up
    attend: an upsampler's number is its place behind residual block and attention.
    """
    yield from {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}.items()
    for ours, theirs in {"time_embedding": "time_embed", "add_embedding": "label_emb.0"}.items():
        yield from ((f"{ours}.linear_{i + 1}", f"{theirs}.{2 * i}") for i in range(2))
    places = [(f"down_blocks.{i}", j, f"input_blocks.{1 + (layers + 1) * i + j}") for i in range(blocks) for j in range(layers)]
    places += [(f"up_blocks.{i}", j, f"output_blocks.{(layers + 1) * i + j}") for i in range(blocks) for j in range(layers + 1)]
    yield "mid_block.attentions.0", "middle_block.1"
    yield from ((f"{block}.attentions.{j}", f"{place}.1") for block, j, place in places)
    residuals = [*((block, j, f"{place}.0") for block, j, place in places), *(("mid_block", i, f"middle_block.{2 * i}") for i in range(2))]
    for block, j, residual in residuals:
        yield from ((f"{block}.resnets.{j}.{ours}", f"{residual}.{theirs}") for ours, theirs in RESIDUAL.items())
    for i in range(blocks - 1):
        place = f"output_blocks.{(layers + 1) * (i + 1) - 1}.{2 if i in attended else 1}"
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
        yield f"up_blocks.{i}.upsamplers.0.conv", f"{place}.conv"


def of(layers: Iterable[str]) -> dict[str, str]:
    """The same for a UNet of which the layer names are given: how many blocks it has, and which of them attend, they tell."""
    have = set(layers)
    blocks = sum(f"down_blocks.{i}" in have for i in range(len(have)))
    residual = sum(f"down_blocks.0.resnets.{j}" in have for j in range(len(have)))
    return dict(names(blocks, residual, {i for i in range(blocks) if f"up_blocks.{i}.attentions.0" in have}))


def renamed(layer: str, table: dict[str, str]) -> str | None:
    """A layer's name with its beginning as the table has it; None if it has none for it."""
    start = layer
    while start not in table:
        start, dot, _ = start.rpartition(".")
        if not dot:
            return None
    return table[start] + layer[len(start) :]
