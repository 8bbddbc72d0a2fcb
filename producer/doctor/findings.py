"""What a check finds, and how checks are kept apart from each other."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from redis.exceptions import NoPermissionError
from sqlalchemy.exc import SQLAlchemyError

from schemas.redact import redact_text


class Verdict(StrEnum):
    """`skipped`: nothing to look at, or not allowed to."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found, and a hint what to do. `out_of_reach`: the whole server did not answer."""

    area: str
    check: str
    verdict: Verdict
    found: str
    hint: str | None = None
    out_of_reach: bool = False


Check = Callable[[], Awaitable[Iterable[Finding]]]


async def isolated(area: str, name: str, check: Check, *, deadline_s: float) -> list[Finding]:
    """What `check` finds, without secrets. Whatever it raises becomes one finding under its name."""
    try:
        async with asyncio.timeout(deadline_s):
            findings = list(await check())
    except TimeoutError:
        findings = [Finding(area, name, Verdict.FAIL, f"no answer within {deadline_s:g} s")]
    except NoPermissionError:
        findings = [Finding(area, name, Verdict.SKIPPED, "this user may not ask (ACL)")]
    except Exception as error:
        findings = [Finding(area, name, Verdict.FAIL, told(error))]
    return [
        replace(finding, found=_plain(finding.found), hint=finding.hint and _plain(finding.hint))
        for finding in findings
    ]


def told(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, SQLAlchemyError):  # its text has the statement, and may have what stood in the URL
        return type(getattr(error, "orig", None) or error).__name__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _plain(text: str) -> str:
    return " ".join(redact_text(text).split())
