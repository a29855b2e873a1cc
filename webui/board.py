"""The page as a whole: one step after another, from pictures to a pack, and the project that all of them speak of."""

from typing import Any

import gradio as gr

from webui.choose import Choose
from webui.easel import NONE
from webui.gather import Gather, Home
from webui.goal import Goal
from webui.house import PRIVATE, House, Values, toasts
from webui.share import Share
from webui.studio import Page
from webui.watch import Watch
from webui.words import Words

TITLE = "<h1>sdlora</h1><p>from pictures to a pack</p>"
QUIET: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}


class Board:
    """All screens, and what leads from one to another."""

    def __init__(self, house: House, page: Any) -> None:
        self.house = house
        with gr.Row(elem_id="top"):
            gr.HTML(TITLE, padding=False, elem_id="title")
            self.project = gr.Dropdown([], value=None, label="Project", elem_id="project", scale=0, min_width=220)
        with gr.Tabs(selected="home", elem_id="screens") as self.tabs:
            with gr.Tab("Home", id="home"):
                self.home = Home(house)
            with gr.Tab("1 Pictures", id="pictures"):
                self.gather = Gather(house, self.project)
            with gr.Tab("2 Captions", id="captions") as captions:
                self.words = Words(house, self.project)
            with gr.Tab("3 Goal", id="goal") as goal:
                self.goal = Goal(house, self.project)
            with gr.Tab("4 Watch", id="watch") as watch:
                self.watch = Watch(house)
            with gr.Tab("5 Studio", id="studio") as studio:
                self.studio = Page(house.easel, studio.select, house.links)
            with gr.Tab("6 Choose", id="choose") as choose:
                self.choose = Choose(house, choose.select)
            with gr.Tab("7 Share", id="share") as share:
                self.share = Share(house, share.select)
        self._events(page)
        captions.select(self.words_now, {self.project}, self._of(self.words), **QUIET)
        goal.select(self.goal_now, {self.project}, self.goal.outputs(), **QUIET)
        watch.select(lambda run: self.watch.choices(before=run or ""), [self.watch.run], [self.watch.run], **QUIET)

    def _events(self, page: Any) -> None:
        shown = [*self._of(self.gather), *self._of(self.words), *self.goal.outputs()]
        page.load(self.list_projects, {self.project}, [self.project], **QUIET)
        self.project.change(self.show, {self.project}, shown, **QUIET)
        begin = [self.project, self.tabs, self.home.name]
        gr.on([self.home.begin.click, self.home.name.submit], self.begin, {self.home.name}, begin, **PRIVATE)
        self.home.sample.click(self.sample, None, [self.project, self.tabs], **PRIVATE)
        led_to = [self.project, self.tabs, self.watch.run, *self.studio.lists(), self.studio.drawn]
        self.home.opened.submit(self.open, {self.home.opened}, led_to, **QUIET)
        self.goal.start.click(self.start, self.goal.asked, [self.tabs, self.watch.run], **PRIVATE)

    def list_projects(self, values: Values) -> Values:
        """Read the folder; the choice stays if it is still there, else the newest is chosen."""
        return {self.project: self._projects(values[self.project] or "")}

    def show(self, values: Values) -> Values:
        """Another project on all screens."""
        name = values[self.project] or ""
        with toasts():
            return {**self.gather.show(name), **self.words.show(name), **self.goal.show(name)}

    def words_now(self, values: Values) -> Values:
        with toasts():
            return self.words.show(values[self.project] or "")

    def goal_now(self, values: Values) -> Values:
        with toasts():
            return self.goal.show(values[self.project] or "")

    def begin(self, values: Values) -> Values:
        """A new project, and on to its pictures."""
        with toasts():
            project = self.house.projects.begin(values[self.home.name] or "")
        return {self.project: self._projects(project.name), self.tabs: gr.Tabs(selected="pictures"), self.home.name: ""}

    def sample(self) -> Values:
        """The bundled character, ready to be trained."""
        with toasts():
            project = self.house.projects.sample()
        gr.Info("A fourth of the usual steps, to see in two minutes that it works. Empty the box train.steps under Tune for all of them.")
        return {self.project: self._projects(project.name), self.tabs: gr.Tabs(selected="goal")}

    def open(self, values: Values) -> Values:
        """The project, run or pack that was chosen somewhere on the page."""
        what, _, name = (values[self.home.opened] or "").partition(":")
        if what == "run":
            return {self.watch.run: self.watch.choices(wanted=name), self.tabs: gr.Tabs(selected="watch")}
        if what == "pack":  # drawn at once: its scale is to be moved
            packs = self.studio.list_packs({**dict.fromkeys(self.studio.lists(), NONE), self.studio.controls["pack"]: name})
            return {**packs, self.studio.drawn: True, self.tabs: gr.Tabs(selected="studio")}
        return {self.project: self._projects(name), self.tabs: gr.Tabs(selected="pictures")}

    def start(self, values: Values) -> Values:
        """Begin to train, and look on."""
        begun = self.goal.begin(values)
        return {self.watch.run: self.watch.choices(wanted=begun), self.tabs: gr.Tabs(selected="watch")}

    def _projects(self, wanted: str) -> Any:
        names = [project.name for project in self.house.projects.all()]
        return gr.Dropdown(names, value=wanted if wanted in names else next(iter(names), None))

    def _of(self, screen: Any) -> list[Any]:
        """The components that a screen's `show` sets."""
        if screen is self.gather:
            return [screen.cards, screen.command]
        return [screen.table, screen.tags, screen.command, screen.picture]
