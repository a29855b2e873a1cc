"""The house rules as laws over the syntax tree: sizes, layers, words; each rule is also shown a source that breaks it."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    "errors", "children", "streams",
    "errors", "lookup", "settings", "randomness", "safeio", "processes", "devices", "lock", "stop", "events", "laps", "hub",
    "defaults", "config",
    "quantise", "layers", "routing", "adapter", "lowrank", "fused", "compiled", "graphs",
    "source", "original", "ldm", "vae", "family", "latent_diffusion", "objective",
    "optimizer", "captioner",
    "families", "adapters", "objectives", "optimizers", "captioners",
    "data", "probe", "generate", "schedule", "packs", "pictures", "score", "eyes", "measures",
    "record", "queue", "charts", "plots", "report", "trackers",
    "train", "state", "validation", "diagnose", "studio", "judge", "judged", "preview", "priors", "estimate", "parity", "plan", "profiling",
    "course", "learners", "settling", "best", "learnt", "export", "job", "search", "kinds", "average", "cast", "sweep", "sharing",
    "apart", "baking", "extraction", "making", "fleet",
    "api", "terminal", "verbs", "cli", "__main__",
]  # fmt: skip
"""Bottom up; a module imports only from modules before its own."""
CHOICES = ("families", "adapters", "objectives", "optimizers", "captioners")
LATE_IMPORTS = {
    ("sdlora.hub", "download"),
    ("sdlora.hub", "kept"),
    ("sdlora.hub", "listed"),
    ("sdlora.hub", "sizes"),
    ("sdlora.hub", "upload"),
    ("sdlora.config", "_is_a_colour"),
    ("sdlora.config", "_are_known"),
    ("sdlora.lock", "_lock"),
}
"""Functions that import for themselves, because few runs need, or not every system has, what they import."""
ENTRANCES = ("sdlora.cli", "sdlora.verbs", "webui.app")
"""Modules that import late: help must not wait for torch, and gradio reads the environment when it is imported."""
WRITERS = ("sdlora.safeio", "sdlora.lock", "sdlora.stop", "sdlora.data.store", "sdlora.fleet.storage")
"""Modules that change a disk: one does so with content; the others make and take away names, or what can be computed again; or
they write to what is no disk of this machine."""
CHANGES = {"rmtree", "copytree", "unlink", "rmdir", "rename", "mkdir", "makedirs", "touch", "write_bytes", "write_text", "truncate"}
FAMILY_NAMES = re.compile(r"\b(sd1|sd2|sd3|sdxl|flux)\b", re.IGNORECASE)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Rule = Callable[[str, str], list[str]]  # (dotted module name, source) -> what breaks the rule


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def is_command(function: Function) -> bool:
    return any(ast.unparse(decorator).startswith("app.command") for decorator in function.decorator_list)


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported; `from a import b` counts as a.b, which may be a name inside a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from (f"{start}.{alias.name}" for alias in node.names)


def files_are_short(module: str, source: str) -> list[str]:
    return [f"{module} is longer than 400 lines"] if len(source.splitlines()) > 400 else []


def functions_are_short(_: str, source: str) -> list[str]:
    return [f"{f.name} is long" for f in functions(ast.parse(source)) if (f.end_lineno or 0) - f.lineno >= 60]


def functions_take_few_parameters(_: str, source: str) -> list[str]:
    found = []
    for function in functions(ast.parse(source)):
        a = function.args
        names = [one.arg for one in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if one]
        if len([name for name in names if name not in ("self", "cls")]) > 7 and not is_command(function):
            found.append(f"{function.name} takes more than seven parameters")
    return found


def functions_say_what_they_return(_: str, source: str) -> list[str]:
    return [f"{f.name} does not say what it returns" for f in functions(ast.parse(source)) if f.returns is None]


def nothing_is_global(_: str, source: str) -> list[str]:
    return ["global state" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Global)]


def excepts_name_what_they_catch(_: str, source: str) -> list[str]:
    return ["a bare except" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler) and node.type is None]


def every_module_has_a_layer(module: str, _: str) -> list[str]:
    top = [*module.split("."), ""][1]
    return [f"{module} is in no layer"] if module.startswith("sdlora.") and top not in LAYERS else []


def imports_point_down(module: str, source: str) -> list[str]:
    found = []
    names = module.split(".")
    here = len(LAYERS) if names[0] == "webui" else LAYERS.index(names[1]) if len(names) > 1 and names[1] in LAYERS else -1
    for name in imports(ast.parse(source)):
        parts = name.split(".")
        if name.startswith("."):
            found.append(f"{module} imports {name}, relatively")
        elif parts[0] == "sdlora":
            there = LAYERS.index(parts[1]) if parts[1] in LAYERS else len(LAYERS)
            if there > here or (there == here and len(names) == 2):
                found.append(f"{module} imports {name}, which is not below it")
    return found


def choices_do_not_meet(module: str, source: str) -> list[str]:
    if not module.startswith(tuple(f"sdlora.{group}." for group in CHOICES)):
        return []
    met = [name for name in imports(ast.parse(source)) if name.startswith(tuple(f"sdlora.{group}" for group in CHOICES))]
    met = [name for name in met if name.split(".")[1] in CHOICES]
    return [f"{module} imports another choice, {name}" for name in met]


def the_web_page_sees_only_the_api(module: str, source: str) -> list[str]:
    names = list(imports(ast.parse(source)))
    if module.split(".")[0] == "webui":
        return [f"{module} imports {name}" for name in names if re.match(r"sdlora\b(?!\.api\b)", name)]
    return [f"{module} imports {name}" for name in names if name.split(".")[0] == "webui" and module != "sdlora.cli"]


def families_are_named_only_at_home(module: str, source: str) -> list[str]:
    if module.startswith("sdlora.families") or module == "sdlora.defaults":
        return []
    tree = ast.parse(source)
    explained = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings, of attributes too
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [f"{module} names a family: {node.value!r}" for node in strings if id(node) not in explained and FAMILY_NAMES.search(node.value)]


def imports_stand_at_the_top(module: str, source: str) -> list[str]:
    if module.startswith(ENTRANCES):
        return []
    owners = [f for f in functions(ast.parse(source)) if (module, f.name) not in LATE_IMPORTS]
    return [f"{module}.{f.name} imports for itself" for f in owners if any(True for _ in imports(f))]


def disks_are_changed_in_one_place(module: str, source: str) -> list[str]:
    if module in WRITERS or not module.startswith("sdlora."):
        return []
    called = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    others = [name for name in called if not name.startswith("safeio.")]
    return [f"{module} calls {name}" for name in others if name == "os.replace" or name.rpartition(".")[2] in CHANGES]


def programs_are_started_in_one_place(module: str, source: str) -> list[str]:
    names = [] if module == "sdlora.children" else list(imports(ast.parse(source)))
    return [f"{module} imports {name}, past sdlora.children" for name in names if name.split(".")[0] in ("subprocess", "multiprocessing")]


def the_terminal_is_written_to_by_its_own_streams(module: str, source: str) -> list[str]:
    called = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [f"{module} calls {name}, which opens streams of its own" for name in called if name in ("typer.echo", "click.echo")]


MANY = ", ".join(f"a{i}" for i in range(8))
BROKEN: list[tuple[Rule, str, str]] = [
    (files_are_short, "sdlora.job", "x = 1\n" * 401),
    (functions_are_short, "sdlora.job", "def f() -> None:\n" + "    pass\n" * 60),
    (functions_are_short, "sdlora.job", "class A:\n    async def f(self) -> None:\n" + "        pass\n" * 60),
    (functions_take_few_parameters, "sdlora.job", f"def f({MANY}) -> None: ..."),
    (functions_take_few_parameters, "sdlora.job", f"def f(self, *, {MANY}) -> None: ..."),
    (functions_take_few_parameters, "sdlora.job", "def f(a, b, c, d, /, e, f, *g, **h) -> None: ..."),
    (functions_say_what_they_return, "sdlora.job", "class A:\n    def f(self): ..."),
    (nothing_is_global, "sdlora.job", "def f() -> None:\n    global x\n    x = 1"),
    (excepts_name_what_they_catch, "sdlora.job", "try:\n    pass\nexcept:\n    pass"),
    (every_module_has_a_layer, "sdlora.extra", ""),
    (every_module_has_a_layer, "sdlora.extra.part", ""),
    (imports_point_down, "sdlora.errors", "import sdlora.safeio"),
    (imports_point_down, "sdlora.train", "from sdlora import job"),
    (imports_point_down, "sdlora.train", "from sdlora.state import save"),
    (imports_point_down, "sdlora.train", "def f() -> None:\n    from sdlora import api"),
    (imports_point_down, "sdlora.train", "from sdlora import train"),
    (imports_point_down, "sdlora.train", "from sdlora import unheard_of"),
    (imports_point_down, "sdlora.train", "from . import errors"),
    (imports_point_down, "sdlora.data.scan", "from sdlora.packs import file"),
    (choices_do_not_meet, "sdlora.adapters.dora", "from sdlora.adapters.lora import Adapter"),
    (choices_do_not_meet, "sdlora.objectives.flow", "from sdlora.families import sd1"),
    (choices_do_not_meet, "sdlora.objectives.flow", "from sdlora import adapters"),
    (choices_do_not_meet, "sdlora.captioners.wd14", "from sdlora.captioners.name import Name"),
    (the_web_page_sees_only_the_api, "webui.app", "from sdlora import errors"),
    (the_web_page_sees_only_the_api, "webui.app", "from sdlora.studio import Studio"),
    (the_web_page_sees_only_the_api, "webui.app", "import sdlora"),
    (the_web_page_sees_only_the_api, "sdlora.job", "import webui.app"),
    (families_are_named_only_at_home, "sdlora.job", 'def f() -> str:\n    """Says."""\n    return "sd1"'),
    (families_are_named_only_at_home, "sdlora.job", 'x = f"for SDXL {1}"'),
    (imports_stand_at_the_top, "sdlora.job", "def f() -> None:\n    import json"),
    (disks_are_changed_in_one_place, "sdlora.state", "shutil.rmtree(folder)"),
    (disks_are_changed_in_one_place, "sdlora.state", "path.parent.mkdir(parents=True)"),
    (disks_are_changed_in_one_place, "sdlora.state", "os.replace(a, b)"),
    (programs_are_started_in_one_place, "sdlora.queue", "import subprocess"),
    (programs_are_started_in_one_place, "webui.app", "from subprocess import run"),
    (the_terminal_is_written_to_by_its_own_streams, "sdlora.cli", "typer.echo(text)"),
    (imports_stand_at_the_top, "sdlora.family", "class A:\n    def f(self) -> None:\n        from json import loads"),
]
SOUND: list[tuple[Rule, str, str]] = [
    (functions_take_few_parameters, "sdlora.cli", f"@app.command()\ndef f({MANY}) -> None: ..."),
    (functions_take_few_parameters, "sdlora.job", "def f(self, a, b, c, d, e, f, g) -> None: ..."),
    (imports_point_down, "sdlora.packs.file", "from sdlora.packs import keys\nfrom sdlora import safeio\nimport json"),
    (choices_do_not_meet, "sdlora.adapters.dora", "from sdlora.adapter import Delta"),
    (the_web_page_sees_only_the_api, "webui.app", "from sdlora import api\nfrom sdlora.api import Run\nfrom webui import parts"),
    (families_are_named_only_at_home, "sdlora.job", '"""About sd1."""\nx: int\n"""sdxl too."""\ny = "sd15x"'),
    (imports_stand_at_the_top, "sdlora.hub", "def download(name: str) -> None:\n    from huggingface_hub import x"),
    (programs_are_started_in_one_place, "sdlora.children", "import subprocess"),
    (disks_are_changed_in_one_place, "sdlora.state", "safeio.rename(a, b)\nname.replace('a', 'b')"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BROKEN))


def sources() -> dict[str, str]:
    found = {}
    for path in sorted([*(ROOT / "sdlora").rglob("*.py"), *(ROOT / "webui").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path.read_text("utf-8")
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule: Rule) -> None:
    assert [line for module, source in sources().items() for line in rule(module, source)] == []


@pytest.mark.parametrize(("rule", "module", "source"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_source_that_breaks_the_rule_is_reported(rule: Rule, module: str, source: str) -> None:
    assert rule(module, source)


@pytest.mark.parametrize(("rule", "module", "source"), SOUND, ids=lambda value: getattr(value, "__name__", None))
def test_a_sound_source_is_not_reported(rule: Rule, module: str, source: str) -> None:
    assert rule(module, source) == []


def test_the_layers_are_those_that_exist() -> None:
    assert set(LAYERS) == {module.split(".")[1] for module in sources() if module.startswith("sdlora.")}


def imports_torch(module: str) -> bool:
    code = f"import sys, {module}; sys.exit(7 if 'torch' in sys.modules else 0)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 7


def test_help_does_not_wait_for_torch() -> None:
    assert not imports_torch("sdlora.cli")
    assert imports_torch("sdlora.randomness"), "the control: this module needs torch"


REGISTRIES = re.compile("|".join(["pypi" + r"\.org", "python" + "hosted"]), re.IGNORECASE)
HUB = re.compile("huggingface" + r"\.co\b", re.IGNORECASE)


def addresses(name: str, text: str) -> list[str]:
    """Addresses of package registries, and of the model hub outside the documents."""
    documented = name.startswith("docs/") or name.rpartition("/")[2] == "README.md"
    return REGISTRIES.findall(text) + ([] if documented else HUB.findall(text))


def test_no_file_names_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    found = {}
    for name in listed.stdout.splitlines():
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in content[:8192] and addresses(name, content.decode("utf-8", "replace")):
            found[name] = addresses(name, content.decode("utf-8", "replace"))
    assert found == {}


def test_an_address_would_be_found() -> None:
    assert addresses("constraints.txt", "--index" + "-url https://pypi" + ".org/simple")
    assert addresses("sdlora/family.py", "https://huggingface" + ".co/x")
    assert not addresses("README.md", "https://huggingface" + ".co/x")
