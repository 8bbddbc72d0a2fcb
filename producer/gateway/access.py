"""Who may call: whoever has the token."""

import secrets
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from producer.gateway.errors import GatewayError, GatewayErrorCode

_BEARER = HTTPBearer(auto_error=False, description="The value of MODAL_API_TOKEN.")

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]


class Access:
    """A dependency that raises GatewayError unless the call has the token. Without a token nobody gets in."""

    def __init__(self, token: SecretStr | None, *, everybody: bool) -> None:
        self._token = None if token is None else token.get_secret_value().encode()
        self._everybody = everybody and token is None

    async def __call__(self, credentials: Credentials) -> None:
        if self._everybody:
            return
        given = b"" if credentials is None else credentials.credentials.encode("latin-1")  # as it was sent
        if self._token is None or not secrets.compare_digest(given, self._token):
            raise GatewayError(GatewayErrorCode.UNAUTHORIZED, "this needs the header Authorization: Bearer <token>")
