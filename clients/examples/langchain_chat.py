"""LangChain's ChatOpenAI against demur: each token's uncertainty is in the response metadata.

pip install langchain-openai
python clients/examples/langchain_chat.py "What is the capital of Japan?"
"""

import os
import sys

from langchain_openai import ChatOpenAI

url = os.environ.get("DEMUR_BASE_URL", "http://127.0.0.1:8000")
question = sys.argv[1] if len(sys.argv) > 1 else "What is the capital of Japan?"

chat = ChatOpenAI(
    base_url=f"{url}/v1",
    api_key=os.environ.get("DEMUR_API_KEY", "none"),
    model=os.environ.get("DEMUR_MODEL", "smollm2-135m-instruct"),
    temperature=0,
    max_tokens=40,
    logprobs=True,
    extra_body={"uncertainty": True},
)


def show(logprobs: dict | None) -> None:
    for entry in (logprobs or {}).get("content", []):
        print(f"{entry['token']!r:16} epistemic {entry['uncertainty']['epistemic']:.3f} nats")


answer = chat.invoke(question)
print(answer.content)
show(answer.response_metadata["logprobs"])

print("streamed:")
for chunk in chat.stream(question):
    show(chunk.response_metadata.get("logprobs"))
