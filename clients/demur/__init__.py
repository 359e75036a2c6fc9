"""Client of demur: how much a language model does not know what it is saying, token by token.

from demur import Client

with Client("http://localhost:8000") as client:
    score = client.score(prompt="The capital of Japan is", response=" Tokyo.")
    for token in score.tokens:
        print(token.token, token.epistemic)
"""

from demur.client import Client
from demur.errors import (
    APIConnectionError,
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    DemurError,
    NotFoundError,
    RateLimitError,
    RequestTooLargeError,
    ServerError,
)
from demur.types import Estimator, Score, Span, Token, Usage

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "AuthenticationError",
    "BadRequestError",
    "Client",
    "DemurError",
    "Estimator",
    "NotFoundError",
    "RateLimitError",
    "RequestTooLargeError",
    "Score",
    "ServerError",
    "Span",
    "Token",
    "Usage",
]
