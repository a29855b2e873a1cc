"""The command line: a handful of verbs over `sdlora.api`; no setting has a flag of its own."""

import json
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from sdlora.errors import UserError
from sdlora.safeio import scratch_folder
from sdlora.streams import make_streams_safe, read_names_as_utf8
from sdlora.terminal import console, progress, say, show, shown_errors
from sdlora.verbs import base as bases
from sdlora.verbs import data, find, fleet, run, workshop

if TYPE_CHECKING:  # torch takes seconds to import: `sdlora --help` must not
    from sdlora.api import Run, Studio

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Teach Stable Diffusion a character or a style, and see it work.",
)
app.add_typer(data.app, name="data")
app.add_typer(run.app, name="run")
app.add_typer(bases.app, name="base")
app.add_typer(find.app, name="find")
app.add_typer(workshop.app, name="pack")
app.registered_commands += fleet.app.registered_commands  # a verb of its own, not a group
TINY = "tiny, the embedded base, draws 64 px icons, to show that all works. For real pictures name a Stable Diffusion model with --base."

Packs = Annotated[
    Optional[list[str]], typer.Argument(help="packs to use; a second scale is the text encoder's own", metavar="[PACK[:SCALE[:SCALE]]]...")
]
Set = Annotated[Optional[list[str]], typer.Option("--set", metavar="A.B=C", help="set one setting; may be repeated")]
Config = Annotated[Optional[Path], typer.Option(help="TOML file of settings")]
BASES = "tiny, a diffusers folder, a .safetensors checkpoint, or a hub id"
Base = Annotated[str, typer.Option(help=f"{BASES}; default: the pack's own, else tiny")]
Partial = Annotated[bool, typer.Option("--partial", help="take of a pack what fits the base, and say what does not")]
Vae = Annotated[str, typer.Option(help="autoencoder in place of the base's own: a folder, a .safetensors file, or a hub id")]


@app.command()
def train(
    folder: Annotated[Optional[str], typer.Argument(help="folder with the pictures", metavar="[DIR]")] = None,
    name: Annotated[str, typer.Option(help="name of the pack, and the word that calls it up")] = "",
    base: Annotated[str, typer.Option(help=BASES)] = "",
    kind: Annotated[str, typer.Option(help="character or style")] = "",
    config: Config = None,
    set_: Set = None,
    out: Annotated[Optional[Path], typer.Option(help="run folder; default: runs/NAME", metavar="RUN")] = None,
) -> None:
    """Train a LoRA from a folder of pictures, or go on with a run that was stopped."""
    with shown_errors():
        glance(config, set_ or [])
        from sdlora import api
        from sdlora.settings import put

        if config and api.is_cast(config):
            if folder or name:
                raise UserError("E-CAST-06", "a cast's file names its members and pictures itself", config, "leave DIR and --name out")
            said = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in {"base": base, "kind": kind}.items() if value]
            follow_cast(api.settle_cast(api.cast_tables(config), config, [*said, *(set_ or [])]), out or Path("runs") / config.stem)
            return
        table = api.read_settings(config, set_ or [])
        for key, value in {"name": name, "base": base, "kind": kind}.items():
            if value:
                table[key] = value
        if folder:
            put(table, "data.folder", folder)
        settled = api.settle(table, config or "command line")
        follow(settled, out or Path("runs") / settled.name)


def glance(file: Path | None, assignments: list[str]) -> None:
    """Refuse what is misspelt at once, before torch is imported."""
    from sdlora import config, settings

    table = settings.read(file) if file else {}
    for assignment in assignments:
        settings.override(table, assignment)
    if "cast" not in table:
        config.glance(table, file or "command line")


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="run folder", metavar="RUN")], set_: Set = None) -> None:
    """Go on with a run from its last checkpoint; a setting changed by --set is said."""
    with shown_errors():
        from sdlora import api

        if api.is_cast(run):
            follow_cast(api.settle_cast(api.cast_tables(run), run, set_ or []), run)
            return
        if not (run / "config.toml").is_file():
            raise UserError("E-RUN-04", "no run lies here: there is no config.toml", run, "name the folder that `sdlora train` wrote")
        follow(api.settle(api.read_settings(run / "config.toml", set_ or []), run / "config.toml"), run)


@app.command()
def check(
    source: Annotated[Path, typer.Argument(help="folder with the pictures, or a TOML file of settings", metavar="DIR|F.toml")],
    as_json: Annotated[bool, typer.Option("--json", help="print all of it as JSON")] = False,
    html: Annotated[Optional[Path], typer.Option(help="write a page with every picture and its crop", metavar="F.html")] = None,
    set_: Set = None,
) -> None:
    """Say what would become of every picture, and what is wrong with the set; nothing is trained."""
    with shown_errors(), scratch_folder() as unpacked:
        file = source if source.suffix == ".toml" else None
        glance(file, set_ or [])
        from sdlora import api
        from sdlora.settings import put

        table = api.read_settings(file, set_ or [])
        if not file:
            put(table, "data.folder", str(source))
        table.setdefault("data", {}).setdefault("skip_unreadable", True)  # named with the rest, instead of one error
        ledger, page = api.check(api.settle(table, file or "command line"), Path(unpacked))
        if html:
            api.save_text(html, page)
        print(json.dumps(ledger, indent=1) if as_json else report(ledger))


