"""OpenAI's own client against demur: an answer whole and streamed, each token with its doubt.

    pip install openai
    python clients/examples/openai_client.py "What is the capital of Japan?"

What demur adds to OpenAI's answers is read off the objects like any other field.
"""

import os
import sys

from openai import OpenAI

url = os.environ.get("DEMUR_BASE_URL", "http://127.0.0.1:8000")
question = sys.argv[1] if len(sys.argv) > 1 else "What is the capital of Japan?"

with OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("DEMUR_API_KEY", "none")) as client:
    asked = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 40,
        "temperature": 0,
        "extra_body": {"uncertainty": True},
    }

    choice = client.chat.completions.create(**asked).choices[0]
    for entry in choice.logprobs.content:
        print(f"{entry.token!r:16} epistemic {entry.uncertainty['epistemic']:.3f} nats")
    print("mean", choice.uncertainty["sequence"].get("epistemic_mean"))
    print("spans", [span["text"] for span in choice.uncertainty["spans"]])

    print("streamed:")
    for chunk in client.chat.completions.create(**asked, stream=True):
        (part,) = chunk.choices
        for entry in part.logprobs.content:
            print(f"{entry.token!r:16} epistemic {entry.uncertainty['epistemic']:.3f} nats")
        if part.finish_reason:  # the last chunk has what is said of the whole answer
            print("spans", [span["text"] for span in part.uncertainty["spans"]])
