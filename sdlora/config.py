"""What a TOML file may say about a run, and how it is completed: command line, then file, then defaults of the job and the base."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli_w
from pydantic import Field, SerializeAsAny, create_model, field_validator
from pydantic.fields import FieldInfo

from sdlora import defaults, lookup
from sdlora.errors import UserError
from sdlora.settings import Settings, build

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Folder(Settings):
    folder: Annotated[str, Field(min_length=1)]
    """Folder or ZIP with the pictures."""
    repeats: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Times that an epoch shows each of its pictures."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Factor on the loss of its pictures."""
    kind: Literal["subject", "regularisation", "validation"] = "subject"
    """What its pictures are for: to be learnt; to stay as they are, and then the trigger is not added to their captions; or never to be
    trained on, to measure by."""


class Data(Settings):
    folder: str = ""
    """Folder or ZIP with the pictures; their captions may lie beside them or in tables, as `docs/data.md` tells."""
    folders: list[Folder] = Field(default=[])
    """Further folders, a table `[[data.folders]]` for each."""
    resolution_px: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Pictures are scaled to this area (its square, in pixels); unset: the base's own size."""
    further_resolutions_px: list[Annotated[int, Field(ge=16, le=4096)]] = Field(default=[])
    """Each picture is trained at these as well, each time at one of them; one that would enlarge it is left out for it."""
    ground: str = "white"
    """Colour laid under transparent pictures (a name or #rrggbb)."""
    skip_unreadable: bool = False
    """Leave out pictures that cannot be decoded instead of refusing to start."""
    caption_dropout: Fraction | None = None
    """Share of samples trained with an empty caption, which guidance needs."""
    prior_share: Fraction | None = None
    """Share of samples that hold the adapter to the base's own prediction, on prompts that do not name the trigger, so that the base
    stays what it is there."""
    prior_prompts: list[str] | None = None
    """Prompts of those samples; an empty one is always among them."""
    prior_pictures: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Pictures that the base draws of `prior_prompts`, to be trained on as regularisation pictures; `prior_share` needs none."""
    flip: bool = False
    """Show each picture mirrored in half of its samples; not for what has a left and a right, as writing or a parting."""
    crop: Literal["centre", "subject"] = "centre"
    """Where a picture is cut to the shape it is trained in: around its centre, or around what its mask shows, if it has one."""
    crop_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Show each picture also in three crops that are smaller by up to this share of a side, as far as none is enlarged for it."""
    colour_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Show each picture also three times with brightness, contrast and saturation changed by up to this share."""
    alpha_mask: bool = False
    """Take the transparency of a picture without a mask file as its mask; its ground is laid under it all the same."""
    mask_floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Weight of the loss where a picture's mask is black; where it is white it is 1. Without a mask all counts alike."""
    shuffle_tags: bool = False
    """Put the comma-separated tags of a caption in another order in each sample."""
    keep_tokens: Annotated[int, Field(ge=0)] = 0
    """Tags at the start of a caption that are neither moved nor dropped."""
    tag_dropout: Fraction = 0.0
    """Share of a caption's tags that are left out of a sample; never the trigger."""

    @field_validator("ground")
    @classmethod
    def _is_a_colour(cls, value: str) -> str:
        from PIL import ImageColor

        ImageColor.getrgb(value)
        return value

    @property
    def sources(self) -> list[Folder]:
        """All folders of the run."""
        return [*([Folder(folder=self.folder)] if self.folder else []), *self.folders]


class Text(Settings):
    clip_skip: Annotated[int, Field(ge=1, le=32)] = 1
    """Which layer of the text encoder, from its end, the network is told: 1 is the one that it was trained on; many bases of drawn figures
    want 2. Prompts are read in the same way where pictures are drawn with the pack."""
    chunks: Annotated[int, Field(ge=1, le=4)] = 1
    """Pieces of 75 tokens that a caption may have, each read alone; what is beyond them is not read. Each costs time in every sample."""