@app.command()
def generate(
    packs: Packs = None,
    prompt: Annotated[str, typer.Option(help="what to draw")] = "",
    negative: Annotated[str, typer.Option(help="what to keep away from")] = "",
    seed: Annotated[int, typer.Option(help="seed of the initial noise")] = 0,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    guidance: Annotated[Optional[float], typer.Option(help="classifier-free guidance; default: the base's own")] = None,
    size: Annotated[str, typer.Option(help="WxH in px; default: the base's own", metavar="WxH")] = "",
    scale: Annotated[str, typer.Option(help="scale of all packs that name none; default: each pack's recommended one")] = "",
    base: Base = "",
    vae: Vae = "",
    partial: Partial = False,
    out: Annotated[Path, typer.Option(help="PNG to write", metavar="F.png")] = Path("picture.png"),
) -> None:
    """Draw one picture, with any number of packs; without a pack it is the base's."""
    with shown_errors():
        from sdlora import api

        studio, scales = opened(packs or [], base, scale, vae, partial)
        recipe = studio.recipe(prompt, size, guidance, negative=negative, seed=seed, steps=steps, **scales)
        warn_of_cuts(studio, [prompt, negative])
        api.save_picture(out, studio, studio.render([recipe])[0], recipe)
        said = [f"{name} at scale {scale:g}" for name, scale in recipe.scales]
        said += [f"{name} at {scale:g} in the text encoder" for name, scale in recipe.text_scales]
        say(f"{out}  ({', '.join(said) or 'the base alone'})")
        advise_on_tiny(studio.family.base.name)


@app.command()
def grid(
    packs: Packs = None,
    prompts: Annotated[Optional[list[str]], typer.Option(help="a prompt; may be repeated")] = None,
    scales: Annotated[str, typer.Option(help="scales, separated by commas")] = "0,0.25,0.5,0.75,1,1.25",
    seeds: Annotated[str, typer.Option(help="seeds, separated by commas")] = "0",
    base: Base = "",
    vae: Vae = "",
    partial: Partial = False,
    out: Annotated[Path, typer.Option(help="PNG to write", metavar="F.png")] = Path("grid.png"),
) -> None:
    """Draw a labelled sheet: prompts and seeds down, the base and the scales across."""
    with shown_errors():
        from sdlora import api

        studio, _ = opened(packs or [], base, "1", vae, partial)
        asked = prompts or [next((pack.trigger for pack in studio.packs.values() if pack.trigger), "")]
        warn_of_cuts(studio, asked)
        try:
            numbers = [int(seed) for seed in seeds.split(",")]
        except ValueError:
            raise UserError("E-GEN-04", f'"{seeds}" is no list of seeds', "--seeds", "write for example 0,1,2") from None
        across = [api.parse_scale(scale) for scale in scales.split(",")]
        recipes = [studio.recipe(prompt, seed=seed) for prompt in asked for seed in numbers]
        api.save_sheet(out, lambda: api.grid(studio, recipes, across))
        say(str(out))
        advise_on_tiny(studio.family.base.name)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="port; 0: the first free one from 7860 on")] = 0,
    data_root: Annotated[Path, typer.Option(help="projects, runs and packs lie below this folder")] = Path("runs"),
    listen: Annotated[str, typer.Option(help="serve others on the network, too, from this address; they must log in", metavar="HOST")] = "",
    password_file: Annotated[Optional[Path], typer.Option(help="file with the password; else SDLORA_PASSWORD, else a new one")] = None,
) -> None:
    """Open the page in the browser, on this machine only: from pictures to a pack, with the studio to see it."""
    with shown_errors():
        from webui.app import serve

        serve(port, data_root, listen, password_file)


@app.command()
def config(
    file: Annotated[Path, typer.Argument(help="TOML file of settings", metavar="NAME.toml")],
    set_: Set = None,
) -> None:
    """Print every setting of a file, with all that it leaves out filled in."""
    with shown_errors():
        from sdlora import api

        if api.is_cast(file):
            print(api.cast_text(api.settle_cast(api.cast_tables(file), file, set_ or [])), end="")
        else:
            print(api.settings_text(api.settle(api.read_settings(file, set_ or []), file)), end="")


