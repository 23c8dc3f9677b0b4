"""The connection to the job server, without one."""

from __future__ import annotations

import pytest

from mal.client import server
from mal.client.server import JobServer
from mal.errors import ClusterError


class Young:
    """A client of a head whose agent comes after some attempts."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals

    def submit_job(self, **job: str) -> str:
        self.refusals -= 1
        if self.refusals >= 0:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job")
        return job["submission_id"]


def _server(client: Young) -> JobServer:
    made = object.__new__(JobServer)
    made.address, made._client = "http://head:8265", client
    return made


def test_a_head_that_has_just_started_is_waited_for(monkeypatch):
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    assert _server(Young(3)).submit(submission_id="x") == "x"


def test_but_not_for_ever_and_the_reason_is_said_once(monkeypatch):
    monkeypatch.setattr(server, "_AGENT_SECONDS", -1.0)
    with pytest.raises(ClusterError) as caught:
        _server(Young(3)).submit(submission_id="x")
    assert str(caught.value).count("No available agent") == 1