class Train(Settings):
    steps: Count | None = None
    """Optimizer steps in all."""
    batch_size: Count | None = None
    """Samples in one forward pass."""
    accumulation: Count = 1
    """Forward passes per optimizer step; a step sees batch_size x accumulation samples."""
    lr: Annotated[float, Field(gt=0, le=10)] | None = None
    """Learning rate of the adapter in the UNet."""
    text_encoder_lr: Annotated[float, Field(ge=0, le=10)] | None = None
    """Learning rate of the adapter in the text encoders; 0: they are not adapted."""
    words_lr: Annotated[float, Field(ge=0, le=10)] | None = None
    """Learning rate of embeddings of the trigger's own tokens, which are learnt beside the adapter (pivotal tuning) or, with
    `adapter.kind = "prompt"`, alone; 0: none are learnt. 1e-3 is a usual one."""
    text_encoder_steps: Annotated[int, Field(ge=0)] = 0
    """Steps after which the adapter in the text encoders stays as it is; 0: it learns to the end."""
    lora_plus_ratio: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """LoRA+ (Hayou et al. 2024): the factor that starts at zero, LoRA's up, learns at this times the rate; they take 16."""
    schedule: Literal["constant", "linear", "cosine", "restarts", "wsd"] | None = None
    """Course of the learning rate after the warm-up. restarts: several cosines; wsd: it stays, and falls in a straight line at the end."""
    cycles: Count = 3
    """Cosines of `restarts`."""
    decay_share: Fraction = 0.2
    """Share of the steps in which the rate of `wsd` falls."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps in which the learning rate rises from zero."""
    warmup_share: Fraction = 0.0
    """The same as a share of all steps, where it is above 0."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm when they exceed it."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] | None = None
    """Arithmetic of the frozen base; the adapter's own weights are always fp32. auto: bf16 where the hardware computes in it."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep only the inputs of the base's blocks for the backward pass, which computes them again: far less memory for a third more time,
    and the same result. auto: where the run would not fit into memory otherwise."""
    base_weights: Literal["full", "8bit", "nf4", "int8", "auto"] = "full"
    """How the large frozen layers of the base are held while it is trained on: in the run's precision, in 8 bits, or in 4 (QLoRA). int8
    multiplies in 8-bit integers, too, for speed. The adapter learns against the rounded base; its pack is for the full one. auto: as few
    bits as it takes to fit into memory, and no fewer; with `full` nothing is ever rounded."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """Whose kernels compute attention: torch's own (sdpa) or xformers'. auto: torch's, unless none runs here that saves memory and one of
    xformers' does."""
    memory_gb: Annotated[float, Field(ge=0)] = 0.0
    """Memory in which the run is to fit, in GB of 10^9 bytes; 0: what a CUDA card has free, and on other devices no limit."""
    save_every: Count | None = None
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints that are kept."""
    log_every: Count = 10
    """Steps between two readings of the loss; each reading waits for the device."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a moving average of the weights, which the pack then holds; 0: none is kept."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """When a loss or gradient is not finite, that step moves nothing and the cause is looked for. skip: a picture that is the cause is
    left out from then on, and a lapse of half precision is passed over; stop: the run ends there. Weights that diverge always end it."""
    prefetch: bool = False
    """Prepare the samples of the next step on a thread while this one is computed; the result is the same, bit for bit."""
    compile: bool = False
    """Let torch's compiler join the small operations of the base's transformer blocks; the adapters stay as they are. Minutes at the start,
    for steps that are shorter where kernels are what limits them; the result is the same but for rounding."""
    cuda_graphs: bool = False
    """Record what a step asks of a CUDA GPU, once for each shape, and repeat it as a whole, so that a small batch does not wait for Python.
    The result is the same; the recordings take as much memory again as their inputs and gradients. For a run by itself."""
    profile: bool = False
    """Look at where the time of three steps goes: base, adapter, optimizer, data, host. A page with their shares and a trace of torch's
    profiler lie in the run folder's `profile`."""
    trackers: list[str] = Field(default=[])
    """Programs that the figures of the run are told to, such as `tensorboard`; what they write lies in the run folder's `trackers`."""

    @field_validator("trackers")
    @classmethod
    def _are_known(cls, value: list[str]) -> list[str]:
        if value:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            for name in value:
                if name not in LOGGER_TYPE_TO_CLASS:
                    near = lookup.nearest(name, LOGGER_TYPE_TO_CLASS)
                    raise ValueError(f'no tracker called "{name}"{near}; there are {", ".join(LOGGER_TYPE_TO_CLASS)}')
        return list(dict.fromkeys(value))


