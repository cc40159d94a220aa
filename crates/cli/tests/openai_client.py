"""Asks a cluster for everything that the official OpenAI client can ask it for.

The only argument is JSON: where the cluster is, its key, a question, and what the answer must be.
"""

import json
import math
import sys

import openai

given = json.loads(sys.argv[1])
client = openai.OpenAI(base_url=given["base_url"], api_key=given["key"], max_retries=0)
messages = [{"role": "user", "content": given["prompt"]}]
greedy = {"model": "abacus", "temperature": 0, "max_tokens": given["max_tokens"]}


def check_usage(usage):
    assert usage.prompt_tokens == len(given["tokens"]), usage
    assert usage.completion_tokens == given["completion_tokens"], usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage


def check_logprobs(found):
    assert len(found) == len(given["logprobs"]), found
    for a, b in zip(found, given["logprobs"]):
        assert math.isclose(a, b, abs_tol=1e-4), (found, given["logprobs"])


def models():
    listed = client.models.list().data
    assert [model.id for model in listed] == ["abacus"], listed
    assert client.models.retrieve("abacus").owned_by == "brigade"


def chat():
    reply = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=3, **greedy)
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", given["text"]), reply
    assert (reply.object, reply.model, choice.finish_reason) == ("chat.completion", "abacus", "stop"), reply
    check_usage(reply.usage)
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == given["text"], tokens
    assert all(len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token for token in tokens)
    check_logprobs([token.logprob for token in tokens])


def chat_stream():
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(messages=messages, stream=True, stream_options=options, **greedy))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    check_usage(chunks[-1].usage)
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == given["text"], chunks
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"], chunks


def chat_stream_helper():
    with client.chat.completions.stream(messages=messages, **greedy) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == given["text"], final


def chat_options():
    text = given["text"]
    stop = text[len(text) // 2]
    reply = client.chat.completions.create(messages=messages, stop=[stop], **greedy)
    assert reply.choices[0].message.content == text[: text.index(stop)], reply
    assert reply.choices[0].finish_reason == "stop"
    reply = client.chat.completions.create(messages=messages, model="default", temperature=0, max_completion_tokens=2)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 2), reply
    hot = {"messages": messages, "model": "default", "temperature": 1.5, "seed": 7, "max_tokens": 20}
    first, second = (client.chat.completions.create(**hot).choices[0].message.content for _ in range(2))
    assert first == second, "a seed makes an answer repeatable"
    parts = [{"role": "user", "content": [{"type": "text", "text": given["prompt"]}]}]
    assert client.chat.completions.create(messages=parts, **greedy).choices[0].message.content == text


def completions():
    for prompt in given["rendered"], given["tokens"]:
        reply = client.completions.create(prompt=prompt, logprobs=2, **greedy)
        choice = reply.choices[0]
        assert (reply.object, choice.text, choice.finish_reason) == ("text_completion", given["text"], "stop"), reply
        check_usage(reply.usage)
        check_logprobs(choice.logprobs.token_logprobs)
        assert choice.logprobs.text_offset[0] == 0 and len(choice.logprobs.top_logprobs[0]) == 2
    chunks = list(client.completions.create(prompt=given["tokens"], stream=True, **greedy))
    assert "".join(chunk.choices[0].text for chunk in chunks) == given["text"], chunks


def hang_up():
    with client.chat.completions.create(messages=messages, stream=True, **greedy) as stream:
        next(iter(stream))


def refused(kind, call, **fields):
    try:
        call()
    except openai.APIStatusError as error:
        assert type(error) is kind, f"{type(error)}, not {kind}"
        for name, value in fields.items():
            assert getattr(error, name) == value, (name, error.body)
        return
    raise AssertionError(f"{kind} was not raised")


def errors():
    create = client.chat.completions.create
    stranger = client.with_options(api_key="wrong key")
    refused(openai.AuthenticationError, stranger.models.list, code="invalid_api_key")
    refused(openai.NotFoundError, lambda: create(messages=messages, model="gpt-4o"), code="model_not_found", param="model")
    refused(openai.NotFoundError, lambda: client.models.retrieve("gpt-4o"))
    embed = client.embeddings.create
    refused(openai.BadRequestError, lambda: embed(model="abacus", input="x"), code="unsupported_model", param="model")
    refused(openai.BadRequestError, lambda: create(messages=messages, n=2, **greedy), param="n")
    refused(openai.BadRequestError, lambda: create(messages=[], **greedy), param="messages")
    refused(openai.BadRequestError, lambda: create(messages=messages, extra_body={"no_such": 1}, **greedy))
    long = [{"role": "user", "content": "seven eight " * 600}]
    refused(openai.BadRequestError, lambda: create(messages=long, **greedy), code="context_length_exceeded")


for check in models, chat, chat_stream, chat_stream_helper, chat_options, completions, hang_up, errors:
    try:
        check()
    except Exception as error:
        raise SystemExit(f"{check.__name__}: {type(error).__name__}: {error}") from error
