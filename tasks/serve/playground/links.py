"""Addresses of the page: the last one of each tab, so that Back and links show the same results."""

from tasks.serve.playground.state import PageState, Tab


class Links:
    """The last URL query of each tab. It has the seed of the last run until a setting of the tab changes."""

    def __init__(self) -> None:
        """Start without addresses."""
        self._last: dict[Tab, str] = {}
        self._ran: dict[Tab, tuple[str, int]] = {}

    def run(self, state: PageState, seed: int) -> str:
        """Return the query of a run with a seed."""
        self._ran[state.tab] = (state.settings(), seed)
        return self.change(state)

    def change(self, state: PageState) -> str:
        """Return the query of the present controls, and remember it."""
        self._last[state.tab] = self._query(state)
        return self._last[state.tab]

    def last(self, state: PageState) -> str:
        """Return the last query of the state's tab, or that of its controls."""
        return self._last.get(state.tab) or self.change(state)

    def draft(self, state: PageState) -> str | None:
        """Return a query that fills the controls without a run, or None if the address has their values already."""
        query = self._query(state)
        return None if query == self._last.get(state.tab) else f"{query}&draft=1"

    def _query(self, state: PageState) -> str:
        settings, seed = self._ran.get(state.tab, ("", 0))
        return state.query(seed=seed if settings == state.settings() else None)