class Validation(Settings):
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the pictures that is never trained on, so that the loss can be measured on them; besides, a folder of `data.folders`
    may be of the kind `validation`."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Validations without a new lowest loss after which training ends; 0: it never ends early. One comes with every `train.save_every`."""
    pack: Literal["last", "best"] = "last"
    """Weights that the pack holds: the last ones, or those of the lowest validation loss, or of the best score."""
    judge: Annotated[int, Field(ge=0, le=64)] = 0
    """Prompts that name the trigger, and as many that do not, of which pictures are drawn and judged at each validation: how like the
    pictures held out they are, and how far the base drifts; at the end also at several scales, of which the pack recommends the best."""
    by: Literal["loss", "score"] = "loss"
    """What patience and the best weights go by: the loss on pictures held out, or the score of `validation.judge`."""


class Preview(Settings):
    prompts: list[str] = Field(default=[])
    """Prompts of the strip that is rendered at the end; empty: made from the trigger. `[trigger]` stands for the trigger."""
    scales: list[Annotated[float, Field(ge=-4, le=4)]] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0, 1.25])
    """Scales of the strip; empty: no strip."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the strip's initial noise."""
    steps: Count = 25
    """Denoising steps of the strip."""
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    """Classifier-free guidance of the strip."""
    every: Annotated[int, Field(ge=0)] | None = None
    """Steps between previews of the same prompts during training, at scale 1; 0: none."""


class Packing(Settings):
    title: str = ""
    """Title of the pack; empty: the run's name."""
    author: str = ""
    """Who made it."""
    description: str = ""
    """What it is, in a sentence or two."""
    license: str = ""
    """Under which licence it may be used, such as `cc-by-4.0`."""
    tags: list[Annotated[str, Field(min_length=1, pattern="^[^,]*$")]] = Field(default=[])
    """Words by which it is to be found."""
    recommended_scale: Annotated[float, Field(ge=-4, le=4)] = 1.0
    """Scale at which it is best used, which programs take as their default."""
    privacy: Literal["public", "shared", "full"] = "public"
    """What its header tells of the pictures. public: no path, name of a file or caption; shared: also how often each tag of the captions
    occurs, for programs that offer them; full: also the names of folders. Every pack is looked through for it before it is written."""
    thumbnail: bool = True
    """Whether a small picture of the strip, or of what it is given later, lies in the header."""
    force: bool = False
    """Write the pack even if some program would open it and silently do otherwise than was trained; its header then says which."""
    layouts: Annotated[list[Literal["kohya", "diffusers"]], Field(min_length=1)] = Field(default=["kohya"])
    """Layouts of the pack: kohya, which all programs open, and diffusers, which holds LoRA alone. Each after the first is a file of its
    own, `NAME.LAYOUT.safetensors`."""
    embeddings_inside: bool = False
    """Whether embeddings of the trigger that were learnt lie in the pack as `bundle_emb`, too, and not only in its header and beside it:
    AUTOMATIC1111 takes them from there, and diffusers refuses such a pack."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision of the pack's weights; fp16 is read everywhere. Factors are scaled against one another before small numbers are lost."""


