"""`ClusterJobs`: the jobs of one Ray cluster, through the HTTP address of its dashboard.

`autotune.search.authentication.authenticate` comes first, before Ray is imported.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

import autotune
from autotune.cluster_jobs.best_folder import print_command, printed, unpack_best
from autotune.cluster_jobs.request import JobRequest
from autotune.errors import ClusterError, UsageError
from autotune.store.connect import mask_url

CONNECT_SECONDS = 10.0
STOP_SECONDS = 60
"""How long a stopped job may take to store its running trials. Ray's own 3 s would cut that off."""
FETCH_SECONDS = 180.0
CHECK_SECONDS = 180.0
CHECKS = ("python", "packages", "store", "output")
"""Those of `autotune doctor` that a head node without GPUs must pass as well."""

_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_ID = re.compile(r"autotune-(?P<study>.+)-(?P<number>\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A study's job as Ray has it. Times are aware and in UTC."""

    id: str
    study: str
    number: int
    """1, 2, … within its study."""
    state: str
    """Ray's word in lower case: pending, running, succeeded, failed or stopped."""
    started_at: datetime | None
    ended_at: datetime | None
    driver_exit_code: int | None
    """That of `autotune tune`; None while it runs and where the job was stopped."""
    message: str
    """One line: what Ray says, or what the driver said last where it failed."""
    store: str
    """The store's URL, which holds no password."""
    out: str
    """Folder of the best files and logs on the cluster."""
    page: str
    """Its page on Ray's dashboard, with its logs."""

    @property
    def active(self) -> bool:
        """It runs or waits to."""
        return self.state in ("pending", "running")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "id": self.id,
            "study": self.study,
            "state": self.state,
            "started_at": self.started_at and self.started_at.isoformat(),
            "ended_at": self.ended_at and self.ended_at.isoformat(),
            "driver_exit_code": self.driver_exit_code,
            "message": self.message,
            "store": self.store,
            "out": self.out,
            "page": self.page,
        }


