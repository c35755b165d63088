"""The served and registered databases, and swaps between their versions."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from nicegui import run, ui

from infra.errors import KNNDiffusionError
from infra.settings import Settings
from model.errors import ModelError
from tasks.serve.playground.admin import operator_sections
from tasks.serve.playground.elements import age_text, box, say
from tasks.serve.service.admin import admin_view
from tasks.serve.service.errors import public_message
from tasks.serve.service.responses import ServedDatabase

if TYPE_CHECKING:
    from tasks.serve.service.engine import Engine


class Databases:
    """One card for each database. A swap needs a confirmation."""

    def __init__(self, engine: "Engine", settings: Settings, warn: Callable[[str], None]) -> None:
        """Add the empty list."""
        self._engine, self._settings, self._warn = engine, settings, warn
        self.area = box("databases")

    async def refresh(self) -> None:
        """Read and show the databases, the promotions and the running flows."""
        view = await run.io_bound(admin_view, self._engine, self._settings)
        if view is None:  # the server stops
            return
        self.area.clear()
        with self.area:
            for problem in view.problems:
                say("p", problem, "message")
            for database in view.databases:
                self._card(database)
            operator_sections(view)

    def _card(self, database: ServedDatabase) -> None:
        with box("database", "section"):
            with box("database-head"):
                say("h2", database.name)
                served = database.served
                version = "?" if served is None or served.version is None else str(served.version)
                say("span", f"serving version {version}" if served else "not served", "served" if served else "muted")
            if database.problem:
                say("p", database.problem, "problem")
            with box("facts", "dl"):
                for name, value in facts(database).items():
                    with box("fact"):
                        say("dt", name)
                        say("dd", value)
            if set(database.versions) - {database.served.version if database.served else None}:
                self._swap_controls(database)

    def _swap_controls(self, database: ServedDatabase) -> None:
        served = database.served.version if database.served else None
        newest = max(version for version in database.versions if version != served)
        with box("buttons"):
            choice = ui.select(sorted(database.versions, reverse=True), value=newest).props(
                "outlined dense hide-bottom-space"
            )
            choice.classes("version").props["aria-label"] = f"Version of {database.name}"
            label = "Swap" if served is not None else "Serve"
            button = ui.button(label, on_click=lambda: self._confirm(database, int(choice.value)))
            button.props("outline no-caps")
            button.props["aria-label"] = f"{label} {database.name}"

    async def _confirm(self, database: ServedDatabase, version: int) -> None:
        served = database.served.version if database.served else None
        with ui.dialog() as dialog, ui.card().classes("confirm"):
            say("h2", f"Serve version {version} of {database.name}?")
            current = (
                "Requests that are running finish" if served is None else f"Running requests finish on version {served}"
            )
            say("p", f"{current}; later ones use version {version}. The registered champion does not change.")
            with box("buttons"):
                ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("flat no-caps")
                ui.button("Swap", on_click=lambda: dialog.submit(True), color=None).props("unelevated no-caps").classes(
                    "filled"
                )
        confirmed = await dialog
        dialog.delete()
        if confirmed:
            await self._swap(database.name, version)

    async def _swap(self, name: str, version: int) -> None:
        note = ui.notification(f"Opening version {version} of {name}", spinner=True, timeout=None)
        try:
            swapped = await run.io_bound(self._engine.swap, name, version)
        except (KNNDiffusionError, ModelError) as error:
            self._warn(public_message(error))
        else:
            rows = f"{swapped.served.rows:,} rows" if swapped is not None and swapped.served else "not served"
            ui.notify(f"{name} now serves version {version}: {rows}")
        finally:
            note.dismiss()
        await self.refresh()


def facts(database: ServedDatabase) -> dict[str, str]:
    """Return what is known of a database, for people."""
    known: dict[str, str] = {}
    if database.served is not None:
        known["Rows"] = f"{database.served.rows:,}"
    for name, value in (("images", database.recall_at_10_image), ("texts", database.recall_at_10_text)):
        if value is not None:
            known[f"Recall@10, {name}"] = f"{value:.3f}"
    known["Age"] = age_text(database.created_ms)
    known["Aliases"] = ", ".join(f"{name} → {version}" for name, version in database.aliases.items()) or "none"
    known["Versions"] = ", ".join(str(version) for version in sorted(database.versions)) or "none"
    return known
