"""The prompt: one box for a text, an image, or both, with negative terms."""

from collections.abc import Callable
from typing import Any

from nicegui import events, run, ui
from PIL import Image

from tasks.serve.playground.elements import box, image, say, shorten
from tasks.serve.playground.images import MAX_FILE_BYTES, SentImages
from tasks.serve.playground.state import PageState, Tab
from tasks.serve.service.requests import MAX_PROMPT_CHARACTERS, decode_bytes
from tasks.serve.service.responses import ServedVersion

_PLACEHOLDERS: dict[Tab, str] = {
    "search": "Describe an image, or drop, paste or add one",
    "generate": "Describe the image to generate, or drop, paste or add one",
    "compare": "Describe an image; every database answers",
    "edit": "Add an image, then describe how it should look",
}
_RUN: dict[Tab, str] = {"search": "Search", "generate": "Generate", "compare": "Compare", "edit": "Edit"}


class Prompt:
    """The box at the top of the page. An image is kept on the server and shown as a chip."""

    def __init__(
        self,
        state: PageState,
        images: SentImages,
        on_run: Callable[[], Any],
        warn: Callable[[str], None],
        *,
        can_edit: bool,
    ) -> None:
        """Add the box. ``warn`` shows a message to the user. Without ``can_edit`` no edit can be run."""
        self._state, self._images, self._warn, self._can_edit = state, images, warn, can_edit
        self._names: dict[str, str] = {}
        self._page = ui.context.client.id
        ui.context.client.on_delete(lambda: images.close(self._page))
        with box("prompt") as self.area:
            self._chip = box("chip-slot")
            with box("prompt-row"):
                self._text = ui.textarea(value=state.text, on_change=self._set_text)
                self._text.props("autogrow borderless dense rows=1 maxlength=2000").classes("prompt-text run-on-enter")
                self._text.props["aria-label"] = "Prompt"
                add = ui.button(icon="add_photo_alternate").props("flat round").classes("pick-image")
                add.props["aria-label"] = "Add an image"
                ui.tooltip("Add an image; you can also drop or paste one").move(add)
                self._run = (
                    ui.button("Search", on_click=on_run, color=None).props("unelevated no-caps").classes("run filled")
                )
            self._negative = ui.input(value=state.negative, on_change=self._set_negative)
            self._negative.props("borderless dense maxlength=2000").classes("negative run-on-enter")
            self._negative.props.update({"aria-label": "Without", "prefix": "Without"})
            uploader = ui.upload(
                on_upload=self._receive,
                on_rejected=lambda: warn("The file is not an image, or is larger than 20 MB."),
                max_file_size=MAX_FILE_BYTES,
                auto_upload=True,
            )
            uploader.props("accept=image/*").classes("uploader hidden")
        self.refresh()

    @property
    def image(self) -> Image.Image | None:
        """The image of the prompt. Raises ``NotFoundError`` if it has expired."""
        return self._images.get(self._state.image) if self._state.image else None

    def refresh(self) -> None:
        """Show the state: after a change of the tab, or after earlier values were recalled."""
        self._images.claim(self._state.image, self._page)
        tab = self._state.tab
        self.area.set_visibility(tab != "databases")
        self._text.value, self._negative.value = self._state.text, self._state.negative
        self._text.props["placeholder"] = _PLACEHOLDERS.get(tab, "")
        self._negative.props["placeholder"] = (
            "terms to avoid, separated by commas" if tab == "search" else "something to avoid"
        )
        self._negative.set_visibility(tab != "edit")
        self._run.text = _RUN.get(tab, "")
        self._run.set_enabled(tab != "edit" or self._can_edit)
        self._show_chip()

    def use(self, shown: Image.Image, name: str) -> None:
        """Take an image as the image of the prompt."""
        self._state.image = token = self._images.add(shown, self._page)
        self._names[token] = name
        self._state.set_row(None)
        self._show_chip()

    def remove(self) -> None:
        """Remove the image, or the stored row of "more like this"."""
        self._state.image = ""
        self._state.set_row(None)
        self._show_chip()

    def remove_row(self) -> None:
        """Remove the stored row alone."""
        self._state.set_row(None)
        self._show_chip()

    def like(self, row: int, database: ServedVersion) -> None:
        """Take a stored row instead of a text and an image."""
        self._state.image = ""
        self._state.set_row(row, database)
        self._state.text = self._text.value = ""
        self._show_chip()

    async def _receive(self, event: events.UploadEventArguments) -> None:
        if event.file.size() > MAX_FILE_BYTES:
            self._warn("The file is larger than 20 MB.")
        else:
            try:
                decoded = await run.io_bound(decode_bytes, await event.file.read())
            except ValueError as error:
                self._warn(f"{shorten(event.file.name, 80)} {error}")
            else:
                if decoded is not None:  # None: the server stops
                    self.use(decoded, event.file.name)
        event.sender.reset()  # type: ignore[attr-defined]

    def _show_chip(self) -> None:
        self._chip.clear()
        row = self._state.row if self._state.tab == "search" else None
        with self._chip:
            if token := self._state.image:
                with box("chip"):
                    if token in self._images:
                        image(f"playground/images/{token}", "Image of the prompt")
                    name = self._names.get(token, "Image of the prompt")
                    say("span", shorten(name, 40) if token in self._images else "The image has expired")
                    self._remove_button("Remove the image")
            elif row is not None:
                with box("chip"):
                    say("span", f"More like stored image {row}")
                    self._remove_button("Remove")

    def _remove_button(self, label: str) -> None:
        button = ui.button(icon="close", on_click=self.remove).props("flat round dense size=sm")
        button.props["aria-label"] = label

    def _set_text(self, event: events.ValueChangeEventArguments[str | None]) -> None:
        self._state.text = (event.value or "").replace("\n", " ")[:MAX_PROMPT_CHARACTERS]

    def _set_negative(self, event: events.ValueChangeEventArguments[str | None]) -> None:
        self._state.negative = (event.value or "")[:MAX_PROMPT_CHARACTERS]
