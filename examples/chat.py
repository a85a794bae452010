"""Chat with OpenAI's client: an answer as it is written.

Beside a running server, with `pip install openai`: python examples/chat.py
"""

from __future__ import annotations

import os

from openai import OpenAI

url = os.environ.get("DURE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="none")  # the client insists on a key, Dure asks for none
chunks = client.chat.completions.create(
    model="chat",
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    max_tokens=40,
    temperature=0,
    stream=True,
)
for chunk in chunks:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
