"""An OpenAI-compatible server that misbehaves on request: real HTTP on loopback, for the tests of collecting.

`python tests/faulty_server.py DELAY_S` prints its port and answers every question after that delay, until it is ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time

REASONS = {429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable"}


class FaultyServer:
    """Answers "#### LENGTH" (the question's length in characters) unless the question's script says otherwise.

    script: question -> what its requests meet, one after another, then answers: a status (429 comes with Retry-After: 1), or
    drop, half, json, no choice, silence, trickle; answers of another kind: length, empty, no usage, null usage, think, reasoning, echo,
    "model NAME". `always` is met by every request instead. log: one dict a request, in the order of arrival.
    """

    def __init__(self, script=None, always=None, delay_s=0.0):
        self.script, self.always, self.delay_s = {q: list(met) for q, met in (script or {}).items()}, always, delay_s
        self.log = []
        self.answered = 0
        self.at_once = self.most_at_once = 0
        self.on_answer = None
        self._loop = asyncio.new_event_loop()

    def __enter__(self):
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=256))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._thread.join()
        self._loop.close()

    async def _end(self):
        self._server.close()
        own = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop.stop()

    def asked(self):
        """The questions that arrived, in order."""
        return [request["question"] for request in self.log]

    async def _serve(self, reader, writer):
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):  # the other side has gone
            pass
        finally:
            writer.close()

    async def _one(self, reader, writer) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        question = body["messages"][-1]["content"]
        self.log.append({"question": question, "body": body, "key": headers.get("authorization"), "at": time.monotonic()})
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.delay_s)
            met = self.always or (self.script[question].pop(0) if self.script.get(question) else "answer")
            return await self._meet(met, question, body, headers, writer)
        finally:
            self.at_once -= 1

    async def _meet(self, met, question, body, headers, writer) -> bool:
        if isinstance(met, int):
            said = {"error": {"message": f"no: {headers.get('authorization')}", "code": None}}
            extra = "Retry-After: 1\r\n" if met == 429 else ""
            return await self._send(writer, json.dumps(said), met, extra)
        if met == "silence":
            await asyncio.sleep(3600)
        if met == "drop":
            return False
        text = json.dumps(self._reply(met, question, body, headers))
        if met == "json":
            text = text[:-20]
        if met in ("half", "trickle"):
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode())
            writer.write(text[: len(text) // 2].encode() if met == "half" else b"")
            await writer.drain()
            while met == "trickle":
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
            return False
        self.answered += 1
        if self.on_answer:
            self.on_answer(self.answered)
        return await self._send(writer, text)

    def _reply(self, met, question, body, headers):
        message = {"role": "assistant", "content": f"It is\n#### {len(question)}"}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
        reply["choices"] = [{"index": 0, "message": message, "finish_reason": "length" if met == "length" else "stop"}]
        reply["usage"] = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        if met == "no choice":
            reply["choices"] = []
        elif met == "empty":
            message["content"] = None
        elif met == "no usage":
            del reply["usage"]
        elif met == "null usage":
            reply["usage"] = {"prompt_tokens": None, "completion_tokens": None}
        elif met == "think":
            message["content"] = f"<think>\nlet me count\n</think>\n\n{message['content']}"
        elif met == "reasoning":
            message["reasoning_content"] = "let me count"
        elif met == "echo":
            message["content"] += f" {headers['authorization']}"
            message["reasoning"] = headers["authorization"]
        if str(met).startswith("model "):
            reply["model"] = met.removeprefix("model ").replace("KEY", headers.get("authorization", ""))
        return reply

    async def _send(self, writer, text, status=200, extra="") -> bool:
        data = text.encode()
        head = f"HTTP/1.1 {status} {REASONS.get(status, 'OK')}\r\nContent-Type: application/json\r\n{extra}"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        return True


if __name__ == "__main__":
    with FaultyServer(delay_s=float(sys.argv[1])) as server:
        print(server.url, flush=True)
        sys.stdin.read()  # until the one who started it has gone
