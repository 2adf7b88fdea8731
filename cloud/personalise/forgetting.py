"""Erase all that the cloud holds of a device: rows, uploads, students, files of its jobs."""

from pathlib import Path

from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.students import Shelf
from isthmus.cloud.personalise.work_files import WorkFiles
from isthmus.cloud.store import devices, students


def forget_device(shelf: Shelf, work_dir: Path, device_id: str) -> bool:
    """Erase a device with its prototypes, jobs and students. Returns whether there was such a device.

    The server may be running. A job of the device that is under way ends at its next step. Working files on machines
    of other workers are removed by these workers. Blocking.
    """
    job_ids = [job.job_id for job in job_rows.listing(shelf.database, [device_id])]
    student_ids = [row.student_id for row in students.of_device(shelf.database, device_id)]
    # The rows first: from here on nothing of the device can be reached or begun.
    known = devices.remove(shelf.database, device_id)
    for student_id in student_ids:
        shelf.artefacts.remove(student_id)
    for job_id in job_ids:
        WorkFiles(work_dir, shelf.artefacts).discard(job_id)
    shelf.database.forget_free_pages()
    return known
