"""Client of demur: how much a language model does not know what it is saying, token by token.

from demur import Client

with Client("http://localhost:8000") as client:
    score = client.score(" Tokyo.", prompt="The capital of Japan is")
    for token in score.tokens:
        print(token.token, token.epistemic)
    print(score.heatmap())
"""

from demur.async_client import AsyncClient
from demur.chat_stream import AsyncChatStream, ChatStream
from demur.chat_types import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChoiceUncertainty,
    Delta,
    LogprobEntry,
    TopLogprob,
    Uncertainty,
)
from demur.client import Client
from demur.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    DemurError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    ServerError,
    StreamError,
)
from demur.heatmap import HeatMap
from demur.params import ScoreItem, UncertaintyStop
from demur.types import (
    Calibration,
    Draft,
    Drafts,
    Estimator,
    Model,
    Score,
    ScoreWarning,
    Span,
    Token,
    Usage,
)

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncChatStream",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "Calibration",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatLogprobs",
    "ChatMessage",
    "ChatStream",
    "ChoiceUncertainty",
    "Client",
    "Delta",
    "DemurError",
    "Draft",
    "Drafts",
    "Estimator",
    "HeatMap",
    "LogprobEntry",
    "Model",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestTooLargeError",
    "Score",
    "ScoreItem",
    "ScoreWarning",
    "ServerError",
    "Span",
    "StreamError",
    "Token",
    "TopLogprob",
    "Uncertainty",
    "UncertaintyStop",
    "Usage",
]
