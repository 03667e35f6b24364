"""Two servers in turns: each is started, measured and stopped, and the ratio is that of their speeds."""

import json
import subprocess
import sys
from pathlib import Path

SERVER = """
import asyncio, os, sys
from aiohttp import web
name, port, wait_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with open("order", "a") as order: order.write(f"{name} {os.getpid()}\\n")
async def health(_): return web.Response()
async def generate(request):
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range((await request.json())["parameters"]["max_new_tokens"]):
        await asyncio.sleep(wait_s)
        await response.write(b'data: {"token": {"id": 1}}\\n\\n')
    return response
app = web.Application()
app.router.add_get("/health", health)
app.router.add_post("/generate_stream", generate)
web.run_app(app, host="127.0.0.1", port=port, print=None)
"""
ROOT = Path(__file__).parents[2]


def test_two_servers_in_turns(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    model = tmp_path / "model"
    make: list[str | Path] = [sys.executable, ROOT / "bench" / "make_model.py", "tiny", model]
    subprocess.run(make, check=True, capture_output=True, timeout=120)
    commands: list[str] = []
    for name, wait_s in (("quick", 0.05), ("slow", 0.2)):
        commands += ["--command", name, f"{sys.executable} server.py {name} {{port}} {wait_s}"]
    options: list[str | Path] = [
        "--model",
        model,
        "--concurrency",
        "2",
        "--rounds",
        "1",
        "--repeats",
        "2",
        "--warmup",
        "0",
    ]
    sizes: list[str | Path] = [
        "--prompt-tokens",
        "4",
        "--output-tokens",
        "4",
        "--logs",
        tmp_path,
        "--json",
        tmp_path / "reports.json",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "compare.py", "quick", "slow", *options, *sizes, *commands],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    started = [line.split() for line in (tmp_path / "order").read_text().splitlines()]
    assert [name for name, _ in started] == ["quick", "slow", "quick", "slow"]
    assert not [pid for _, pid in started if Path(f"/proc/{pid}").exists()], "every server has been stopped"
    [rates] = [line for line in done.stdout.splitlines() if line.startswith("  output tokens/s")]
    assert 2 < float(rates.split()[-1].removesuffix("x")) < 6
    reports = json.loads((tmp_path / "reports.json").read_text())
    assert [len(reports[name]["2"]) for name in ("quick", "slow")] == [2, 2]


def test_a_server_that_does_not_start_is_told_at_once(tmp_path: Path) -> None:
    options: list[str | Path] = [
        "--model",
        tmp_path,
        "--logs",
        tmp_path,
        "--command",
        "broken",
        f"{sys.executable} -c exit(3)",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "compare.py", "broken", "ours", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"The server ended with exit code 3, see {tmp_path}/broken.log." in done.stderr
