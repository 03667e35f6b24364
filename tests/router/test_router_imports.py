"""The router's process starts in a second because it imports no model code."""

import subprocess
import sys


def test_the_router_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, tgi_router.main; print([m for m in ('torch', 'transformers', 'tgi_shard') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
