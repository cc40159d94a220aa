"""Asks a cluster that embeds texts for all that the official OpenAI client can ask it for.

The only argument is JSON: where the cluster is, texts and their tokens, and what the vectors must be.
"""

import base64
import json
import struct
import sys

import openai

given = json.loads(sys.argv[1])
base = given["base_url"].removesuffix("/v1")
client = openai.OpenAI(base_url=given["base_url"], api_key="none", max_retries=0)


def single(vector):
    """What of a vector is left in 32 bits."""
    return [struct.unpack("<f", struct.pack("<f", value))[0] for value in vector]


def check_reply(reply):
    assert (reply.object, reply.model) == ("list", "abacus"), reply
    assert [item.index for item in reply.data] == list(range(len(given["texts"])))
    n_tokens = sum(map(len, given["tokens"]))
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (n_tokens, n_tokens), reply.usage
    trace = client.get(base + "/debug/requests/" + reply._request_id, cast_to=object)
    assert (trace["texts"], trace["prompt_tokens"]) == (len(given["texts"]), n_tokens), trace


def texts():
    # The client asks for Base64 where nobody says otherwise, and decodes it.
    reply = client.embeddings.create(model="abacus", input=given["texts"])
    check_reply(reply)
    assert [single(item.embedding) for item in reply.data] == [single(vector) for vector in given["vectors"]]


def numbers():
    reply = client.embeddings.create(model="abacus", input=given["texts"], encoding_format="float")
    check_reply(reply)
    assert [single(item.embedding) for item in reply.data] == [single(vector) for vector in given["vectors"]]


def tokens():
    reply = client.embeddings.create(model="abacus", input=given["tokens"], encoding_format="base64")
    check_reply(reply)
    decoded = [base64.b64decode(item.embedding) for item in reply.data]
    packed = [struct.pack(f"<{len(vector)}f", *vector) for vector in given["vectors"]]
    assert decoded == packed


def dimensions():
    vector = client.embeddings.create(model="abacus", input=given["texts"][0], dimensions=16).data[0].embedding
    assert len(vector) == 16 and abs(sum(value * value for value in vector) - 1) < 1e-6, vector


def errors():
    def refused(call, **fields):
        try:
            call()
        except openai.BadRequestError as error:
            for name, value in fields.items():
                assert getattr(error, name) == value, (name, error.body)
            return
        raise AssertionError("nothing was refused")

    refused(lambda: client.embeddings.create(model="abacus", input=[]), param="input")
    refused(lambda: client.embeddings.create(model="abacus", input="x", dimensions=99999), param="dimensions")
    chat = [{"role": "user", "content": "hi"}]
    refused(lambda: client.chat.completions.create(model="abacus", messages=chat), code="unsupported_model")


for check in texts, numbers, tokens, dimensions, errors:
    try:
        check()
    except Exception as error:
        raise SystemExit(f"{check.__name__}: {type(error).__name__}: {error}") from error
