"""Who may call: whoever has the token."""

import secrets
from typing import Annotated

from fastapi import Depends, Header
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from producer.gateway.errors import GatewayError, GatewayErrorCode

_BEARER = HTTPBearer(auto_error=False, description="The value of MODAL_API_TOKEN.")

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
Origin = Annotated[str | None, Header(include_in_schema=False)]


class Access:
    """A dependency that raises GatewayError unless the call has the token. Without a token nobody gets in.

    `everybody`: everybody does, but for pages in a browser, which may be anybody's and name their origin.
    """

    def __init__(self, token: SecretStr | None, *, everybody: bool) -> None:
        self._token = None if token is None else token.get_secret_value().encode()
        self._everybody = everybody and token is None

    async def __call__(self, credentials: Credentials, origin: Origin = None) -> None:
        if self._everybody and origin is None:
            return
        given = b"" if credentials is None else credentials.credentials.encode("latin-1")  # as it was sent
        if self._token is None or not secrets.compare_digest(given, self._token):
            raise GatewayError(GatewayErrorCode.UNAUTHORIZED, "this needs the header Authorization: Bearer <token>")
