"""The page of one visitor: its tabs, its prompt, its results, and what the buttons do."""

import dataclasses
import io
from typing import TYPE_CHECKING, Any

from nicegui import events, ui
from PIL import Image

from infra.settings import Settings
from tasks.serve.playground.compare import ComparedDatabases
from tasks.serve.playground.databases import Databases
from tasks.serve.playground.details import Actions, Details, Shown
from tasks.serve.playground.edit import EditedImages
from tasks.serve.playground.elements import box, say
from tasks.serve.playground.generate import GeneratedImages
from tasks.serve.playground.history import History, state_of
from tasks.serve.playground.images import SentImages
from tasks.serve.playground.links import Links
from tasks.serve.playground.options import Options
from tasks.serve.playground.prompt import Prompt
from tasks.serve.playground.results import Results, collect, explain, submit
from tasks.serve.playground.runner import Runner
from tasks.serve.playground.search import SearchResults
from tasks.serve.playground.state import TABS, PageState, Tab, new_seed
from tasks.serve.service.errors import JobCancelledError
from tasks.serve.service.jobs import Job
from tasks.serve.service.requests import EditRequest, GenerateRequest
from tasks.serve.service.responses import Hit, ImagesResponse, SearchResponse, ServedVersion

if TYPE_CHECKING:
    from tasks.serve.service.engine import Engine

_SERVED_S = 5.0
DARK_COOKIE = "knn_diffusion_dark"
_TOGGLE_DARK = f"""() => {{
    const dark = !Quasar.Dark.isActive;
    document.cookie = `{DARK_COOKIE}=${{dark ? 1 : 0}}; path=/; max-age=31536000; SameSite=Strict`;
    emit(dark);
}}"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Objects that all visitors share."""

    engine: "Engine"
    images: SentImages
    settings: Settings