class Run(Settings):
    name: str = ""
    """Name of the pack; empty: the folder's name. Also the trigger, unless one is given."""
    kind: Literal["character", "style"] = "character"
    """What is learnt; settles captions and defaults."""
    base: str = "tiny"
    """Base model: `tiny` (the embedded one), a diffusers folder, a `.safetensors` checkpoint, or a hub id."""
    vae: str = ""
    """Autoencoder in place of the base's own: its folder, a `.safetensors` file, or a hub id; it must have been made for such a base."""
    probe: Literal["choose", "refuse", "off"] = "refuse"
    """What is done where the base's files do not say what its network predicts, or `objective.kind` says otherwise: a few pictures are
    noised and the network's word is measured. refuse: a run that contradicts it ends at once; choose, which it is where neither files nor
    settings say anything: the objective is what was measured; off: nothing is measured, and `objective.kind` stands where the files say
    nothing."""
    trigger: str = ""
    """Word that calls the character or style up in a prompt; empty: the name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random number of the run is a function of it."""
    data: Data = Data()
    adapter: SerializeAsAny[Settings] = Settings()
    """The adapter's kind and that kind's own settings."""
    objective: SerializeAsAny[Settings] = Settings()
    """The objective's kind and that kind's own settings."""
    optimizer: SerializeAsAny[Settings] = Settings()
    """The optimizer's kind and that kind's own settings."""
    text: Text = Text()
    train: Train = Train()
    validation: Validation = Validation()
    preview: Preview = Preview()
    pack: Packing = Packing()
    """What the pack says of itself, and of the pictures."""

    @field_validator("name", "trigger")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        if value and (len(value) > 100 or not re.fullmatch(r"[\w][\w .+-]*", value) or value.lower() == "none"):
            raise ValueError("letters, digits, space and . _ + - only, at most 100: programs that read packs break on others")
        return value


CHOICES = {"adapter": ("adapters", "lora"), "objective": ("objectives", "epsilon"), "optimizer": ("optimizers", "adamw")}
"""Table: (folder, kind when none is named)."""


def run_class(kinds: dict[str, str]) -> type[Run]:
    """Run with the tables of the chosen kinds: each kind is a file and brings its own Config."""
    fields: dict[str, Any] = {}
    for table, (group, _) in CHOICES.items():
        config = lookup.find(group, kinds[table]).Config
        fields[table] = (config, Field(default=config(), description=Run.model_fields[table].description))
    return create_model("Run", __base__=Run, **fields)


def parse(table: dict[str, Any], source: object = "") -> Run:
    """A Run from the tables of a TOML file. Raises `UserError` for whatever is misspelt or out of range."""
    kinds = {}
    for name, (_, kind) in CHOICES.items():
        part = table.get(name, {})
        kinds[name] = part.get("kind", kind) if isinstance(part, dict) else kind
    return build(run_class(kinds), table, source)


def glance(table: dict[str, Any], source: object = "") -> None:
    """Raise `UserError` for what is wrong with these tables whatever the kinds are; those, which load torch, are not asked."""
    build(Run, {key: value for key, value in table.items() if key not in CHOICES}, source)


