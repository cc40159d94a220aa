"""Serves the embedded model on two nodes and talks to it through the official openai package.

    python openai_client_test.py PATH_TO_THE_PROGRAM

Starts a coordinator and a worker as processes of their own in a temporary folder, runs every `test_` function below,
and ends both. Prints one line for each test; the exit code tells whether all passed.
"""

import asyncio
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

import openai

# A node of the embedded model is ready within a second; this is for a machine that is busy otherwise.
START_TIMEOUT_S = 60
REQUEST_TIMEOUT_S = 60
KEY = "a-key-for-this-test"
MODEL = "abacus"
QUESTION = [{"role": "user", "content": "What is 2 plus 2?"}]
ANSWER = "2 plus 2 is 4."


class Cluster:
    """A coordinator and one worker, each with half of the model."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.processes = []
        self.url = None

    def run(self, program):
        ticket = self.folder / "ticket"
        common = ["--listen", "127.0.0.1:0", "--threads", "1"]
        serve = ["serve", "--nodes", "2", "--spread", "--port", "0", "--api-key", KEY, "--ticket-file", ticket]
        coordinator = self.start(program, "coordinator", [*serve, *common])
        self.wait_for(coordinator, "the ticket", lambda: ticket.exists() and ticket.read_text().strip())
        self.start(program, "worker", ["join", "--ticket-file", ticket, *common])
        self.url = self.wait_for(coordinator, "the ready line", self.ready_url)

    def start(self, program, name, args):
        out = open(self.folder / f"{name}.out", "wb")
        command = [program, *map(str, args), "--state-dir", str(self.folder / name)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        out.close()
        self.processes.append(process)
        return process

    def ready_url(self):
        lines = (self.folder / "coordinator.out").read_text().splitlines()
        return next((line.removeprefix("ready ") for line in lines if line.startswith("ready ")), None)

    def wait_for(self, process, what, condition):
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            if process.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemExit(f"{what} did not come:\n{self.output()}")

    def output(self):
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.out")))

    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def refusal(kind, request):
    """The error that `request` is answered with; fails if it is answered otherwise."""
    try:
        request()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def ask(client, **options):
    return client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, **options)


def test_models_are_listed(client, _url):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "brigade"


def test_a_chat_is_answered(client, _url):
    answer = ask(client)
    assert answer.choices[0].message.content == ANSWER, answer
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage.prompt_tokens > 0 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_says_the_same(client, _url):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER, text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == ask(client).usage.completion_tokens


def test_neighbours_change_nothing(_client, url):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, timeout=REQUEST_TIMEOUT_S) as client:
            asked = [client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0) for _ in range(8)]
            return await asyncio.gather(*asked)

    assert {answer.choices[0].message.content for answer in asyncio.run(ask_all())} == {ANSWER}


def test_the_same_seed_gives_the_same_text(client, _url):
    def draw(seed):
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Tell me a story."}], seed=seed, temperature=1.2,
            max_tokens=40,
        )
        return answer.choices[0].message.content

    assert draw(7) == draw(7)


def test_a_completion_takes_text_and_tokens(client, _url):
    plain = client.completions.create(model=MODEL, prompt="What is", max_tokens=5, temperature=0)
    assert plain.usage.completion_tokens <= 5 and plain.choices[0].finish_reason in ("length", "stop")
    tokens = client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=0, temperature=0)
    assert (tokens.usage.prompt_tokens, tokens.choices[0].text) == (3, "")


def test_stop_strings_end_an_answer(client, _url):
    answer = ask(client, stop=[" is"]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("2 plus 2", "stop")


def test_a_length_ends_an_answer(client, _url):
    answer = ask(client, max_completion_tokens=2)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 2)


def test_log_probabilities_are_told(client, _url):
    tokens = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.token == token.top_logprobs[0].token for token in tokens), "greedy takes the likeliest"


def test_strangers_are_refused(_client, url):
    with openai.OpenAI(base_url=url, api_key="another", max_retries=0, timeout=REQUEST_TIMEOUT_S) as stranger:
        assert refusal(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"


def test_another_model_is_not_found(client, _url):
    request = lambda: client.chat.completions.create(model="gpt-0", messages=QUESTION)
    assert refusal(openai.NotFoundError, request).code == "model_not_found"


def test_what_is_not_supported_is_refused_by_name(client, _url):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for param, value in [
        ("tools", [tool]),
        ("n", 2),
        ("response_format", {"type": "json_object"}),
        ("extra_body", {"no_such_field": 1}),
    ]:
        error = refusal(openai.BadRequestError, lambda: ask(client, **{param: value}))
        assert error.param == (param if param != "extra_body" else "no_such_field"), error


def test_a_prompt_beyond_the_context_is_refused(client, _url):
    request = lambda: client.completions.create(model=MODEL, prompt=[1] * 100_000)
    assert refusal(openai.BadRequestError, request).code == "context_length_exceeded"


def test_a_stream_can_be_left(client, _url):
    stream = client.completions.create(
        model=MODEL, prompt="Count:", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert ask(client).choices[0].message.content == ANSWER


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="brigade-test-") as folder:
        cluster = Cluster(folder)
        try:
            cluster.run(sys.argv[1])
            with openai.OpenAI(base_url=cluster.url, api_key=KEY, max_retries=0, timeout=REQUEST_TIMEOUT_S) as client:
                for name, test in tests:
                    try:
                        test(client, cluster.url)
                        print(f"ok      {name}", flush=True)
                    except Exception:  # each test reports, whatever it raised
                        failed += 1
                        print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
            if failed:
                print(cluster.output())
        finally:
            cluster.stop()
    print(f"openai {openai.__version__}: {len(tests) - failed} of {len(tests)} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