class ClusterJobs:
    """The jobs of one Ray cluster.

    Every call raises `ClusterError` when the cluster cannot be reached or refuses us.
    """

    def __init__(self, address: str) -> None:
        """Connect to a dashboard.

        Args:
            address: such as `http://127.0.0.1:8265`.

        Raises:
            UsageError: the address is no HTTP one.
        """
        if not address.startswith(("http://", "https://")):
            raise UsageError(
                f"address {mask_url(address)!r}: jobs go through Ray's dashboard, whose address begins with http://,"
                " such as http://127.0.0.1:8265"
            )
        self.address = address.rstrip("/")
        for logger in _TALKATIVE:
            logging.getLogger(logger).setLevel(logging.ERROR)
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # wins over RAY_ADDRESS, which wins over the argument
        with self._reported():
            requests.get(f"{self.address}/api/version", timeout=CONNECT_SECONDS)  # Ray's client would wait for ever
            self._client = JobSubmissionClient(self.address)

    def submit(self, request: JobRequest) -> tuple[Job, list[str]]:
        """Submit a study as its next job, once the head node has been found fit for it.

        Returns:
            The job, and what to know of its store and folder, such as that one lies on a network file system.

        Raises:
            UsageError: its last job has not ended yet, or the cluster cannot use the store or the folder.
        """
        last = self.find(request.study)
        if last is not None and last.active:
            raise _busy(last)
        job_id = f"autotune-{request.study}-{1 if last is None else last.number + 1}"
        with tempfile.TemporaryDirectory(prefix="autotune-submit-") as working_dir:
            request.gather(Path(working_dir))
            environment: dict[str, Any] = {
                "working_dir": working_dir,
                "excludes": ["__pycache__"],
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
            }
            if not request.installed:
                environment["py_modules"] = [str(Path(autotune.__file__).parent)]
            warnings = self._check(request, environment)
            try:
                with self._reported():
                    self._client.submit_job(
                        entrypoint=request.entrypoint,
                        submission_id=job_id,
                        entrypoint_num_cpus=0,  # the trials need them all
                        runtime_env=environment,
                        metadata=request.metadata,
                    )
            except ClusterError:
                taken = self.find(job_id)
                if taken is None:
                    raise
                raise _busy(taken) from None  # someone else was quicker
        return self.get(job_id), warnings

    def _check(self, request: JobRequest, environment: dict[str, Any]) -> list[str]:
        """Have the head node examined by a short job, in the environment of the job to come; returns warnings.

        Raises:
            UsageError: the job could not run, use its store or write its folder there.
        """
        log = self._run_and_print(request.check, CHECK_SECONDS, {"autotune_check": request.study}, environment)
        documents = [line for line in log.splitlines() if line.startswith('{"checks"')]
        if not documents:
            words = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
            raise UsageError(
                f"the cluster cannot run Autotune ({mask_url(words[-1])[:300]}); install what it needs where the head"
                " node's `python` finds it, and see `autotune doctor` there"
            )
        checks = [check for check in json.loads(documents[-1])["checks"] if check["name"] in CHECKS]
        for check in checks:
            if check["status"] == "fail":
                raise UsageError(f"{check['found']}, as the cluster's head node sees it; {check['remedy']}")
        return [f"{check['found']}; {check['remedy']}" for check in checks if check["status"] == "warn"]

    def find(self, name: str) -> Job | None:
        """The job of that id, or the latest one of the study of that name."""
        jobs = self.jobs()
        exact = next((job for job in jobs if job.id == name), None)
        of_study = [job for job in jobs if job.study == name]
        return exact or max(of_study, key=lambda job: job.number, default=None)

    def get(self, name: str) -> Job:
        """The same.

        Raises:
            UsageError: there is none.
        """
        found = self.find(name)
        if found is None:
            studies = sorted({job.study for job in self.jobs()})
            known = f"it has jobs of {', '.join(studies)}" if studies else "it has no job of Autotune"
            raise UsageError(f"no job {name!r} on the Ray cluster at {self.address}; {known}")
        return found

    def jobs(self) -> list[Job]:
        """Every job of Autotune that the cluster remembers, in no order."""
        with self._reported():
            found = [_job(details, self.address) for details in self._client.list_jobs()]
        return [job for job in found if job is not None]

    def logs(self, job: Job) -> str:
        """What the job has printed so far."""
        with self._reported():
            return str(self._client.get_job_logs(job.id))

    def follow(self, job: Job) -> Iterator[str]:
        """What the job has printed, and prints until it ends: whole lines, several at a time."""
        chunks = self._client.tail_job_logs(job.id)

        async def following() -> str | None:
            return await anext(chunks, None)

        with asyncio.Runner() as runner:
            while True:
                with self._reported():
                    lines = runner.run(following())
                if lines is None:
                    return
                yield lines

    def stop(self, job: Job) -> Job:
        """Ask the job to stop, which stores its running trials as interrupted, and wait until it has ended.

        A job that has ended already is left as it is.
        """
        if job.active:
            with self._reported():
                self._client.stop_job(job.id)
            self._wait(job.id, STOP_SECONDS + 60)
        return self.get(job.id)

    def fetch(self, job: Job, out: Path) -> list[Path]:
        """Bring the job's best folder to `out/best`, which is replaced as a whole, and its report, if there is one.

        A short job of its own packs the folder and prints it.

        Returns:
            The files.

        Raises:
            UsageError: there is no such folder on the cluster yet, or `out` cannot be written.
        """
        log = self._run_and_print(print_command(job.out), FETCH_SECONDS, {"autotune_fetch": job.study})
        packed = printed(log)
        if packed is None:
            raise UsageError(
                f"{job.out}/best: is not on the cluster's head node; `autotune tune` writes it when the study ends with"
                f" an eligible trial, so see `autotune status {job.study}`"
            )
        return unpack_best(packed, f"{job.out}/best", out)

    def _run_and_print(
        self, command: str, seconds: float, metadata: dict[str, str], environment: dict[str, Any] | None = None
    ) -> str:
        """Run a command on the head node as a job of its own, which leaves no trace; returns what it printed."""
        with self._reported():
            job_id = self._client.submit_job(
                entrypoint=command, metadata=metadata, runtime_env=environment, entrypoint_num_cpus=0
            )
            try:
                self._wait(job_id, seconds)
                return str(self._client.get_job_logs(job_id))
            finally:
                with contextlib.suppress(RuntimeError):  # not ended: it stays in Ray's list
                    self._client.delete_job(job_id)

    def _wait(self, job_id: str, seconds: float) -> None:
        """Wait until a job has ended."""
        deadline = time.monotonic() + seconds
        with self._reported():
            while not self._client.get_job_status(job_id).is_terminal():
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"job {job_id} at {self.address} has not ended after {seconds:.0f} s; look at it on the"
                        " dashboard, and try again"
                    )
                time.sleep(0.5)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn what Ray's client raises into one sentence, without its tracebacks."""
        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                f"the Ray cluster at {self.address} {_refusal(str(error))}; put its token into RAY_AUTH_TOKEN, into a"
                " file that RAY_AUTH_TOKEN_PATH names, or into ~/.ray/auth_token"
            ) from None
        except (RuntimeError, OSError, aiohttp.ClientError) as error:  # the errors of requests are OSErrors
            raise ClusterError(
                f"the Ray dashboard at {self.address} does not serve us ({_reason(error)}); check --address, and the"
                " port forwarding if there is one"
            ) from None


def _refusal(text: str) -> str:
    if text.startswith("Authentication required"):
        return "asks for a token"
    if text.startswith("Authentication failed"):
        return "refused our token"
    return f"needs a token, and ours cannot be read ({text.split('. ')[0]})"


def _reason(error: Exception) -> str:
    if isinstance(error, requests.Timeout | requests.ConnectionError | ConnectionError):
        return "nothing answers there"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return mask_url(lines[-1])[:300] if lines else type(error).__name__


def _job(details: Any, address: str) -> Job | None:
    """A job of ours; None for any other."""
    match = _ID.fullmatch(details.submission_id or "")
    metadata = details.metadata or {}
    if match is None or not {"store", "out"} <= metadata.keys():
        return None
    lines = [line.strip() for line in (details.message or "").splitlines() if line.strip()] or [""]
    return Job(
        id=details.submission_id,
        study=match["study"],
        number=int(match["number"]),
        state=str(details.status.value).lower(),
        started_at=_time(details.start_time),
        ended_at=_time(details.end_time),
        driver_exit_code=details.driver_exit_code,
        message=mask_url(lines[-1])[:300],
        store=metadata["store"],
        out=metadata["out"],
        page=f"{address}/#/jobs/{details.submission_id}",
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _busy(job: Job) -> UsageError:
    return UsageError(
        f"study {job.study!r} has job {job.id}, which is {job.state}; watch it with `autotune status {job.study}`, or"
        f" end it with `autotune stop {job.study}` and submit again"
    )
