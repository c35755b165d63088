import pytest

from infra.download.robots_tag import forbidding_rule


@pytest.mark.parametrize(
    "headers",
    [
        ["noindex"],
        ["NoIndex"],
        ["none"],
        ["noai"],
        ["noimageai"],
        ["noimageindex"],
        ["nofollow, noindex"],
        ["max-image-preview:large, noindex"],
        ["max-image-preview: large, max-snippet: -1, noindex"],
        ["noindex, max-image-preview:large"],
        ["unavailable_after: 25 Jun 2030 15:00:00 PST, noindex"],
        ["unavailable_after: Tue, 25 Jun 2030 15:00:00 PST, noindex"],
        ["unavailable_after: Tuesday, 25-Jun-30 15:00:00 GMT, noai"],
        ["unavailable_after: 2030-06-25T15:00:00+00:00, noai"],
        ["knn-diffusion: noindex"],
        ["img2dataset: noindex"],
        ["IMG2Dataset : nofollow, noai"],
        ["otherbot: nofollow, img2dataset: noindex"],
        ["*: noindex"],
        ["all", "noindex"],
        ["otherbot: noindex", "noindex"],
        ["noindex nofollow"],
        ["noindex; nofollow"],
        [" noindex ,"],
    ],
)
def test_forbidding_rule_applicable_returns_the_rule(headers: list[str]) -> None:
    assert forbidding_rule(headers) in {"noindex", "none", "noai", "noimageai", "noimageindex"}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["all"],
        ["nofollow"],
        ["otherbot: noindex"],
        ["otherbot: nofollow, noindex"],
        ["otherbot: max-image-preview:large, noindex"],
        ["otherbot: noindex, unavailable_after: Tue, 25 Jun 2030 15:00:00 PST, noai"],
        ["img2dataset: nofollow, otherbot: noindex"],
        ["otherbot: noindex", "nofollow"],
        ["max-image-preview:none"],
        ["max-image-preview: none, max-snippet: 0"],
        ["unavailable_after: 25 Jun 2030 15:00:00 PST"],
        ["noindexed, notnone"],
    ],
)
def test_forbidding_rule_not_applicable_returns_none(headers: list[str]) -> None:
    assert forbidding_rule(headers) is None
