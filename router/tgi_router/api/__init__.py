"""HTTP on one side, drafts and runs of `generation` on the other: one file per family of routes."""
