"""`publish`: submits one request, or a file of them."""

from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, NamedTuple

import typer
from redis.exceptions import RedisError

from producer.async_client import AsyncGenerationClient
from producer.cli import output
from producer.cli.command import AsJson, BadUsage, Status, error_document, explain, open_client, parse_json, status_of
from producer.cli.wait import wait_for
from producer.errors import ProducerError, RequestRefused
from producer.jobs import Job
from producer.requests import RequestFields, make_request
from schemas import strict_json
from schemas.errors import ErrorCode
from schemas.keys import Priority
from schemas.requests import GenerationRequest

_BATCH = 100
_ONE_JOB_EACH = ("job_id", "output_key", "upload_url")

Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", show_default=False)]
File = Annotated[
    typer.FileBinaryRead | None,
    typer.Option(
        "--file",
        metavar="FILE",
        help="JSON lines, a request each ('-': stdin); the options are defaults for all of them.",
    ),
]
Negative = Annotated[str | None, typer.Option("--negative", help="What the picture should not show.")]
LoraUrl = Annotated[str | None, typer.Option(help="Presigned https URL of a .safetensors file.")]
LoraKey = Annotated[str | None, typer.Option(help="Object key of a LoRA in the own bucket.")]
LoraScale = Annotated[float | None, typer.Option(help="0.0 to 1.0.")]
LoraVersion = Annotated[str | None, typer.Option(help="Comes back in the event.")]
LoraSha256 = Annotated[str | None, typer.Option("--lora-sha256", help="What the file's digest must be, in hex.")]
Side = Annotated[int | None, typer.Option(help="512, 768, 1024, 1344 or 1536 pixels.")]
Steps = Annotated[int | None, typer.Option(help="20 to 50.")]
Cfg = Annotated[float | None, typer.Option(help="Guidance, 1.0 to 20.0.")]
Seed = Annotated[int | None, typer.Option(help="0 to 4294967295; default: from the job id.")]
Timeout = Annotated[int | None, typer.Option(help="Seconds of work that an attempt may take, 1 to 300.")]
ExpiresAt = Annotated[str | None, typer.Option(help="RFC 3339 time; a job that has not begun by then fails.")]
Tenant = Annotated[str | None, typer.Option(help="Whose job it is; kept with the job, and not used yet.")]
JobId = Annotated[str | None, typer.Option(help="Also the idempotency key; default: a new one.")]
OutputKey = Annotated[str | None, typer.Option(help="Object key of the PNG; default: images/JOB_ID.png.")]
UploadUrl = Annotated[str | None, typer.Option(help="Presigned PUT for the PNG.")]
WebhookUrl = Annotated[str | None, typer.Option(help="Where the listener delivers the job's terminal event.")]
Metadata = Annotated[str | None, typer.Option(metavar="JSON", help="An object that every event echoes.")]
Presign = Annotated[
    bool, typer.Option("--presign", help="Sign the LoRA's key: for consumers that cannot read the bucket themselves.")
]
TakesPriority = Annotated[Priority, typer.Option(help="Which jobs go first.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the pictures; with --json: lines, jobs first.")]


def publish(
    context: typer.Context,
    prompt: Prompt = None,
    file: File = None,
    negative_prompt: Negative = None,
    lora_url: LoraUrl = None,
    lora_key: LoraKey = None,
    lora_scale: LoraScale = None,
    lora_version: LoraVersion = None,
    lora_sha256: LoraSha256 = None,
    width: Side = None,
    height: Side = None,
    steps: Steps = None,
    cfg: Cfg = None,
    seed: Seed = None,
    timeout: Timeout = None,
    expires_at: ExpiresAt = None,
    tenant: Tenant = None,
    job_id: JobId = None,
    output_key: OutputKey = None,
    upload_url: UploadUrl = None,
    webhook_url: WebhookUrl = None,
    metadata: Metadata = None,
    presign: Presign = False,
    priority: TakesPriority = Priority.NORMAL,
    wait: Wait = False,
    as_json: AsJson = False,
) -> Coroutine[Any, Any, Status]:
    """Submit a request, or a file of them, and print the job ids."""
    # the options are named as the fields are
    fields = {
        name: context.params[name] for name in RequestFields.__annotations__ if context.params.get(name) is not None
    }
    return _publish(fields, file, presign=presign, priority=priority, wait=wait, as_json=as_json)


