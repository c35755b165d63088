"""The operator's part of the page: promotions, running flows, and links to Prefect and MLflow."""

import datetime

from tasks.serve.playground.elements import box, say, shorten, web_address
from tasks.serve.service.admin import AdminView, Promotion, RunningFlow

_SHOWN = 20


def operator_sections(view: AdminView) -> None:
    """Add the promotion history, the running flows and the links."""
    with box("operator", "section"):
        with box("database-head"):
            say("h2", "Running flows")
            _page_link("Prefect", view.prefect)
        if not view.flows:
            where = "" if view.prefect else " No Prefect server is configured: set PREFECT_API_URL."
            say("p", f"No flow is running.{where}", "muted")
        for flow in view.flows:
            _flow(flow)
    with box("operator", "section"):
        with box("database-head"):
            say("h2", "Promotion history")
            _page_link("MLflow", view.mlflow)
        if not view.promotions:
            say("p", "No decision is recorded.", "muted")
        else:
            _history(view.promotions[:_SHOWN])


def _history(promotions: list[Promotion]) -> None:
    titles = ["Time (UTC)", "Name", "Version", "Outcome"]
    titles += ["Reason"] if any(one.reason for one in promotions) else []
    with box("table-scroll", tabindex="0", role="region", aria_label="Promotion history"), box("table", "table"):
        with box("", "thead"), box("", "tr"):
            for title in titles:
                say("th", title).props["scope"] = "col"
        with box("", "tbody"):
            for one in promotions:
                with box("", "tr"):
                    values = (time_text(one.at_ms), one.name, one.version, one.outcome, shorten(one.reason, 160))
                    for value in values[: len(titles)]:
                        say("td", str(value))


def _flow(flow: RunningFlow) -> None:
    with box("flow"):
        _page_link(flow.name, flow.page)
        say("span", f"since {flow.started_at[:16].replace('T', ' ')}" if flow.started_at else "starting", "muted")


def _page_link(text: str, address: str | None) -> None:
    if web_address(address) is None:
        say("span", "" if text in ("Prefect", "MLflow") else text)
        return
    link = say("a", text, "source")
    link.props.update({"href": address, "target": "_blank", "rel": "noopener noreferrer"})


def time_text(at_ms: int) -> str:
    """Return a time in UTC, to the minute."""
    return datetime.datetime.fromtimestamp(at_ms / 1_000, datetime.UTC).strftime("%Y-%m-%d %H:%M")
