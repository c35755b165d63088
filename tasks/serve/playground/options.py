"""Controls below the prompt. Each belongs to some of the tabs; those of a closed tab keep their values."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from nicegui import events, ui
from nicegui.elements.mixins.value_element import ValueElement
from pydantic import ValidationError

from model.generation.quality import PRESETS
from tasks.serve.playground.elements import box
from tasks.serve.playground.state import MAX_COMPARED, PageState, Tab
from tasks.serve.service.responses import ServiceInfo

_START = {None: "Default", "neighbour": "A stored neighbour", "noise": "Pure noise"}
_METHODS = {"flow": "FlowEdit", "local": "Local", "restore": "Restore", "sdedit": "SDEdit"}
_DRAWS: tuple[Tab, ...] = ("generate", "compare", "edit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Control:
    field: str
    element: ValueElement[Any]
    tabs: tuple[Tab, ...]
    generates: bool


class Options:
    """The controls, bound to the state.

    Attributes:
        missing: Databases of the link that are not served.
    """

    def __init__(self, state: PageState, info: ServiceInfo, databases: Sequence[str], on_change: Callable[[], None]):
        """Add the controls. ``databases`` are the served ones."""
        self._state, self._info, self._on_change = state, info, on_change
        self._controls: list[_Control] = []
        self._ranges: dict[str, str] = {}
        self._invalid: dict[str, Any] = {}
        with box("options") as self._area:
            self._main(list(databases))
        with ui.expansion("More options").classes("more") as self._more:
            self._more.props("dense")
            with box("options"):
                self._details()
        self.refresh()

    @property
    def problem(self) -> str | None:
        """The first value of the tab that is out of range, as a message; None if there is none."""
        for control in self._controls:
            if control.field in self._invalid and control.element.visible:
                return self._ranges[control.field].format(self._invalid[control.field])
        return None

    def serve(self, databases: Sequence[str]) -> None:
        """Offer the databases that are served now."""
        if list(databases) != self._single.options:
            self._single.set_options(list(databases))
            self._several.set_options(list(databases))

    def refresh(self) -> None:
        """Show the values of the state and the controls of its tab."""
        tab = self._state.tab
        generates = tab != "compare" or self._state.view == "generate"
        for control in self._controls:
            control.element.set_visibility(tab in control.tabs and (generates or not control.generates))
            control.element.value = getattr(self._state, control.field)
        self._invalid.clear()
        self._show_candidates()
        self._area.set_visibility(tab != "databases")
        self._more.set_visibility(tab != "databases" and generates)

    def _main(self, databases: list[str]) -> None:
        wanted = [*self._state.databases, *([self._state.database] if self._state.database else [])]
        self.missing = [name for name in wanted if name not in databases]
        if self._state.database not in databases:
            self._state.database = databases[0] if databases else None
        known = [name for name in self._state.databases if name in databases]
        self._state.databases = known or databases[:MAX_COMPARED]
        self._single = ui.select(databases, label="Database")
        self._add("database", self._single, ("search", "generate", "edit"), generates=False)
        self._several = ui.select(databases, label="Databases (2 to 4)", multiple=True).props(
            f"use-chips max-values={MAX_COMPARED}"
        )
        self._add("databases", self._several.classes("wide"), ("compare",), generates=False)
        view = ui.select({"generate": "Generated", "search": "Nearest"}, label="Show")
        self._add("view", view, ("compare",), generates=False)
        self._number("results", "Results", ("search",), 1, 500)
        self._number("n", "Images", _DRAWS, 1, self._info.limits.get("n", 16))
        self._number("seed", "Seed", _DRAWS, 0, 2**53 - 1, "random")

    def _details(self) -> None:
        defaults = self._info.defaults
        where = ui.input("Only rows where").props("maxlength=2000 stack-label").classes("run-on-enter")
        where.props["placeholder"] = "url like '%cat%'"
        self._add("where", where.classes("wide"), ("search",), generates=False)
        self._number("steps", "Steps", _DRAWS, 1, 250, defaults.get("steps"))
        self._number("guidance", "Guidance", _DRAWS, 1, 50, defaults.get("guidance"), step=0.5)
        self._number("neighbours", "Neighbours", _DRAWS, 1, 100, defaults.get("k"))
        self._add("quality", ui.select({"fast": "Fast", "best": "Best"}, label="Quality"), _DRAWS[:2])
        self._candidates = self._number("candidates", "Candidates", _DRAWS[:2], 1, 16)
        if self._info.starts_from_images:
            self._add("start", ui.select(_START, label="Start from"), _DRAWS[:2])
            self._number("strength", "Noise", _DRAWS[:2], 0.05, 1, defaults.get("strength"), step=0.05)
        if self._info.edit_methods:
            methods = {None: "Default"} | {name: _METHODS.get(name, name) for name in self._info.edit_methods}
            self._add("method", ui.select(methods, label="Method"), ("edit",))
            self._number("edit_strength", "Strength", ("edit",), 0.05, 1, defaults.get("edit_strength"), step=0.05)
        target = ui.input("Interpolate to").props("maxlength=2000 stack-label").classes("run-on-enter")
        target.props["placeholder"] = "a second prompt: the images lead to it"
        self._add("interpolate_to", target.classes("wide"), ("generate",))

    def _number(
        self,
        field: str,
        label: str,
        tabs: tuple[Tab, ...],
        low: float,
        high: float,
        default: Any = None,
        step: float = 1,
    ) -> ui.number:
        number = ui.number(label, min=low, max=high, step=step).props("stack-label")
        number.props["placeholder"] = "default" if default is None else str(default)
        self._add(field, number, tabs)
        kind = "whole number" if step == 1 else "number"
        self._ranges[field] = f"{label} is not valid: {{}}; give a {kind} from {low} to {high}."
        return number

    def _add(self, field: str, element: ValueElement[Any], tabs: tuple[Tab, ...], *, generates: bool = True) -> None:
        element.props("outlined dense hide-bottom-space")
        element.value = getattr(self._state, field)
        element.on_value_change(lambda event: self._set(field, event))
        self._controls.append(_Control(field=field, element=element, tabs=tabs, generates=generates))

    def _set(self, field: str, event: events.ValueChangeEventArguments[Any]) -> None:
        value = event.value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value in (None, ""):
            value = PageState.model_fields[field].get_default(call_default_factory=True)
        self._invalid.pop(field, None)
        if value == getattr(self._state, field):
            return
        try:
            setattr(self._state, field, value)
        except ValidationError:
            if field in self._ranges:
                self._invalid[field] = value
            return
        self._show_candidates()
        self._on_change()

    def _show_candidates(self) -> None:
        """Show the default of the selected quality."""
        quality, default = self._state.quality, self._info.defaults.get("candidates")
        preset = default if quality == "fast" else PRESETS[quality].candidates
        self._candidates.props["placeholder"] = "default" if preset is None else str(preset)
