"""The router's process starts in a second because it imports no model code."""

import subprocess
import sys


def test_the_router_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, tgi_router.main; print({'torch', 'transformers', 'tgi_shard'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
