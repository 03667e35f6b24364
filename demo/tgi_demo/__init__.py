"""The demo model that `--model-id demo` serves: where its files lie once installed."""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