def resolve(run: Run, row: str) -> Run:
    """The run with nothing left open: what depends on the job and the base (`row` of the defaults) is filled in."""
    table = run.model_dump()
    chosen = (table[part].get("kind", "") for part in ("optimizer", "adapter"))
    for dotted, value in defaults.settings(run.kind, row, *chosen).items():
        part, _, field = dotted.partition(".")
        if table[part].get(field, value) is None:
            table[part][field] = value
    if run.validation.by == "score" and not run.validation.judge:
        what = "the best weights are to go by a score, and nothing is judged"
        raise UserError("E-CONF-12", what, "validation.by", "set validation.judge, to 6 for example")
    table["train"]["warmup_steps"] = _warmup(run.train, table["train"])
    trigger = run.trigger or run.name
    table["trigger"] = trigger
    for prompt in run.data.prior_prompts or ():
        if names_trigger(prompt, trigger):
            what = f'"{prompt}" names the trigger "{trigger}", and the base is to be kept on prompts that do not'
            raise UserError("E-CONF-06", what, "data.prior_prompts", "take it out, or word it without the trigger")
    table["data"]["prior_prompts"] = [prompt for prompt in table["data"]["prior_prompts"] if not names_trigger(prompt, trigger)]
    if run.data.prior_pictures and not table["data"]["prior_prompts"]:
        what = "the base is to draw regularisation pictures, and no prompt says of what"
        raise UserError("E-CONF-08", what, "data.prior_pictures", 'name some in data.prior_prompts, for example ["a photo of a cat"]')
    called = [trigger, f"{trigger}, blue background", f"{trigger}, green background"]
    spoken = called if run.kind == "character" else [f"{thing}, {trigger} style" for thing in ("cat face", "house", "apple")]
    table["preview"]["prompts"] = [prompt.replace("[trigger]", trigger) for prompt in run.preview.prompts] or spoken
    return parse(table)


def _warmup(said: Train, settled: dict[str, Any]) -> int:
    """Steps of the warm-up, which may be given in one way or the other."""
    if not said.warmup_share:
        return int(settled["warmup_steps"])
    count: int = round(said.warmup_share * settled["steps"])
    if said.warmup_steps not in (None, count):
        what = f"train.warmup_steps = {said.warmup_steps}, and train.warmup_share = {said.warmup_share:g} is {count} of {settled['steps']}"
        raise UserError("E-CONF-10", what, "train.warmup_share", "leave one of them out")
    return count


def names_trigger(text: str, trigger: str) -> bool:
    """Whether a text holds the trigger as a whole word."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE) is not None


def flat(run: Run) -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, value)."""
    for key, value in run.model_dump().items():
        if isinstance(value, dict):
            yield from ((f"{key}.{field}", inner) for field, inner in value.items())
        else:
            yield key, value


def to_toml(run: Run) -> str:
    """The run as a TOML file that `parse` reads back; settings still open are left out."""
    return tomli_w.dumps(run.model_dump(exclude_none=True))


@dataclass(frozen=True)
class Setting:
    """What a form must know of a setting."""

    name: str  # dotted
    owner: str  # kind of the adapter, objective or optimizer whose own it is; empty: every run has it
    reason: str
    choices: tuple[str, ...]  # of which it is one; empty: it is written as TOML has it
    is_switch: bool
    usual: object  # the default; None: it depends on the job and the base


def described() -> Iterator[Setting]:
    """Every setting that a run of any kind may have; tables in lists (`data.folders`) are left out."""
    for name, info in Run.model_fields.items():
        if name in CHOICES:
            group = CHOICES[name][0]
            yield Setting(
                f"{name}.kind", "", " ".join((info.description or "").split()), tuple(lookup.names(group)), False, CHOICES[name][1]
            )
            for kind in lookup.names(group):
                fields = lookup.find(group, kind).Config.model_fields
                yield from (_setting(f"{name}.{field}", kind, inner) for field, inner in fields.items() if field != "kind")
        elif isinstance(info.default, Settings):
            inside = type(info.default).model_fields
            yield from (_setting(f"{name}.{field}", "", inner) for field, inner in inside.items() if field != "folders")
        else:
            yield _setting(name, "", info)


def _setting(name: str, owner: str, info: FieldInfo) -> Setting:
    options = get_args(info.annotation)
    inner = next((one for one in options if get_origin(one) is Literal), info.annotation)
    choices = tuple(map(str, get_args(inner))) if get_origin(inner) is Literal else ()
    reason = " ".join((info.description or "").split())
    return Setting(
        name, owner, reason, choices, info.annotation is bool, None if info.is_required() else info.get_default(call_default_factory=True)
    )
