"""Who asks, and what they may: a request's bearer token against the service's tokens."""

from starlette.exceptions import HTTPException
from starlette.requests import Request

from logitstore.errors import ConfigError
from logitstore.service.tokens import EVERYTHING, Grant, TokenFile


class Access:
    """What requests may do.

    Args:
        tokens: None where everything is open to all who can reach the service.
        read_only: nobody may upload or have the teacher teach.
    """

    def __init__(self, tokens: TokenFile | None, *, read_only: bool = False) -> None:
        self.tokens = tokens
        self.read_only = read_only

    def grant(self, request: Request) -> Grant:
        """What the request's token allows.

        Raises:
            HTTPException: 401, there is no token, or one that is unknown or revoked; 503, nobody can tell.
        """
        if self.tokens is None:
            return EVERYTHING
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        try:
            found = self.tokens.grant(token.strip()) if kind.lower() == "bearer" else None
        except ConfigError as error:  # where the file is concerns nobody outside
            raise HTTPException(503, "the service cannot read its tokens; tell whoever runs it") from error
        if found is None:
            detail = (
                "this token is unknown or revoked; ask whoever runs the service for another"
                if token
                else "a token is needed; set LOGITSTORE_TOKEN, or send Authorization: Bearer TOKEN"
            )
            raise HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})
        request.state.token = found.id
        return found

    def require(self, request: Request, scope: str, store: str | None = None) -> Grant:
        """The same, of a token that covers a scope, of a store if one is named.

        Raises:
            HTTPException: 401, 503; or 403, it does not.
        """
        grant = self.grant(request)
        if not grant.allows(scope, store):
            what = scope if store is None else f"{scope} {store}"
            raise HTTPException(
                403, f"this token does not allow to {what}; ask whoever runs the service for one with --scope {scope}"
            )
        if self.read_only and scope != "read":
            raise HTTPException(403, "this service only reads; it was started with --read-only")
        return grant
