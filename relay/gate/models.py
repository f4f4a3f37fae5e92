"""RELAY_MODELS: which models a request may ask for, wherever it names one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote

from relay import errors
from relay.llm.asked import names_models

if TYPE_CHECKING:
    from relay.llm.asked import Asked

#: Where APIs have a model in the path: Azure's deployments, Gemini's and Vertex AI's models, Bedrock's model.
_IN_PATH = re.compile(r"(?:^|/)(?:deployments|engines|models|tunedmodels|model)/+([^/:]+)", re.IGNORECASE)
#: Methods that make something. Others may name no model, such as a GET of the list of models.
_MAKING = frozenset(["POST", "PUT", "PATCH"])
_ANOTHER = "the model is not among those that this relay serves (RELAY_MODELS)"


def check_models(models: Collection[str], method: str, path: str, query: str | None, asked: Asked) -> None:
    """Refuse a request that names another model than these, or, if it makes something, none that can be found.

    `path` is raw, below the mount; `query` is raw. Raises Forbidden.
    """
    elsewhere = list(_named(method, path, query))
    if asked.fault is not None and not (asked.opaque and elsewhere):
        raise _refusal(
            f"the body {asked.fault}, so that the relay cannot tell which model it asks for (RELAY_MODELS); "
            "send plain JSON in UTF-8, or a plain form, that names its model"
        )
    named = elsewhere + asked.models
    if not all(_among(model, models) for model in named):
        raise _refusal(_ANOTHER)
    if method in _MAKING and not named:
        raise _refusal(
            "the request names no model, and this relay serves only some (RELAY_MODELS); "
            "name one in the body, the path or the query"
        )


def check_named(model: str, models: Collection[str]) -> None:
    """Refuse another model than these. Raises Forbidden."""
    if model not in models:
        raise _refusal(_ANOTHER)


def _named(method: str, path: str, query: str | None) -> Iterable[str]:
    """The models that path and query name. A name in the path of a GET is only looked up."""
    if method in _MAKING:
        yield from _IN_PATH.findall(unquote(path))
    for name, value in parse_qsl((query or "").replace(";", "&"), keep_blank_values=True):
        if names_models(name):
            yield value


def _among(model: str, models: Collection[str]) -> bool:
    return model in models or (model.startswith("models/") and model[len("models/") :] in models)  # Gemini's


def _refusal(message: str) -> errors.Forbidden:
    return errors.Forbidden(message, code="model_not_allowed")
