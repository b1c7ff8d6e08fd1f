"""Errors as OpenAI's clients expect them: ``{"error": {message, type, param, code}}`` with the right status.

Whatever goes wrong inside is logged (an unexpected error by the HTTP server, which sees it after its answer)
and told to the client in one sentence, never as a traceback.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    413: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer that is an error: the HTTP status, a sentence for a person, the parameter, a code."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, legible(message), code
        self.param = legible(param) if param else None

    def body(self) -> dict[str, Any]:
        """The JSON of this error in OpenAI's shape."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response of this error."""
        return JSONResponse(self.body(), status_code=self.status)


def legible(text: str) -> str:
    """What a client sent comes back in messages; half a surrogate pair in it could not be encoded."""
    return text.encode(errors="replace").decode()


def unsupported(param: str, remedy: str) -> PydanticCustomError:
    """A parameter that OpenAI knows and this server does not: raised inside request schemas."""
    return PydanticCustomError("unsupported_parameter", "{message}", {"message": remedy, "param": param})


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's errors as a 400 that names the parameter."""
    first = errors[0]
    context = first.get("ctx") or {}
    path = [str(part) for part in first["loc"] if part != "body"]
    param = context.get("param") or ".".join(path) or None
    match first["type"]:
        case "json_invalid":
            return ApiError(400, f"The body is not valid JSON: {context.get('error', first['msg'])}.")
        case "extra_forbidden":
            return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
        case "unsupported_parameter":
            return ApiError(400, first["msg"], param=param, code="unsupported_parameter")
        case "missing" if param is None:
            return ApiError(400, "The request has no JSON body.")
        case "missing":
            message = f"Missing required parameter: '{param}'."
            return ApiError(400, message, param=param, code="missing_required_parameter")
        case "model_attributes_type" | "dict_type" | "model_type" if param is None:
            return ApiError(400, "The body must be a JSON object sent as 'content-type: application/json'.")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"Invalid '{param}': {message}.", param=param, code="invalid_value")


def install_handlers(app: FastAPI) -> None:
    """Give every error of ``app`` the one shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return ApiError(error.status_code, message).response()

    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "The server failed on this request; its log says why.").response()