def follow(settled: "Run", out: Path) -> None:
    """Train with a progress bar, then say where things lie and what to type next."""
    from sdlora import api

    if not api.leads():
        run.assisting(lambda stop: api.train(settled, out, stop))
        return
    tiny, again = settled.base == "tiny", shlex.join(["sdlora", "resume", str(out)])
    if tiny:
        say(TINY)
    pack, stop = "", api.Stop()
    try:
        with stop.on_signals(), progress(console()) as shown:
            bar = shown.add_task("training", total=settled.train.steps, figures="", visible=False)
            for event in api.train(settled, out, stop):
                pack = show(event, shown, bar) or pack
    except KeyboardInterrupt as interrupted:
        say(f"stopped at once. Go on from the last checkpoint with: {again}")
        raise typer.Exit(getattr(interrupted, "exit_code", 130)) from None
    if not pack:
        say(f"stopped, and saved. Go on with: {again}")
        raise typer.Exit(128 + (stop.signum or signal.SIGINT))
    say(f"pack: {pack}")
    if (out / "strip.png").is_file():
        say(f"look: {out / 'strip.png'}")
    where = ["--base", settled.base] if Path(settled.base).exists() and not tiny else []
    words = [
        "sdlora",
        "generate",
        pack,
        *where,
        "--prompt",
        settled.preview.prompts[0],
        "--scale",
        "0.8",
        "--out",
        str(out / "picture.png"),
    ]
    say(f"next: {shlex.join(words)}")
    say(f"  or: {shlex.join(['sdlora', 'ui', '--data-root', str(out)])}    (move the scale with a slider)")
    if tiny:
        say(TINY)


def follow_cast(runs: "list[Run]", out: Path) -> None:
    """Train a cast, then say what to type next."""
    from sdlora import api

    if not api.leads():
        run.assisting(lambda stop: api.train_cast(runs, out, stop))
        return
    run.casting(runs, out)
    say(f"next: {shlex.join(['sdlora', 'ui', '--data-root', str(out)])}    (all of them on one base)")
    if runs[0].base == "tiny":
        say(TINY)


def opened(packs: list[str], base: str, scale: str, vae: str, partial: bool = False) -> "tuple[Studio, dict[str, Any]]":
    """A studio with the packs named on the command line, and their scales as a recipe has them."""
    from sdlora import api

    everywhere = api.parse_scale(scale) if scale else None
    parsed = [api.parse_pack(text) for text in packs]
    read = [api.open_pack(named.path) for named in parsed]
    studio = api.open_studio(read, base, vae, partial)
    for line in studio.remarks():
        say(f"warning: {line}", error=True)
    for name in studio.otherwise_read():
        say(f"warning: {name} was trained with other settings of text than the first pack, as which prompts are read", error=True)
    scales, text_scales = [], []
    for (name, pack), named in zip(studio.packs.items(), parsed, strict=True):
        usual = pack.recommended_scale if everywhere is None else everywhere
        scales.append((name, usual if named.scale is None else named.scale))
        text_scales += [] if named.text_scale is None else [(name, named.text_scale)]
    return studio, {"scales": tuple(scales), "text_scales": tuple(text_scales)}


def report(ledger: dict[str, Any]) -> str:
    """The ledger for reading, worst first."""
    totals, lines = ledger["totals"], []
    lines += [
        f"{row['file']}: left out, {row['detail'] or ', '.join(row['why'])}" for row in ledger["pictures"] if row["fate"] == "left_out"
    ]
    for one in ledger["findings"]:
        files = ", ".join(one["files"][:5]) + (f" and {len(one['files']) - 5} more" if len(one["files"]) > 5 else "")
        lines.append(f"{one['code']}: {files or 'all'}: {one['detail']}")
    for row in ledger["pictures"]:
        if row["fate"] != "left_out":
            size, bucket = "x".join(map(str, row["size_px"])), " and ".join(row["shown_at"])
            why = f" ({', '.join(row['why'])})" if row["why"] else ""
            said = " / ".join(row["captions"])
            lines.append(f"{row['file']}: {row['fate']}{why}, {size} px at {bucket}, shown {row['shown']} times: {said}")
    lines += [f"{row['file']}: {', '.join(row['why'])}" for row in ledger["other_files"]]
    lines += ledger["notes"]
    lines.append(
        f"{totals['found']} pictures found, {totals['used']} used ({totals['of_these_warned']} with warnings), "
        f"{totals['left_out']} left out; {totals['steps']} steps, {totals['epochs']} epochs of {totals['samples_an_epoch']}; "
        f"cache {totals['disk_bytes'] / 1e6:.1f} MB, memory about {totals['memory_bytes']['total'] / 1e9:.2f} GB beside the libraries, "
        f"{training_time(totals['seconds'])}"
    )
    return "\n".join(lines)


def training_time(seconds: float | None) -> str:
    """What is known of it: nothing is measured here."""
    if seconds is None:
        return "time not known until a run of this kind was made on this machine"
    return f"about {max(1, round(seconds / 60))} min of steps, going by the last run of this kind on this machine"


def warn_of_cuts(studio: "Studio", prompts: list[str]) -> None:
    for prompt in studio.cut_prompts(prompts):
        say(f'warning: the base does not read the end of "{prompt}"', error=True)


def advise_on_tiny(base: str) -> None:
    if base == "tiny":
        say(TINY)


def main() -> None:
    read_names_as_utf8()
    make_streams_safe()
    app()


if __name__ == "__main__":
    main()
