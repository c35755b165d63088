"""The table of jobs: how many are kept, and in how many bytes."""

import pytest
from PIL import Image

from infra.errors import NotFoundError, StageError
from tasks.serve.service.jobs import Job, JobTable
from tasks.serve.service.requests import EditRequest, GenerateRequest, SearchRequest
from tasks.serve.service.responses import ImagesResponse, MadeImage, SearchResponse, ServedVersion

SERVED = ServedVersion(name="birds", version=1, rows=9, generation=0)
IMAGE_BYTES, PNG_BYTES = 10 * 10 * 4, 100  # Pillow stores RGB in four bytes


def edit(table: JobTable) -> Job:
    return table.add(Job(EditRequest(image=Image.new("RGB", (10, 10)), prompt="red")))


def finish(job: Job) -> None:
    made = MadeImage(png=bytes(PNG_BYTES), seed=1, neighbours=[])
    job.finish(ImagesResponse(model="m", database=SERVED, kind="edit", settings={}, images=[made]))


def kept(table: JobTable, *jobs: Job) -> list[bool]:
    names = {job.id for job in table.recent()}
    return [job.id in names for job in jobs]


def test_table_deletes_jobs_that_finished_first_beyond_its_bytes() -> None:
    table = JobTable(max_bytes=2 * (IMAGE_BYTES + PNG_BYTES))
    first, second, third, running = (edit(table) for _ in range(4))
    for job in (second, first):
        finish(job)
    assert kept(table, first, second, third, running) == [True] * 4
    finish(third)
    assert kept(table, first, second, third, running) == [True, False, True, True]
    with pytest.raises(NotFoundError, match="may have expired"):
        table.get(second.id)
    running.fail(StageError("no memory"))  # its image counts as well
    assert kept(table, first, third, running) == [False, True, True]


def test_table_keeps_the_job_that_has_just_finished_whatever_its_size() -> None:
    table = JobTable(max_bytes=1)
    for _ in range(2):
        finish(job := edit(table))
        assert table.recent() == [job]


def test_searches_take_no_bytes_and_are_kept() -> None:
    table = JobTable(max_bytes=1)
    search = table.add(Job(SearchRequest(image=Image.new("RGB", (10, 10)))))
    search.finish(SearchResponse(model="m", database=SERVED, encoder="e", settings={}, hits=[]))
    edits = [edit(table) for _ in range(2)]
    for job in edits:
        finish(job)
    assert kept(table, search, *edits) == [True, False, True]


def test_table_keeps_the_latest_jobs_of_each_kind() -> None:
    table = JobTable(size=2)
    edits = [edit(table) for _ in range(2)]
    drawn = [table.add(Job(GenerateRequest(prompt="red"))) for _ in range(4)]
    assert kept(table, *edits, *drawn) == [True] * 6, "none is finished"
    for job in drawn:
        finish(job)
    drawn.append(table.add(Job(GenerateRequest(prompt="red"))))
    assert kept(table, *edits, *drawn) == [True, True, False, False, False, True, True]
