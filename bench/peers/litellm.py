"""LiteLLM's proxy in front of the upstream: its configuration."""

from __future__ import annotations

_CONFIG = """\
model_list:
  - model_name: bench
    litellm_params:
      model: openai/bench
      api_base: {url}/v1
      api_key: sk-bench
litellm_settings:
  telemetry: false
  num_retries: 0
"""
#: Neither its price list nor its errors are fetched or sent anywhere, and nobody is asked for a key.
ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}


def config(url: str) -> str:
    return _CONFIG.format(url=url)
