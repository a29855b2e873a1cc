"""The settings that depend on the job and on the base, in one table, each with its reason.

A setting that a user leaves out is taken from the most particular row that has it: (kind, family) before (any kind, family).
"""

from typing import Any

ANY = ""

GROUNDS = ("white", "black", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink")
NAMES = (
    "lemon", "bread", "peach", "lollipop", "popcorn", "movie camera", "ticket", "game die",
    "musical keyboard", "trophy", "motorcycle", "ram", "dragon", "bug", "blowfish", "koala",
    "cow face", "horse face", "wolf", "light bulb", "droplet", "white flower", "dollar banknote", "computer disk",
    "smirking face", "crying face", "tired face", "grinning cat", "skis", "tram", "person bowing", "high-speed train",
    "banana", "grapes", "mushroom", "maple leaf", "watermelon", "water buffalo", "palm tree", "dog",
)  # fmt: skip

# Real Stable Diffusion 1.x. Rank 16 with alpha 16 is the middle of what the trainers in the field recommend; 1e-4 is the rate nearly
# all of them name at that alpha, half of it for the text encoder, which overfits first.
SD: dict[str, Any] = {
    "data.resolution_px": 512,
    "data.caption_dropout": 0.05,
    "data.prior_share": 0.0,
    "data.prior_prompts": [],
    "adapter.rank": 16,
    # The same at every rank: AdamW's first step moves each of the factor's columns by the rate, so that ΔW goes along the gradient by
    # alpha / rank times the number of columns, which is alpha. With alpha = rank, rank 64 would move four times as far as 16.
    "adapter.alpha": 16.0,
    "adapter.targets": ["cross-attention", "text-encoder"],
    "train.steps": 1500,
    "train.batch_size": 2,
    "train.lr": 1e-4,
    "train.text_encoder_lr": 5e-5,
    "train.words_lr": 0.0,
    "train.schedule": "cosine",
    "train.warmup_steps": 100,
    "train.save_every": 250,
    "train.precision": "auto",
    "preview.guidance": 7.0,
    "preview.every": 250,
}
# A style is spread over every layer that mixes positions, and needs more pictures and more dropout than one figure does.
SD_STYLE = {"adapter.targets": ["attention", "text-encoder"], "data.caption_dropout": 0.1, "train.steps": 2000}

TABLE: dict[tuple[str, str], dict[str, Any]] = {
    (ANY, "sd1"): SD,
    # 2.x is a 1.x with another text encoder, whose larger width moves as far at the same rate.
    **{(ANY, row): {**SD, "data.resolution_px": side} for row, side in (("sd2", 512), ("sd2-768", 768))},
    **{("style", row): SD_STYLE for row in ("sd1", "sd2", "sd2-768")},
    # XL: nearly everyone in the field leaves its text encoders alone, because they are large and lose what they know first; the figure is
    # then learnt by all attention, which holds eight times as much as 1.x's at the same rank. One picture of 1024 px fills a card.
    (ANY, "sdxl"): {
        **SD,
        "data.resolution_px": 1024,
        "adapter.targets": ["attention", "text-encoder"],
        "train.batch_size": 1,
        "train.steps": 2000,
        "train.text_encoder_lr": 0.0,
    },
    ("style", "sdxl"): {"data.caption_dropout": 0.1, "train.steps": 3000},
    # The embedded base: 64 px, a network a hundred times smaller, so that a larger rate and batch fit in minutes on two cores. Its
    # cross-attention alone is too narrow to draw a new figure, so all its linear layers are adapted; at its size bf16 costs more in
    # conversions than it saves. Half of the samples hold it to itself, or a word as new as the trigger moves all others.
    (ANY, "tiny"): {
        "data.resolution_px": 64,
        "data.caption_dropout": 0.0,
        "data.prior_share": 0.5,
        "data.prior_prompts": [f"{name}, {ground} background" for name, ground in zip(NAMES, GROUNDS * 4, strict=True)],
        "adapter.rank": 16,
        "adapter.alpha": 16.0,
        "adapter.targets": ["all-linear", "text-encoder"],
        "train.steps": 1000,
        "train.batch_size": 16,
        "train.lr": 2e-3,
        "train.text_encoder_lr": 5e-4,
        "train.words_lr": 0.0,
        "train.schedule": "cosine",
        "train.warmup_steps": 20,
        "train.save_every": 100,
        "train.precision": "fp32",
        "preview.guidance": 3.0,
        "preview.every": 250,
    },
    # More steps at a higher rate wash a style out: things lose their shape before they take on its colours.
    ("style", "tiny"): {"data.prior_share": 0.4, "train.steps": 260, "train.lr": 1.5e-3},
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    # It finds the rate itself, one for all: what is set is a factor on it, and its authors leave that at 1.
    "prodigy": {"train.lr": 1.0, "train.text_encoder_lr": 1.0},
    # The average that it trains towards does what a falling rate does.
    "schedulefree": {"train.schedule": "constant"},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    # These sit on whole blocks, which other kinds do not fit.
    "houlsby": {"adapter.targets": ["blocks"]},
    "prefix": {"adapter.targets": ["cross-attention-blocks"]},
    # AdamW moves each number by about the rate. Embeddings of CLIP's tokens deviate by 0.01 to 0.03, so that 1e-3 crosses that in 10 to 30
    # steps: between the 5e-4 and the 5e-3 of the field's scripts, and far above what layers of a network bear.
    "prompt": {"adapter.targets": ["words"], "train.words_lr": 1e-3},
}
RATES = {"lion": 0.2, "lion8bit": 0.2}
"""Factors on the rates that suit AdamW: every number moves by the whole rate, so that the authors take 3 to 10 times less."""


ADAPTER_RATES: dict[str, float] = {"full": 0.3, "houlsby": 3.0, "ia3": 10.0, "lokr": 10.0, "prefix": 10.0}
"""Factors on the rates that suit LoRA, by kind of adapter: each kind's best rate over LoRA's best, in runs that `docs/measured.md` has.

Where whole weights move (full), each step of the rate moves ΔW itself. Where few numbers stand for many (ia3, a Kronecker product's small
factor), or the way is behind a gate or a bottleneck that starts at zero, more is needed. dora, loha and oft are best where LoRA is.
"""


def settings(kind: str, row: str, optimizer: str = "", adapter: str = "") -> dict[str, Any]:
    """Dotted names and values for a job of this kind on a base whose defaults are in this row."""
    found = {**TABLE.get((ANY, row), {}), **TABLE.get((kind, row), {}), **OPTIMIZERS.get(optimizer, {}), **ADAPTERS.get(adapter, {})}
    factor = RATES.get(optimizer, 1.0) * (1.0 if "train.lr" in OPTIMIZERS.get(optimizer, {}) else ADAPTER_RATES.get(adapter, 1.0))
    if "train.lr" in OPTIMIZERS.get(optimizer, {}) and found.get("train.words_lr"):
        found["train.words_lr"] = found["train.lr"]
    rates = dict.fromkeys(("train.lr", "train.text_encoder_lr"), factor) | {"train.words_lr": RATES.get(optimizer, 1.0)}
    return {name: value * rates[name] if name in rates else value for name, value in found.items()}
