"""A generation request as it travels: frozen, strict, and refused rather than guessed at."""

import hashlib
import json
import re
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from schemas import strict_json
from schemas.errors import ErrorCode
from schemas.fields import (
    PROMPT_ERROR,
    JobId,
    Metadata,
    NegativePrompt,
    ObjectKey,
    Prompt,
    Scale,
    Sha256,
    Side,
    Text,
    Time,
    Url,
    refuse,
)
from schemas.redact import without_query

VERSION = 1
MAX_PAYLOAD_BYTES = 64 * 1024
MAX_LORAS = 4

_METADATA: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(Metadata, config=ConfigDict(hide_input_in_errors=True))
_FIELD_NAME = re.compile(r"[A-Za-z_]{1,32}[0-9]{0,3}")


class RequestError(ValueError):
    """A request that does not fit the contract.

    `code` is INVALID_REQUEST or INVALID_PROMPT; `details["problems"]` lists `{field, problem}`, never the input.
    """

    def __init__(self, code: ErrorCode, message: str, problems: list[dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.details: dict[str, Any] = {"problems": problems} if problems else {}

    @classmethod
    def from_validation(cls, error: ValidationError) -> Self:
        """One sentence and a list from pydantic's report; INVALID_PROMPT only where nothing else is wrong."""
        reports = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [
            {"field": ".".join(map(_shown, report["loc"])) or "request", "problem": report["msg"]}
            for report in reports[:20]
        ]
        only_prompt = all(report["type"] == PROMPT_ERROR for report in reports)
        code = ErrorCode.INVALID_PROMPT if only_prompt else ErrorCode.INVALID_REQUEST
        return cls(code, "; ".join(f"{problem['field']}: {problem['problem']}" for problem in problems[:3]), problems)


def _shown(part: int | str) -> str:
    # An unknown field is named to whoever mistyped it, unless its name looks like anything but a name.
    return str(part) if isinstance(part, int) or _FIELD_NAME.fullmatch(part) else "?"


class _Wire(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        hide_input_in_errors=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class LoraRef(_Wire):
    """One LoRA of a request: where its file is, and how strongly it is applied."""

    url: Url | None = None
    key: ObjectKey | None = None
    scale: Scale = 1.0
    version: Text | None = None
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.url is None) == (self.key is None):
            raise refuse("lora_source", "needs either a url or a key")
        return self

    @property
    def source(self) -> str:
        """What names the object, with nothing in it that signs: the URL without its query, or the key."""
        return self.key if self.key is not None else without_query(self.url or "")

    @property
    def name(self) -> str:
        """The last part of the object's path, for people."""
        return self.source.rsplit("/", 1)[-1]


class GenerationRequest(_Wire):
    """One picture to make, version 1 of the contract."""

    v: Annotated[int, Field(ge=VERSION, le=VERSION)] = VERSION
    job_id: JobId
    prompt: Prompt
    negative_prompt: NegativePrompt = ""
    lora_url: Url | None = None
    lora_key: ObjectKey | None = None
    lora_scale: Scale = 1.0
    lora_version: Text | None = None
    lora_sha256: Sha256 | None = None
    loras: Annotated[tuple[LoraRef, ...], Field(max_length=MAX_LORAS, strict=False)] = ()
    width: Side = 1024
    height: Side = 1024
    steps: Annotated[int, Field(ge=20, le=50)] = 28
    cfg: Annotated[float, Field(ge=1.0, le=20.0)] = 5.5
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    timeout: Annotated[int, Field(ge=1, le=300)] = 60
    expires_at: Time | None = None
    tenant: Text | None = None
    output_key: ObjectKey | None = None
    upload_url: Url | None = None
    webhook_url: Url | None = None
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_exclusions(self) -> Self:
        if self.lora_url is not None and self.lora_key is not None:
            raise refuse("exclusive", "lora_url excludes lora_key")
        if self.loras and (self.lora_url is not None or self.lora_key is not None):
            raise refuse("exclusive", "loras excludes lora_url and lora_key")
        if self.upload_url is not None and self.output_key is not None:
            raise refuse("exclusive", "upload_url excludes output_key")
        sources = [lora.source for lora in self.loras]
        if len(set(sources)) != len(sources):
            raise refuse("loras", "loras names the same LoRA twice")
        return self

    @property
    def lora_refs(self) -> tuple[LoraRef, ...]:
        """The LoRAs to apply, in order, whichever way they were written."""
        if self.lora_url is None and self.lora_key is None:
            return self.loras
        return (
            LoraRef(
                url=self.lora_url,
                key=self.lora_key,
                scale=self.lora_scale,
                version=self.lora_version,
                sha256=self.lora_sha256,
            ),
        )

    @property
    def effective_seed(self) -> int:
        """The seed, or the first 32 bits of SHA-256(`job_id`), so that a rerun draws the same picture."""
        if self.seed is not None:
            return self.seed
        return int.from_bytes(hashlib.sha256(self.job_id.encode()).digest()[:4], "big")

    @property
    def image_key(self) -> str:
        """The object key of the PNG in the project's own bucket."""
        return self.output_key or f"images/{self.job_id}.png"

    def redacted(self) -> "GenerationRequest":
        """The same request without any URL's query: fit to be kept after the job's end."""

        def clean(url: str | None) -> str | None:
            return None if url is None else without_query(url)

        return self.model_copy(
            update={
                "lora_url": clean(self.lora_url),
                "upload_url": clean(self.upload_url),
                "webhook_url": clean(self.webhook_url),
                "loras": tuple(lora.model_copy(update={"url": clean(lora.url)}) for lora in self.loras),
            }
        )

    def fingerprint(self) -> str:
        """SHA-256 in hex over the request without its URLs' queries: equal for the same job signed afresh."""
        body = json.dumps(self.redacted().model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest()

    def encode(self) -> bytes:
        """The `payload` of a stream entry."""
        return self.model_dump_json(exclude_defaults=True).encode()


def decode_request(payload: bytes) -> GenerationRequest:
    """Parses the `payload` of a stream entry.

    Raises RequestError for everything that the contract refuses.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise RequestError(ErrorCode.INVALID_REQUEST, f"the payload is larger than {MAX_PAYLOAD_BYTES} bytes")
    try:
        strict_json.loads(payload)
        return GenerationRequest.model_validate_json(payload)
    except strict_json.StrictJsonError as error:
        raise RequestError(ErrorCode.INVALID_REQUEST, str(error)) from None
    except ValidationError as error:
        raise RequestError.from_validation(error) from None


def metadata_of(payload: bytes) -> dict[str, JsonValue]:
    """The metadata of a payload that was refused for something else: what its events echo. {} where it cannot be."""
    try:
        value = strict_json.loads(payload[: MAX_PAYLOAD_BYTES + 1])
        return _METADATA.validate_python(value["metadata"])
    except (strict_json.StrictJsonError, ValidationError, TypeError, KeyError):
        return {}