class View:
    """The page of one visitor."""

    def __init__(self, context: Context, state: PageState, dark: ui.dark_mode) -> None:
        """Build the page."""
        self._engine, self._images, self.state = context.engine, context.images, state
        self._links = Links()
        info = context.engine.info()
        with box("top", "header"):
            say("h1", "knn-diffusion")
            say("span", f"{info.model}, {info.side_px} px", "muted")
            toggle = ui.button(icon="contrast").props("flat round")
            toggle.props["aria-label"] = "Dark or light"
            toggle.on("click", lambda event: dark.set_value(bool(event.args)), js_handler=_TOGGLE_DARK)
        with ui.tabs() as self.tabs:
            for name in TABS:
                ui.tab(name, label=name.capitalize()).props("no-caps")
        self.tabs.value = state.tab
        self.tabs.on_value_change(self._select_event)
        self.tabs.props("dense align=left").classes("tabs")
        with box("page"):
            can_edit = bool(info.edit_methods)
            self.prompt = Prompt(state, context.images, self.run, self.warn, can_edit=can_edit)
            self.options = Options(state, info, self._served_names(), self._change)
            self.runner = Runner()
            self._message = box("message-slot", role="alert")
            self._build_results(context, can_edit=can_edit)
        self._show_tab()

    def _build_results(self, context: Context, *, can_edit: bool) -> None:
        with box("body"):
            with box("body-results"):
                self.search = SearchResults(self.state, self.like, self._save)
                self.generate = GeneratedImages(self.open)
                self.compare = ComparedDatabases(self.open, self.like)
                self.edit = EditedImages(self._images, self.open, can_edit=can_edit)
                self.databases = Databases(self._engine, context.settings, self.warn)
            self.details = Details(
                Actions(use_all=self.use_all, use_seed=self.use_seed, search=self.search_with, edit=self.edit_with)
            )
        self.history = History(self._engine.jobs, self.restore)

    async def connected(self) -> None:
        """Run the request of the URL once the browser is connected."""
        self.history.connect()
        self._links.change(self.state)
        ui.timer(_SERVED_S, lambda: self.options.serve(self._served_names()))
        if self.state.tab == "databases":
            await self.databases.refresh()
        elif self.state.draft:
            self.state.draft = False
        elif self.options.missing:
            missing = ", ".join(self.options.missing)
            self.warn(f"The link names a database that is not served: {missing}. Choose another.")
        elif self.state.text or self.state.image or self.state.row is not None:
            await self._show_or_run(self.history.entries.latest(self.state))

    async def select(self, tab: Tab) -> None:
        """Show a tab. Back returns to the tab before it."""
        self._open_tab(tab)
        ui.navigate.history.push(f"?{self._links.last(self.state)}")
        if tab == "databases":
            await self.databases.refresh()

    async def _select_event(self, event: events.ValueChangeEventArguments[Any]) -> None:
        if event.value in TABS and event.value != self.state.tab:
            await self.select(event.value)

    def _open_tab(self, tab: Tab) -> None:
        self.state.tab = tab
        self.tabs.value = tab
        self.options.serve(self._served_names())
        self._show_tab()

    def _show_tab(self) -> None:
        self.prompt.refresh()
        self.options.refresh()
        self.details.hide()
        self._clear_message()
        for name in TABS:
            getattr(self, name).area.set_visibility(name == self.state.tab)

    async def run(self, *, replace: bool = False) -> None:
        """Run the request of the controls, and show its results. ``replace``: the address names the request already."""
        if self.runner.running:
            self.warn("A request is running. Wait for it, or cancel it first.", calm=True)
            return
        if not self._keep_row():
            return
        if self.options.problem is not None:
            self.warn(self.options.problem)
            return
        self._clear_message()
        self.details.hide()
        seed = new_seed() if self.state.seed is None else self.state.seed
        state = self.state.model_copy()
        try:
            jobs = submit(self._engine, state, self.prompt.image, seed)
            query = self._links.run(state, seed)
            (ui.navigate.history.replace if replace else ui.navigate.history.push)(f"?{query}")
            await self.runner.wait(jobs)
            results = collect(jobs)
        except Exception as error:
            self.warn(explain(error), calm=isinstance(error, JobCancelledError))
        else:
            self._show(state.tab, results)
            self.history.add(state, query, results)

    async def _show_or_run(self, results: Results) -> None:
        """Show stored results. Without them, run the request; it fails with a message if its image has expired."""
        if results:
            self._show(self.state.tab, results)
        elif self.state.tab != "edit" or self.state.image:
            await self.run(replace=True)

    def _show(self, tab: Tab, results: Results) -> None:
        if tab == "compare":
            self.compare.show(results)
            return
        job = next(one for one in results.values() if isinstance(one, Job))
        response = job.future.result()
        if isinstance(response, SearchResponse):
            self.search.show(response)
        elif isinstance(response, ImagesResponse):
            (self.edit if tab == "edit" else self.generate).show(job, response)

    def open(self, shown: Shown) -> None:
        """Show the details of an image beside the results."""
        self.details.show(shown)

    async def like(self, hit: Hit, database: ServedVersion) -> None:
        """Search for more images like a stored one."""
        served = self._served(database.name)
        if served is None or served.generation != database.generation:
            self.warn(f"{database.name} was swapped, and the rows of its versions differ. Run the request again.")
            return
        self.state.database = database.name
        self.prompt.like(hit.id, served)
        self._open_tab("search")
        await self.run()

    def use_all(self, shown: Shown) -> None:
        """Set the controls to those of an image."""
        request = shown.job.request
        self.state.recall(request, shown.image.seed)
        image = request.image if isinstance(request, GenerateRequest | EditRequest) else None
        if image is None:
            self.prompt.remove()
        else:
            self.prompt.use(image, "Image of the prompt")
        self._recalled("The controls have the values of this image.")

    def use_seed(self, shown: Shown) -> None:
        """Set the seed alone."""
        self.state.seed = shown.image.seed
        self._recalled(f"The seed is {shown.image.seed}.")

    async def search_with(self, shown: Shown) -> None:
        """Search for stored images near a generated one."""
        self._take(shown)
        self.state.text = ""
        self._open_tab("search")
        await self.run()

    def edit_with(self, shown: Shown) -> None:
        """Take a generated image to the tab of edits."""
        self._take(shown)
        self.state.text = ""
        self._open_tab("edit")
        ui.navigate.history.push(f"?{self._links.change(self.state)}")

    async def restore(self, entry: dict[str, Any]) -> None:
        """Show an entry of the history; run it again if its jobs have expired."""
        if draft := self._links.draft(self.state):
            ui.navigate.history.replace(f"?{draft}")  # Back returns to what was typed
        self.state.take(state_of(entry))
        self._open_tab(self.state.tab)
        ui.navigate.history.push(f"?{self._links.change(self.state)}")
        await self._show_or_run(self.history.entries.results_of(entry))

    def _served(self, name: str | None) -> ServedVersion | None:
        return next((one.served for one in self._engine.databases() if one.name == name), None)

    def _served_names(self) -> list[str]:
        return [one.name for one in self._engine.databases() if one.served is not None]

    def _keep_row(self) -> bool:
        """Remove the stored row of "more like this" and say why, if it is not one of the selected database.

        Return False if it was removed.
        """
        if self.state.tab != "search":
            return True
        problem = self.state.row_problem(self._served(self.state.database))
        if problem is None:
            return True
        self.prompt.remove_row()
        self.warn(problem, calm=True)
        return False

    def _change(self) -> None:
        self._keep_row()
        self._save()

    def warn(self, text: str, *, calm: bool = False) -> None:
        """Show a message above the results."""
        if self._message.is_deleted:  # the visitor has left
            return
        self._message.clear()
        with self._message:
            say("p", text, "message calm" if calm else "message")

    def _clear_message(self) -> None:
        self._message.clear()

    def _take(self, shown: Shown) -> None:
        with Image.open(io.BytesIO(shown.image.png)) as opened:
            self.prompt.use(opened.convert("RGB"), f"Image with seed {shown.image.seed}")

    def _recalled(self, text: str) -> None:
        self.prompt.refresh()
        self.options.refresh()
        self._save()
        ui.notify(text)

    def _save(self) -> None:
        ui.navigate.history.replace(f"?{self._links.change(self.state)}")
