"""Options that say what is downloaded: a URL list or a folder of images."""

from typing import Annotated, Any

import typer

from flows.cli.inputs import check_image_folder, check_url_list

Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--urls",
        help="URL list with a column 'url': parquet, csv, tsv, JSON or text; a file, folder or pattern. Repeatable.",
    ),
]
Folder = Annotated[
    str | None,
    typer.Option("--folder", help="Folder of image files or webdataset tars, in place of --urls; read recursively."),
]
UrlColumn = Annotated[str | None, typer.Option("--url-column", help="Column of the list with the URLs. Default: url.")]
OnlyFailed = Annotated[
    bool,
    typer.Option("--only-failed", help="Use only the failed rows of a list that is the parquet of a download."),
]


def source_fields(
    urls: list[str] | None,
    folder: str | None,
    url_column: str | None,
    only_failed: bool,
    *,
    allow_hosts: list[str] | None = None,
    optional: bool = False,
) -> dict[str, Any]:
    """Check the source and return its fields in a flow's config.

    Raises:
        BadParameter: There is no source although it is not ``optional``, or there are two.
        InputError: The source cannot be used.
        NotFoundError: The source does not exist.
    """
    if urls and folder is not None:
        raise typer.BadParameter(f"--urls and --folder are both given: {urls[0]}, {folder}; give one of them")
    if not urls and folder is None:
        if not optional:
            raise typer.BadParameter("--urls and --folder are both missing; give a URL list or a folder of images")
        return {}
    if folder is not None:
        check_image_folder(folder)
        return {"urls": None, "folder": folder}
    check_url_list(urls or [], allow_hosts, url_column=url_column, only_failed=only_failed)
    listed = urls[0] if urls and len(urls) == 1 else tuple(urls or ())
    return {"urls": listed, "url_column": url_column, "only_failed": only_failed}
