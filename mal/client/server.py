"""The connection to a Ray cluster's job server, with every failure as a `ClusterError` that says what to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mal.errors import ClusterError

T = TypeVar("T")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_AGENT_SECONDS = 60.0
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def server_address(given: str | None) -> str:
    """The job server's URL: ``--address``, else what the environment names, else this machine's default port."""
    address = given or next((os.environ[name] for name in _ADDRESS_VARIABLES if os.environ.get(name)), DEFAULT_ADDRESS)
    if "://" not in address:
        address = f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address}: a job server is reached by http:// or https://, by default at port 8265 of the head node"
        )
    return address.rstrip("/")


class JobServer:
    """Ray's `JobSubmissionClient`, its methods as they are but for the errors."""

    def __init__(self, address: str | None = None) -> None:
        self.address = server_address(address)
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        # Ray's client would prefer the environment's address to the one it is given.
        with _environment({"RAY_API_SERVER_ADDRESS": self.address}):
            self._client: Any = self._explained(lambda: JobSubmissionClient(self.address))

    def submit(self, **job: Any) -> str:
        """Submit a job; returns its submission id. ``job``: as for `JobSubmissionClient.submit_job`.

        A head that has only just started has no agent yet that could take the job: that is waited for.
        """
        deadline = time.monotonic() + _AGENT_SECONDS
        while True:
            try:
                return self._explained(lambda: self._client.submit_job(**job))
            except ClusterError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def submissions(self) -> list[Any]:
        """Details of every submission that the server knows (`ray.job_submission.JobDetails`)."""
        return [job for job in self._explained(self._client.list_jobs) if job.submission_id]

    def details(self, submission: str) -> Any:
        """Details of one submission."""
        return self._explained(lambda: self._client.get_job_info(submission))

    def stop(self, submission: str) -> bool:
        """Ask a submission to stop; whether it was running."""
        return self._explained(lambda: self._client.stop_job(submission))

    def delete(self, submission: str) -> None:
        """Delete the server's record of a submission that has ended."""
        self._explained(lambda: self._client.delete_job(submission))

    def logs(self, submission: str) -> str:
        """All that a submission has written so far."""
        return self._explained(lambda: self._client.get_job_logs(submission))

    def follow(self, submission: str) -> Iterator[str]:
        """The lines that a submission writes, from the first on, until it ends."""
        rest = ""
        with asyncio.Runner() as runner:
            chunks = self._client.tail_job_logs(submission)
            while (chunk := self._explained(lambda: runner.run(_next(chunks)))) is not None:
                *lines, rest = (rest + chunk).split("\n")
                yield from lines
        if rest:
            yield rest

    def _explained(self, call: Callable[[], T]) -> T:
        """The result of ``call``, or a ClusterError."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return call()
        except AuthenticationError as error:
            raise ClusterError(
                f"{self.address}: this cluster wants a token, and {_token_state()}. Set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN_PATH to the file with the cluster's token (`ray get-auth-token` on its head shows it)"
            ) from error
        except (ConnectionError, requests.exceptions.RequestException, aiohttp.ClientError, OSError) as error:
            raise ClusterError(
                f"{self.address}: no job server answers there ({type(error).__name__}). Check --address (or "
                "RAY_ADDRESS) and that the head node's port 8265 can be reached, for instance by "
                "`ssh -L 8265:localhost:8265 HEAD`"
            ) from error
        except (RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            reason = " ".join(dict.fromkeys((lines[0], lines[-1])))  # the first says what, the last of a trace why
            raise ClusterError(f"{self.address}: the job server refuses: {reason}"[:600]) from error


async def _next(chunks: Any) -> str | None:
    """The next chunk of an asynchronous iterator, None at its end."""
    async for chunk in chunks:
        return str(chunk)
    return None


def _token_state() -> str:
    """What this process sends, without showing it."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "RAY_AUTH_MODE is not `token` here, so none is sent"
    return "the one that is sent is missing or wrong"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables of this process for the length of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