async def _publish(
    fields: dict[str, Any],
    file: Iterable[bytes] | None,
    *,
    presign: bool,
    priority: Priority,
    wait: bool,
    as_json: bool,
) -> Status:
    if "metadata" in fields:
        fields["metadata"] = parse_json(fields["metadata"], "--metadata")
    if (file is None) == ("prompt" not in fields):
        raise BadUsage("give either a prompt or a --file")
    requests = [make_request(fields)] if file is None else list(_read(file, fields))
    async with open_client() as client:
        outcomes, failure = await _submit(client, requests, priority, presign=presign)
        documents = [_document(outcome) for outcome in outcomes]
        if failure is not None:
            documents.append(_failure_document(failure))
        if as_json and (wait or file is None):
            for document in documents:
                output.print_json(document, lines=wait)
        elif as_json:
            output.print_json(documents)
        else:
            _show(outcomes, failure, numbered=file is not None)
        job_ids = [outcome.job_id for outcome in outcomes if isinstance(outcome, Job)]
        ends = [await wait_for(client, job_ids, timeout_s=None, as_json=as_json)] if wait and job_ids else []
    return max([Status.OK, *ends, *map(status_of, [*outcomes, failure and failure.error])])


class _Failure(NamedTuple):
    """Redis failed while these jobs were submitted: any of them may be queued."""

    error: RedisError
    job_ids: list[str]


async def _submit(
    client: AsyncGenerationClient,
    requests: Sequence[GenerationRequest | RequestRefused],
    priority: Priority,
    *,
    presign: bool,
) -> tuple[list[Job | ProducerError], _Failure | None]:
    """What became of the requests, in order, up to the batch at which Redis failed."""
    outcomes: list[Job | ProducerError] = []
    for start in range(0, len(requests), _BATCH):
        batch = requests[start : start + _BATCH]
        good = [request for request in batch if isinstance(request, GenerationRequest)]
        try:
            jobs = iter(await client.submit_many(good, priority=priority, presign=presign))
        except RedisError as error:
            return outcomes, _Failure(error, [request.job_id for request in good])
        outcomes += [next(jobs) if isinstance(request, GenerationRequest) else request for request in batch]
    return outcomes, None


def _read(file: Iterable[bytes], defaults: Mapping[str, Any]) -> Iterable[GenerationRequest | RequestRefused]:
    for name in _ONE_JOB_EACH:
        if name in defaults:
            raise BadUsage(f"--{name.replace('_', '-')} is one job's own: write it in the file")
    for line in filter(bytes.strip, file):
        try:
            fields = strict_json.loads(line)
            if not isinstance(fields, dict):
                raise strict_json.StrictJsonError("not a JSON object")
            yield make_request({**defaults, **fields})
        except strict_json.StrictJsonError as error:
            yield RequestRefused(str(error), error_code=ErrorCode.INVALID_REQUEST)
        except RequestRefused as error:
            yield error


def _document(outcome: Job | ProducerError) -> dict[str, Any]:
    return asdict(outcome) if isinstance(outcome, Job) else error_document(outcome)


def _failure_document(failure: _Failure) -> dict[str, Any]:
    return {"error": {**error_document(failure.error)["error"], "job_ids": failure.job_ids}}


def _show(outcomes: Sequence[Job | ProducerError], failure: _Failure | None, *, numbered: bool) -> None:
    console = output.stdout()
    for number, outcome in enumerate(outcomes, start=1):
        where = f"request {number}: " if numbered else ""
        if isinstance(outcome, ProducerError):
            output.complain(where + explain(outcome))
            continue
        console.print(outcome.job_id, soft_wrap=True)
        if outcome.duplicate:
            output.note(f"{where}{outcome.job_id} was there already: {outcome.state}")
    if failure is not None:
        rest = f", from request {len(outcomes) + 1} on" if numbered else ""
        again = "publish again with job_id" if numbered else "publish again with --job-id"
        output.complain(f"{explain(failure.error)}{rest}; may be queued ({again}): {' '.join(failure.job_ids)}")
