"""langchain-tests' integration suite for chat models, on langchain-openai, against the server of MAX_URL.

    MAX_URL=http://HOST:PORT/v1 pytest -c tests/clients/pytest.ini tests/clients/langchain_suite.py

in an environment with langchain-openai, langchain-tests, pytest-asyncio and pytest-socket.
"""

# pyright: reportMissingImports=false
import os
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestServedModel(ChatModelIntegrationTests):
    """What the suite asks of a model without tools, structured output, images and audio."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        url = os.environ["MAX_URL"]
        return {"model": "built-in", "base_url": url, "api_key": "none", "max_tokens": 40, "stream_usage": True}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_tool_choice(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_json_mode(self) -> bool:
        return False
